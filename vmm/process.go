package vmm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Command is the command that runs a VMM for m: as m's user with m's groups and no others, in a session of its own
// (so that a ^C on the terminal does not reach it), with an environment that holds nothing, standard input
// from /dev/null, the guest's console as standard output and stderr as standard error.
// It starts in the caller's working directory, from which m's relative paths are meant.
// The uid is set before exec, since a VMM that forbids itself to change it cannot do so later.
func Command(m *Machine, path string, args []string, stderr *Tail) *exec.Cmd {
	groups := make([]uint32, 0, len(m.Groups))
	for _, g := range m.Groups {
		groups = append(groups, uint32(g))
	}
	cmd := exec.Command(path, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"}
	if m.Console != nil {
		cmd.Stdout = m.Console
	}
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Credential: &syscall.Credential{Uid: uint32(m.UID), Gid: uint32(m.GID), Groups: groups},
	}
	return cmd
}

// Start starts cmd as m wants its processes started.
func (m *Machine) Start(cmd *exec.Cmd) error {
	spawn := m.Spawn
	if spawn == nil {
		spawn = (*exec.Cmd).Start
	}
	if err := spawn(cmd); err != nil {
		return fmt.Errorf("cannot start %s: %w", cmd.Path, err)
	}
	return nil
}

// Freeze stops a child (SIGSTOP) and returns when no thread of it runs any more. One that ends instead is an error.
func Freeze(child *os.Process) error {
	if err := child.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for {
		var info unix.Siginfo
		// WNOWAIT: its end is for whoever waits for it to see.
		err := unix.Waitid(unix.P_PID, child.Pid, &info, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ECHILD) || err == nil && info.Code != cldStopped:
			return os.ErrProcessDone
		default:
			return err
		}
	}
}

// cldStopped is CLD_STOPPED of sigaction(2).
const cldStopped = 5

// Thaw lets a child go on that Freeze has stopped; one that has ended is no error.
func Thaw(child *os.Process) error {
	if err := child.Signal(syscall.SIGCONT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// tailSize is how much of a VMM's last words is kept: enough for a chain of errors, little for a terminal.
const tailSize = 4096

// logLimit is how much of what one VMM says is passed on to its log.
const logLimit = 4 << 20

// Tail passes on what is written to it, up to logLimit, and keeps the end. A guest can make a VMM complain without
// end, so no more than the end is ever kept, and a log that can't be written stops nothing.
type Tail struct {
	to   interface{ Write([]byte) (int, error) }
	left int // bytes that may still be passed on

	mu  sync.Mutex
	end []byte
}

// NewTail makes a Tail that passes on to m.Log, where there is one.
func NewTail(m *Machine) *Tail {
	t := &Tail{left: logLimit}
	if m.Log != nil {
		t.to = m.Log
	}
	return t
}

// Write never fails, and is called by one goroutine: a VMM whose standard error breaks would end by SIGPIPE.
func (t *Tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	t.end = append(t.end, p...)
	if over := len(t.end) - tailSize; over > 0 {
		t.end = append(t.end[:0], t.end[over:]...)
	}
	t.mu.Unlock()
	if t.to != nil {
		n, err := t.to.Write(p[:min(len(p), t.left)])
		if t.left -= n; err != nil || t.left == 0 {
			t.to = nil
		}
	}
	return len(p), nil
}

// String is the end of what was written, by Plain and without the space around it; of a line that was cut, what is left of it.
func (t *Tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(Plain(string(t.end)))
}
