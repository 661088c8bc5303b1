package boot

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// children starts processes and reaps those that nobody waits for. As PID 1 it is the parent of every orphan; a plain wait4(-1)
// would also take the exit status of processes that os/exec waits for (9 of 100 were lost that way).
type children struct {
	mu    sync.Mutex // held while a process is started, and from looking at a zombie until it is reaped
	owned map[int]bool
	again chan struct{} // a Wait is over: a zombie behind the awaited one can be looked at
}

func newChildren() *children {
	return &children{owned: map[int]bool{}, again: make(chan struct{}, 1)}
}

// Start starts a process whose exit status only Wait takes.
func (c *children) Start(cmd *exec.Cmd) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	c.owned[cmd.Process.Pid] = true
	return nil
}

// Wait is cmd.Wait for a process that Start started.
func (c *children) Wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	c.mu.Lock()
	delete(c.owned, cmd.Process.Pid)
	c.mu.Unlock()
	select {
	case c.again <- struct{}{}:
	default:
	}
	return err
}

// Run starts a process and waits for it.
func (c *children) Run(cmd *exec.Cmd) error {
	if err := c.Start(cmd); err != nil {
		return err
	}
	return c.Wait(cmd)
}

// reapPeriod is how often zombies are looked for when nothing was heard: a signal can stand for several of them.
const reapPeriod = 10 * time.Second

// reap reaps orphans until the context ends.
func (c *children) reap(ctx context.Context) {
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	defer signal.Stop(died)
	tick := time.NewTicker(reapPeriod)
	defer tick.Stop()
	for {
		for c.reapOne() {
		}
		select {
		case <-ctx.Done():
			return
		case <-died:
		case <-c.again:
		case <-tick.C:
		}
	}
}

// reapOne reaps a zombie that isn't owned and says whether there may be more. An owned one stands in the way of those behind it
// only until its Wait is over.
func (c *children) reapOne() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	var info unix.Siginfo
	err := ignoreInterrupt(func() error {
		return unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	})
	if err != nil {
		return false // no children at all
	}
	pid := siginfoPID(&info)
	if pid == 0 || c.owned[pid] {
		return false
	}
	err = ignoreInterrupt(func() error {
		_, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
		return err
	})
	return err == nil
}

// some says whether there is a child, be it dead: PID 1 has none when no process but the kernel's is left.
func (c *children) some() bool {
	return !errors.Is(ignoreInterrupt(func() error {
		return unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	}), unix.ECHILD)
}

func ignoreInterrupt(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// siginfoPID is the si_pid of a child's siginfo: behind signo, errno, code and, on 64-bit machines, four bytes of padding.
func siginfoPID(info *unix.Siginfo) int {
	return int((*[5]int32)(unsafe.Pointer(info))[4])
}
