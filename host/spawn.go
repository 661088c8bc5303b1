package host

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// markVariable is the environment variable that marks the processes of a VM; its
// value is [Layout.Mark]. It is inherited by what they fork, so that a left-over
// is found whatever its parent has become.
const markVariable = "CLAWVM_MARK"

// spawner starts a VM's processes so that they die with the supervisor: the
// kernel sends a parent-death signal when the *thread* that forked ends
// (prctl(2)), so all are forked by one thread that never does.
type spawner struct {
	mark  string
	start chan spawnRequest
}

type spawnRequest struct {
	start func() error
	done  chan error
}

func newSpawner(mark string) *spawner {
	s := &spawner{mark: mark, start: make(chan spawnRequest)}
	go func() {
		runtime.LockOSThread()
		for r := range s.start {
			r.done <- r.start()
		}
	}()
	return s
}

// childEnvironment is no more of the caller's environment than children need.
func childEnvironment() []string { return []string{"PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8"} }

// noHugePages keeps the kernel from backing a heap of two MiB with four MiB of
// huge pages, where it does that for all programs, as Debian 13's does (see
// disablethp in Go's package runtime). It is for supervisor and gate, of which
// there is one for every VM, and not for the VMM, whose guest gains by them.
const noHugePages = "GODEBUG=disablethp=1"

// spawn starts cmd with the VM's mark and a parent-death signal.
func (s *spawner) spawn(cmd *exec.Cmd) error { return s.spawnBy(cmd, cmd.Start) }

// spawnDispensable is spawn, for a process that is to be killed before others when
// the host has no memory left.
func (s *spawner) spawnDispensable(cmd *exec.Cmd) error {
	return s.spawnBy(cmd, func() error { return asDispensable(cmd.Start) })
}

func (s *spawner) spawnBy(cmd *exec.Cmd, start func() error) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	// Away from the terminal's process group: ^C is for the supervisor, which
	// takes the VM down in order. (A session's leader has a group of its own.)
	cmd.SysProcAttr.Setpgid = !cmd.SysProcAttr.Setsid
	if cmd.Env == nil {
		cmd.Env = childEnvironment()
	}
	cmd.Env = append(cmd.Env, markVariable+"="+s.mark)
	r := spawnRequest{start, make(chan error, 1)}
	s.start <- r
	return <-r.done
}

// killMarked ends every process that carries the mark, but for this one, and
// waits until they are gone. It is for what a supervisor that was killed left.
func killMarked(mark string) (int, error) {
	killed := 0
	deadline := time.Now().Add(killWait)
	for {
		pids, err := markedProcesses(mark)
		if err != nil {
			return killed, err
		}
		if len(pids) == 0 {
			return killed, nil
		}
		if time.Now().After(deadline) {
			return killed, fmt.Errorf("processes %v were killed and are still there after %s", pids, killWait)
		}
		if err := killAll(pids, mark, deadline); err != nil {
			return killed, err
		}
		killed += len(pids)
	}
}

// killAll kills what carries the mark, and then waits for all of it.
func killAll(pids []int, mark string, deadline time.Time) (err error) {
	var fds []int
	defer func() {
		for _, fd := range fds {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	for _, pid := range pids {
		// Killed through a pidfd, a pid that was given to another process in between
		// is left alone.
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot open process %d: %w", pid, err)
		}
		if has, err := markOf(pid); err != nil || has != mark {
			if err := errors.Join(err, unix.Close(fd)); err != nil {
				return err
			}
			continue
		}
		fds = append(fds, fd)
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("cannot kill process %d: %w", pid, err)
		}
	}
	for _, fd := range fds {
		if err := awaitEnd(fd, deadline); err != nil {
			return fmt.Errorf("processes %v were killed and are still there after %s: %w", pids, killWait, err)
		}
	}
	return nil
}

const (
	killWait = 10 * time.Second      // a killed process in uninterruptible sleep needs this at most
	killPoll = 10 * time.Millisecond // between looks for what is left
)

// processes lists all processes of this pid namespace.
func processes() ([]int, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, d := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// markedProcesses lists the processes that carry the mark, but for this one.
func markedProcesses(mark string) ([]int, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, pid := range all {
		if pid == os.Getpid() {
			continue
		}
		has, err := markOf(pid)
		if err != nil {
			return nil, err
		}
		if has == mark {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// marked lists the VMs of this root that have processes.
func (l Layout) marked() ([]string, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, pid := range all {
		mark, err := markOf(pid)
		if err != nil {
			return nil, err
		}
		if name, ok := strings.CutPrefix(mark, l.Mark("")); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// markOf reads the mark from a process's environment: "" for one that has none,
// is gone, or is a zombie. That the host has nothing left to look with is an error.
func markOf(pid int) (string, error) {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if exhausted(err) {
		return "", fmt.Errorf("cannot look for processes: %w", err)
	}
	if err != nil {
		return "", nil
	}
	for _, v := range bytes.Split(env, []byte{0}) {
		if mark, ok := bytes.CutPrefix(v, []byte(markVariable+"=")); ok {
			return string(mark), nil
		}
	}
	return "", nil
}
