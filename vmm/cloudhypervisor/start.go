package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/clawvm/clawvm/vmm"
	"golang.org/x/sys/unix"
)

const (
	// landlockABI is what cloud-hypervisor asks of the kernel; it fails where there is less (before Linux 6.2).
	landlockABI = 3
	// endLimit bounds the wait for a process that was killed.
	endLimit = 10 * time.Second
)

// arguments are the program's. What it inherits begins at 3: the API's listening socket, then the event monitor's pipe.
// --no-shutdown lets it stay when the guest turns itself off, which tells that end from any other.
func arguments() []string {
	return []string{"--api-socket", "fd=3", "--event-monitor", "fd=4", "--seccomp", "true", "--no-shutdown"}
}

// Start starts the process and in it the machine, and returns when the guest's processors run. When ctx ends first, the process is
// killed. On an error nothing is left but the agent's channel, which stays its maker's to close.
func (c *CloudHypervisor) Start(ctx context.Context, m *vmm.Machine) (vmm.Instance, error) {
	if err := check(m); err != nil {
		return nil, err
	}
	i, err := c.spawn(m)
	if err != nil {
		return nil, errors.Join(err, removeLeftovers(m))
	}
	if err := i.bring(ctx); err != nil {
		return nil, i.giveUp(err)
	}
	return i, nil
}

// spawn starts the process. The parent's copies of what it inherits are closed here, or a dead one would leave the
// API's callers waiting in a backlog that nobody serves.
func (c *CloudHypervisor) spawn(m *vmm.Machine) (*instance, error) {
	path, err := c.find()
	if err != nil {
		return nil, err
	}
	if m.Agent == nil {
		if err := removeLeftovers(m); err != nil {
			return nil, err
		}
	} else if err := os.Remove(apiPath(m)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot clear %s: %w", apiPath(m), err)
	}
	api, err := listen(apiPath(m))
	if err != nil {
		return nil, err
	}
	events, monitor, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot make a pipe: %w", err), api.Close())
	}
	stderr := vmm.NewTail(m)
	cmd := vmm.Command(m, path, arguments(), stderr)
	cmd.ExtraFiles = []*os.File{api, monitor}
	cmd.WaitDelay = time.Second // it has no children that could hold its standard error
	err = m.Start(cmd)
	err = errors.Join(err, api.Close(), monitor.Close())
	if err != nil && cmd.Process == nil {
		return nil, errors.Join(err, events.Close())
	}
	i := newInstance(m, cmd, stderr, newClient(apiPath(m)), events)
	go i.follow()
	go i.wait()
	if err != nil {
		return nil, i.giveUp(err)
	}
	return i, nil
}

// bring makes and boots the machine. Each call ends with the process, so that a death is told at once.
func (i *instance) bring(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(i.ended, func() { cancel(errors.New("the process ended")) })
	defer stop()
	p, err := i.api.ping(ctx)
	if err != nil {
		return err
	}
	if _, err := checkVersion(p.Version); err != nil {
		return err
	}
	if i.machine.TAP != "" {
		if _, err := os.Stat("/sys/class/net/" + i.machine.TAP); err != nil {
			return fmt.Errorf("there is no TAP %s: %w", i.machine.TAP, err)
		}
	}
	if err := i.api.create(ctx, configure(i.machine, landlocked())); err != nil {
		return err
	}
	return i.api.boot(ctx)
}

// giveUp kills the process and says why it was of no use.
func (i *instance) giveUp(why error) error {
	err := i.Kill()
	select {
	case <-i.ended.Done():
	case <-time.After(endLimit):
		return errors.Join(why, err, fmt.Errorf("cloud-hypervisor (process %d) was killed and does not end", i.PID()))
	}
	if said := i.stderr.String(); said != "" {
		why = fmt.Errorf("%w; it said: %s", why, said)
	} else if exit := i.Wait(); !refused(why) && exit.Code > 0 {
		why = fmt.Errorf("%w; its exit code was %d", why, exit.Code)
	}
	return errors.Join(fmt.Errorf("cannot start cloud-hypervisor: %w", why), err, i.Close())
}

// landlocked says whether the kernel has the Landlock that cloud-hypervisor confines itself with.
func landlocked() bool {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	return errno == 0 && int(abi) >= landlockABI
}
