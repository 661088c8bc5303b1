package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
)

// Supervisor is the privileged process of one VM. It owns everything that the VM
// needs and takes all of it down when it ends.
type Supervisor struct {
	layout  Layout
	paths   Paths
	name    string
	log     *log.Logger
	spawner *spawner
	journal *journal
	lines   guestLines // used by the one life that there is at a time

	checking bool          // nothing is started: see Check
	grace    time.Duration // of the last request to end; this and what follows guarded by mu
	policy   string        // the declaration's `restart:`, once it is read
	lived    bool          // the VM was ready once
	heard    time.Time     // when the guest's agent answered last

	down       chan time.Duration // requests to end, with the guest's grace
	wake       chan struct{}      // the next life is to begin now
	requests   chan request       // what else is asked of a running VM
	exceptions exceptions         // what is reached beside the declaration
	first      *beginning         // of what every later life is made; the lives' own

	mu     sync.Mutex // guards what follows
	status Status
	parts  []int          // processes without which the VM, if it is up, can't go on
	fields []config.Field // the declaration that the VM goes by
	life   *life

	cgroups *cgroupPlace // where the VM's cgroups are; nil where there are none (yet)
}

// heapGrowth: a supervisor does nothing for most of its life, and there is one
// for every VM; a collection more at the start costs little.
const heapGrowth = 30

// defaultGrace is how long a guest may take to end by itself when nobody says
// otherwise: the workload's own 30 s, and what init and kernel need after it.
const defaultGrace = 40 * time.Second

// Supervise runs the VM name until it ends, and returns nil when it ended as it
// was asked to. A cancelled ctx asks it to end. What it says goes to out, and to
// systemd where that asked for it (sd_notify(3)).
func Supervise(ctx context.Context, l Layout, name string, out io.Writer) error {
	debug.SetGCPercent(heapGrowth)
	s := &Supervisor{
		layout: l, paths: l.VM(name), name: name,
		log:     log.New(&boundedLog{out: out, path: l.VM(name).SupervisorLog()}, "", log.LstdFlags|log.Lmsgprefix),
		spawner: newSpawner(l.Mark(name)),
		journal: newJournal(),
		down:    make(chan time.Duration, 1), wake: make(chan struct{}, 1), requests: make(chan request),
		status: Status{Name: name, State: Starting, Started: time.Now().UTC(), PID: os.Getpid()},
	}
	if err := limitSupervisor(); err != nil {
		return fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	// See Layout.relative.
	if err := os.Chdir(l.Root); err != nil {
		return fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	lock, err := l.lockVM(ctx, name)
	if errors.Is(err, errLocked) {
		return fmt.Errorf("cannot start VM %s: it runs already (its lock %s is held)", name, s.paths.Lock())
	}
	if err != nil {
		return fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	defer lock.Close()
	// The VMM's uid passes through to its own directory (MkdirAll obeys the umask).
	if err := os.Chmod(s.paths.Run, 0o711); err != nil {
		return fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	control, err := serveControl(s.paths.Control(), s)
	if err != nil {
		return fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	// What stands if this process ends without a word.
	killed := End{Time: time.Now().UTC(), Started: s.Status().Started, Kind: EndSupervisor, Code: ExitFailed,
		Reason: fmt.Sprintf("VM %s: its supervisor was killed, or the host went down", name)}
	if err := writeEnd(s.paths.LastEnd(), killed); err != nil {
		s.logf("%v", err)
	}
	defer s.attend()()
	stop := s.reloadOnHangup(ctx)
	end, err := s.lives(ctx)
	stop()
	if err != nil {
		s.logf("%v", err)
	}
	s.logf("ended: %s", end.Kind)
	// Before it is told: who hears of the end reads how it was.
	recorded := writeEnd(s.paths.LastEnd(), end)
	s.journal.add(Progress{State: VMEnded, Text: end.Reason})
	after := errors.Join(recorded, control.close(), s.leaveCgroup(), s.tidy())
	if after != nil {
		s.logf("%v", after)
	}
	if err = errors.Join(err, after); err != nil {
		return &LoggedError{err, s.decided(end.Kind)}
	}
	return nil
}

// LoggedError is an error that Supervise has written to its log, which needs no
// second mention there.
type LoggedError struct {
	Err error
	// Decided: the supervisor would have started the VM again, if that was wanted.
	Decided bool
}

func (e *LoggedError) Error() string { return e.Err.Error() }
func (e *LoggedError) Unwrap() error { return e.Err }

// tidy removes the rest of the run directory but for the lock, which is held.
func (s *Supervisor) tidy() error {
	if err := os.Remove(s.paths.Control()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Status is what is known of the VM now.
func (s *Supervisor) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

func (s *Supervisor) update(change func(*Status)) {
	s.mu.Lock()
	change(&s.status)
	s.lived = s.lived || !s.status.Ready.IsZero()
	text := statusText(s.status)
	s.mu.Unlock()
	s.tellSystemd("STATUS=" + text)
}

func (s *Supervisor) logf(format string, args ...any) { s.log.Printf(format, args...) }

// tellSystemd sends a state to the service manager; without one it does nothing.
func (s *Supervisor) tellSystemd(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.logf("cannot tell the service manager %q: %v", state, err)
	}
}

// requestDown asks for the VM's end. The first request counts.
func (s *Supervisor) requestDown(grace time.Duration) {
	s.mu.Lock()
	s.grace = grace
	s.mu.Unlock()
	select {
	case s.down <- grace:
	default:
	}
}

// rotate stages the secrets anew.
func (s *Supervisor) rotate() error {
	s.mu.Lock()
	l := s.life
	s.mu.Unlock()
	if l == nil {
		return fmt.Errorf("VM %s is between two starts: try again", s.name)
	}
	return l.restage()
}

// openLog opens one of the supervisor's own log files for appending. What grew
// beyond the limit is put aside first, one generation.
func openLog(path string) (*os.File, error) {
	for {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := putAside(path); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o640)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		// An rm of the VM has removed the directory since.
	}
}

// putAside renames a log that has grown beyond hostLogMax; one generation is kept.
func putAside(path string) error {
	if st, err := os.Lstat(path); err != nil || st.Size() <= hostLogMax {
		return nil // what is wrong with it is opening's to say
	}
	return os.Rename(path, path+".1")
}

// hostLogMax bounds the logs of supervisor, VMM and virtiofsd, in bytes: they say
// little.
const hostLogMax = 4 << 20
