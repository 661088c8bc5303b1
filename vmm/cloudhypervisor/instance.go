package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/clawvm/clawvm/vmm"
)

const (
	// panicGrace is for the rest of a panicking guest's console: pvpanic speaks before the kernel has printed its last line.
	panicGrace = time.Second
	// eventBuffer is more than a machine's life has events of ours.
	eventBuffer = 16
	// drainLimit bounds reading the rest of the events of a process that has ended.
	drainLimit = 2 * time.Second
)

// instance is one process with its machine.
type instance struct {
	machine *vmm.Machine
	cmd     *exec.Cmd
	stderr  *vmm.Tail
	api     *client

	stream   *os.File // the event monitor's
	events   chan vmm.Event
	followed chan struct{} // closed when the event stream has ended

	// ended is done when the process has ended and exit is known.
	ended context.Context
	end   context.CancelFunc
	exit  vmm.Exit

	pausing sync.Mutex // held while the machine is paused or resumed
	paused  bool       // the process is stopped

	mu     sync.Mutex
	ending ending
	panics *time.Timer
}

var _ vmm.Instance = (*instance)(nil)

func newInstance(m *vmm.Machine, cmd *exec.Cmd, stderr *vmm.Tail, api *client, stream *os.File) *instance {
	i := &instance{machine: m, cmd: cmd, stderr: stderr, api: api, stream: stream,
		events: make(chan vmm.Event, eventBuffer), followed: make(chan struct{})}
	i.ended, i.end = context.WithCancel(context.Background())
	return i
}

// PID is the process's.
func (i *instance) PID() int { return i.cmd.Process.Pid }

// Events tells of the machine's life until the process has ended.
func (i *instance) Events() <-chan vmm.Event { return i.events }

// PowerButton presses the ACPI power button. The guest needs a driver for it, and something that heeds it.
func (i *instance) PowerButton(ctx context.Context) error {
	if err := i.api.powerButton(ctx); err != nil {
		return fmt.Errorf("cannot press the power button of %s: %w", i.machine.Name, err)
	}
	return nil
}

// Pause stops the vCPUs and the devices' threads, and then the process.
func (i *instance) Pause(ctx context.Context) error {
	i.pausing.Lock()
	defer i.pausing.Unlock()
	if i.paused {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, vmm.PauseLimit)
	defer cancel()
	if err := i.api.pause(ctx); err != nil {
		i.log(fmt.Errorf("%w; cloud-hypervisor is stopped as it is", err))
	}
	if err := vmm.Freeze(i.cmd.Process); err != nil {
		return fmt.Errorf("cannot stop cloud-hypervisor (process %d) of %s: %w", i.PID(), i.machine.Name, err)
	}
	i.paused = true
	return nil
}

// Resume lets the process go on, and the machine in it.
func (i *instance) Resume(ctx context.Context) error {
	i.pausing.Lock()
	defer i.pausing.Unlock()
	if !i.paused {
		return nil
	}
	err := i.wake()
	if err == nil {
		var now vmInfo
		// It refuses to resume what runs, as it does when it could not be paused in order.
		if now, err = i.api.info(ctx); err == nil && now.State != stateRunning {
			err = i.api.resume(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot resume %s: %w", i.machine.Name, err)
	}
	return nil
}

// wake lets the process go on; its machine stays paused.
func (i *instance) wake() error {
	if err := vmm.Thaw(i.cmd.Process); err != nil {
		return fmt.Errorf("cannot let cloud-hypervisor (process %d) go on: %w", i.PID(), err)
	}
	i.paused = false
	return nil
}

// Stop asks the process to end in order: disks are flushed, the guest isn't asked. Wait tells when it has.
func (i *instance) Stop(ctx context.Context) error {
	i.mark(func(e *ending) { e.asked = true })
	i.pausing.Lock()
	err := i.wake()
	i.pausing.Unlock()
	if err == nil {
		err = i.api.shutdown(ctx)
	}
	if err == nil || i.ended.Err() != nil {
		return nil
	}
	return fmt.Errorf("cannot stop %s: %w", i.machine.Name, err)
}

// Kill kills the process.
func (i *instance) Kill() error {
	i.mark(func(e *ending) { e.asked = true })
	return i.kill()
}

func (i *instance) kill() error {
	if err := i.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("cannot kill cloud-hypervisor (process %d) of %s: %w", i.PID(), i.machine.Name, err)
	}
	return nil
}

// Wait blocks until the process has ended.
func (i *instance) Wait() vmm.Exit {
	<-i.ended.Done()
	return i.exit
}

// Close removes the sockets.
func (i *instance) Close() error { return removeLeftovers(i.machine) }

func (i *instance) mark(change func(*ending)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	change(&i.ending)
}

// wait waits for the process and then for the last events, which say what the exit code does not.
func (i *instance) wait() {
	err := i.cmd.Wait()
	select {
	case <-i.followed:
	case <-time.After(drainLimit):
		// Something else holds the stream open; what came so far has to do.
		if err := i.stream.Close(); err != nil {
			i.log(err)
		}
	}
	i.mu.Lock()
	if i.panics != nil {
		i.panics.Stop()
	}
	i.ending.of(i.cmd.ProcessState)
	i.ending.stderr = i.stderr.String()
	i.exit = i.ending.exit()
	i.mu.Unlock()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) && i.exit.Detail == "" {
		i.exit.Detail = err.Error()
	}
	i.end()
}

// follow reads the event monitor to its end, and ends a process whose guest has rebooted, turned itself off or panicked; and
// one that says what it should not, since nothing would be noticed of it any more.
func (i *instance) follow() {
	if err := readEvents(i.stream, i.heed); err != nil && !errors.Is(err, os.ErrClosed) {
		i.mark(func(end *ending) { end.broken = err })
		i.finish()
	}
	if err := i.stream.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		i.log(err)
	}
	close(i.followed)
	close(i.events)
}

func (i *instance) heed(e event) {
	switch e.String() {
	case "vm/booted":
		i.tell(vmm.Booted, e.String())
	case "guest/panic":
		what := e.Properties["event"]
		if what == "" {
			what = "panic"
		}
		i.mark(func(end *ending) {
			if end.asked || end.panicked != "" {
				return
			}
			end.panicked = what
			i.panics = time.AfterFunc(panicGrace, func() { i.finish() })
		})
		i.tell(vmm.Panicked, what)
	case "vm/rebooting":
		i.mark(func(end *ending) { end.rebooting = !end.asked })
		i.tell(vmm.Rebooting, e.String())
		i.finish()
	case "vm/shutdown":
		i.mayBeOff()
	}
}

// mayBeOff finds out why the machine was shut down: when the guest did it, the process is still there to answer
// (--no-shutdown), without a machine; else it is ending by itself.
func (i *instance) mayBeOff() {
	i.mu.Lock()
	asked := i.ending.asked
	i.mu.Unlock()
	if asked {
		return
	}
	ctx, cancel := context.WithCancel(i.ended)
	defer cancel()
	if info, err := i.api.info(ctx); err != nil || info.State == stateRunning {
		return
	}
	i.mark(func(end *ending) { end.poweredOff = !end.asked })
	i.tell(vmm.PoweredOff, "vm/shutdown")
	i.finish()
}

// finish ends a process that has no use any more. Its machine's disks have nothing to flush: what the guest had
// written is the host kernel's already.
func (i *instance) finish() {
	if err := i.kill(); err != nil {
		i.log(err)
	}
}

// log notes what nobody waits for, beside what the process itself says.
func (i *instance) log(err error) { fmt.Fprintf(i.stderr, "clawvm: %v\n", err) }

// tell passes an event on, unless nobody reads them.
func (i *instance) tell(kind vmm.EventKind, detail string) {
	select {
	case i.events <- vmm.Event{Kind: kind, Detail: detail}:
	default:
	}
}
