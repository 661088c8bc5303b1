package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is what a unix socket's address holds, without its final zero.
const maxSocketPath = 107

// wantedFiles is the limit of open files that virtiofsd gets: without file
// handles each file that the guest knows of takes one, and the guest keeps an
// image's 40,000 and those of its shares.
const wantedFiles = 1_000_000

// stopDelay is how long virtiofsd has to end when it is asked to; it does
// nothing then but exit.
const stopDelay = 2 * time.Second

// Daemon is a running virtiofsd. It serves one VMM, once, and ends when the
// VMM goes.
type Daemon struct {
	cmd    *exec.Cmd
	name   string
	socket string // "" until it is bound
	bind   string // a read-only mount to take away; "" if none
	done   chan struct{}
	stop   sync.Once
	asked  chan struct{} // closed by Stop
	err    error         // valid when done is closed
}

// Serve starts virtiofsd for a share. When it returns, the VMM can connect to
// the socket. It must be called in a private mount namespace, since a share may
// be made read-only by a mount (beside the socket). The context bounds nothing
// but the start. The caller must call Stop, which also cleans up after a
// virtiofsd that ended by itself.
func (v *Virtiofsd) Serve(ctx context.Context, s Share) (*Daemon, error) {
	if err := v.Check(s); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d := &Daemon{
		name:  fmt.Sprintf("virtiofsd of the share %s (%s)", s.Tag, s.Source),
		done:  make(chan struct{}),
		asked: make(chan struct{}),
	}
	if err := d.start(v, s); err != nil {
		return nil, errors.Join(fmt.Errorf("%w %s: %w", ErrShare, s.Source, err), d.cleanUp())
	}
	return d, nil
}

// Check says what Serve would refuse, and starts nothing. It looks at Source,
// ReadOnly, Cache and the squashed owner of the share.
func (v *Virtiofsd) Check(s Share) error {
	if err := v.checkShare(s); err != nil {
		return err
	}
	info, err := os.Stat(s.Source)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w %s: it isn't there; make the directory, or take the share out of the declaration", ErrShare, s.Source)
	case err != nil:
		return fmt.Errorf("%w %s: %w", ErrShare, s.Source, bare(err))
	case !info.IsDir():
		return fmt.Errorf("%w %s: it is no directory", ErrShare, s.Source)
	}
	return nil
}

func (d *Daemon) start(v *Virtiofsd, s Share) (err error) {
	source := s.Source
	if v.bindNeeded(s) {
		// virtiofsd does not start in this process's directory.
		if d.bind, err = filepath.Abs(s.Socket + ".ro"); err != nil {
			return err
		}
		// What an earlier supervisor left is an empty directory: its
		// mounts went with its namespace.
		if err := os.Mkdir(d.bind, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := BindReadOnly(s.Source, d.bind); err != nil {
			return err
		}
		source = d.bind
	}
	nofile, mayRaise, err := fileLimit()
	if err != nil {
		return err
	}
	// One that isn't root can't raise its own limit, so that is done for it.
	raise := !s.ReadOnly && mayRaise
	given := nofile
	if raise {
		given = 0
	}
	listener, err := listenFor(s)
	if err != nil {
		return err
	}
	d.socket = s.Socket
	// As long as anyone holds the listening socket the VMM's connect
	// succeeds, and then it waits for ever for a virtiofsd that has died.
	defer func() { err = errors.Join(err, listener.Close()) }()
	// The write end of a pipe that nobody writes to: virtiofsd and its child
	// in the sandbox inherit it, so its end says that both are gone.
	alive, held, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.Close()) }()

	d.cmd = exec.Command(v.Path, v.args(s, source, given)...)
	d.cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=/tmp"}
	d.cmd.Dir = "/"
	d.cmd.ExtraFiles = []*os.File{listener, held}
	if s.Log != nil {
		d.cmd.Stdout, d.cmd.Stderr = s.Log, s.Log
	}
	// A group of its own, to reach the child in the sandbox as well.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if !s.ReadOnly {
		d.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.SquashUID), Gid: uint32(s.SquashGID)}
	}
	spawn := s.Spawn
	if spawn == nil {
		spawn = (*exec.Cmd).Start
	}
	if err := spawn(d.cmd); err != nil {
		return errors.Join(fmt.Errorf("cannot start %s: %w", v.Path, err), alive.Close())
	}
	go d.wait(alive)
	if raise { // soon enough: files are opened when the VMM is there
		limit := &unix.Rlimit{Cur: nofile, Max: nofile}
		if err := unix.Prlimit(d.cmd.Process.Pid, unix.RLIMIT_NOFILE, limit, nil); err != nil && err != unix.ESRCH {
			return errors.Join(fmt.Errorf("cannot raise virtiofsd's limit of open files: %w", err), d.Stop())
		}
	}
	return nil
}

// wait waits for the end of virtiofsd and of its child.
func (d *Daemon) wait(alive *os.File) {
	err := d.cmd.Wait()
	// The child gets a signal when its parent dies; if that isn't enough,
	// it is killed: while it lives, the group's number is taken by it.
	derr := alive.SetReadDeadline(time.Now().Add(stopDelay))
	if derr == nil {
		_, derr = alive.Read(make([]byte, 1))
	}
	if errors.Is(derr, os.ErrDeadlineExceeded) {
		if kerr := syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL); kerr != nil && kerr != syscall.ESRCH {
			err = errors.Join(err, kerr)
		}
	}
	if cerr := alive.Close(); cerr != nil {
		err = errors.Join(err, cerr)
	}
	select {
	case <-d.asked: // how it ended is of no interest
	default:
		if err == nil {
			err = errors.New("it ended")
		}
		d.err = fmt.Errorf("%s: %w", d.name, err)
	}
	close(d.done)
}

// PID is the process id of virtiofsd; it has a child in the sandbox.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Done is closed when virtiofsd and its child have ended.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Err says, once Done is closed, how virtiofsd ended; nil when Stop ended
// it. An end with status 0 is what follows the VMM's end.
func (d *Daemon) Err() error {
	select {
	case <-d.done:
		return d.err
	default:
		return nil
	}
}

// Stop ends virtiofsd, if it hasn't ended, and removes socket and mount. It
// may be called several times.
func (d *Daemon) Stop() error {
	d.stop.Do(func() { close(d.asked) })
	select {
	case <-d.done:
		return d.cleanUp()
	default:
	}
	// Signals of a process that has ended are nobody's error.
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("cannot stop the %s: %w", d.name, err)
	}
	select {
	case <-d.done:
		return d.cleanUp()
	case <-time.After(stopDelay):
	}
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("cannot kill the %s: %w", d.name, err)
	}
	<-d.done
	return d.cleanUp()
}

// cleanUp removes what Serve made beside the process.
func (d *Daemon) cleanUp() error {
	var errs []error
	if d.socket != "" {
		if err := os.Remove(d.socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if d.bind != "" {
		errs = append(errs, Unmount(d.bind))
		if err := os.Remove(d.bind); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// listenFor binds the share's socket, for the VMM's user alone.
func listenFor(s Share) (f *os.File, err error) {
	if len(s.Socket) > maxSocketPath {
		return nil, fmt.Errorf("the socket's path %s has more than %d bytes; use a shorter --root", s.Socket, maxSocketPath)
	}
	// A socket that nobody listens on any more can't be bound again.
	if info, err := os.Lstat(s.Socket); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("%s is in the way and isn't a socket", s.Socket)
		}
		if err := os.Remove(s.Socket); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.Socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer func() {
		err = errors.Join(err, l.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(s.Socket))
		}
	}()
	if err := os.Chmod(s.Socket, 0o600); err != nil {
		return nil, err
	}
	if err := os.Lchown(s.Socket, s.OwnerUID, s.OwnerGID); err != nil {
		return nil, err
	}
	return l.File()
}

// fileLimit is how many files virtiofsd may open: what is wanted, as far as
// the kernel and this process's rights allow it (in a container root often
// can't raise limits).
func fileLimit() (limit uint64, mayRaise bool, err error) {
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
		return 0, false, fmt.Errorf("cannot read the limit of open files: %w", err)
	}
	var caps [2]unix.CapUserData
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return 0, false, fmt.Errorf("cannot read the capabilities of this process: %w", err)
	}
	if caps[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return min(own.Max, wantedFiles), false, nil
	}
	text, err := os.ReadFile("/proc/sys/fs/nr_open")
	if err != nil {
		return 0, false, err
	}
	highest, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, false, fmt.Errorf("cannot read fs.nr_open: %w", err)
	}
	return min(highest, wantedFiles), true, nil
}
