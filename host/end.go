package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/vmm"
)

// The rungs of the shutdown ladder, after the guest's own grace.
const (
	powerButtonWait = 5 * time.Second // init stops the workload at once when the button is pressed
	vmmStopWait     = 3 * time.Second // the VMM flushes its disks
	gateStop        = 3 * time.Second // the gate writes its logs
)

// after is time.After, for one select.
func after(d time.Duration) <-chan time.Time { return time.NewTimer(d).C }

// exited returns a channel that is closed when the VMM has ended.
func exited(i vmm.Instance) <-chan struct{} {
	ch := make(chan struct{})
	go func() {
		i.Wait()
		close(ch)
	}()
	return ch
}

// lostShare returns a channel that tells of the first virtiofsd that ends.
func (l *life) lostShare() <-chan error {
	ch := make(chan error, len(l.daemons))
	for _, d := range l.daemons {
		go func() {
			<-d.Done()
			ch <- d.Err()
		}()
	}
	return ch
}

// awaitEnd waits for whatever ends the VM first.
func (l *life) awaitEnd(ctx context.Context) (ending, error) {
	gone, lost := exited(l.instance), l.lostShare()
	for {
		select {
		case <-ctx.Done():
			return endedByOwner, context.Cause(ctx)
		case <-gone:
			return l.howItEnded()
		case err := <-lost:
			// virtiofsd ends when its client does: only then it is no fault.
			if l.endsSoon(gone) {
				return l.howItEnded()
			}
			return 0, fmt.Errorf("VM %s: the server of a share ended, and the guest cannot go on without: %w", l.name, err)
		case r := <-l.requests:
			r.done <- r.do(l)
		case <-l.gate.ended:
			return 0, fmt.Errorf("VM %s: the gate ended: %w; see %s", l.name, l.gate.why(), l.paths.Log+"/gate.log")
		case m, ok := <-l.gate.messages:
			if !ok {
				l.gate.messages = nil
				continue
			}
			l.heed(m)
		}
	}
}

// endTogether is how far apart the ends of a VMM and its virtiofsd may be seen.
const endTogether = 2 * time.Second

func (l *life) endsSoon(gone <-chan struct{}) bool {
	select {
	case <-gone:
		return true
	case <-after(endTogether):
		return false
	}
}

// heed takes note of what the gate tells of a running guest.
func (l *life) heed(m gate.Message) {
	switch m.Kind {
	case gate.WorkloadEnded:
		l.logf("the workload ended: %s", m.Detail)
		l.update(func(st *Status) {
			st.Workload = m.Detail
			if m.Again {
				st.Restarts++
			}
		})
	case gate.Ending:
		l.announced = &m
		l.logf("the guest ends: %s %s", m.Kind, m.Detail)
	case gate.Lost:
		l.logf("the guest's agent does not answer any more: %s", m.Detail)
		l.update(func(st *Status) { st.Lost = m.Detail })
	case gate.Progress:
		l.logf("guest: %s", m.Detail)
	case gate.ClockSet:
		l.heedClock(m)
	case gate.Connected, gate.Ready:
	default:
		l.logf("the gate said what is not understood: %q", m.Kind)
	}
}

// howItEnded explains the end of a VMM that nobody asked to end.
func (l *life) howItEnded() (ending, error) {
	l.drain()
	exit := l.instance.Wait()
	switch exit.Reason {
	case vmm.ExitRebooted:
		return endedByReboot, nil
	case vmm.ExitPoweredOff:
		if l.announced != nil && l.announced.Detail == gate.EndWorkload && l.announced.Code != 0 {
			return 0, coded(l.announced.Code, fmt.Errorf("VM %s: the workload ended with exit code %d; clawvm logs %s shows what it said", l.name, l.announced.Code, l.name))
		}
		l.logf("the guest powered off")
		return endedByGuest, nil
	}
	return 0, fmt.Errorf("VM %s: %s; clawvm logs --console %s shows the end of its console", l.name, exit, l.name)
}

// endedEarly explains the end of a VMM before its guest was ready.
func (l *life) endedEarly() error {
	l.drain()
	if l.announced != nil {
		switch l.announced.Detail {
		case gate.EndWorkload:
			return coded(max(l.announced.Code, ExitFailed), fmt.Errorf("the workload ended with exit code %d before it was ready", l.announced.Code))
		case gate.EndFailed:
			return errors.New("the guest could not be set up; the end of its console says why")
		}
	}
	return fmt.Errorf("the VM ended before it was ready: %s", l.instance.Wait())
}

// drain reads what the gate said before the VMM's end was seen.
func (l *life) drain() {
	for {
		select {
		case m, ok := <-l.gate.messages:
			if !ok {
				l.gate.messages = nil
				return
			}
			l.heed(m)
		case <-after(drainWait):
			return
		}
	}
}

// drainWait is how long after the VMM's end the gate's last word may arrive.
const drainWait = 200 * time.Millisecond

// shutDown is the ladder: the agent is asked, the power button pressed, the VMM
// stopped, and killed by the undo stack. Each rung is said.
func (l *life) shutDown(grace time.Duration) error {
	if l.instance == nil {
		return nil
	}
	if l.paused && !l.wakeToEnd(grace) {
		return nil
	}
	gone := exited(l.instance)
	ctx, cancel := context.WithTimeout(context.Background(), grace+powerButtonWait+vmmStopWait)
	defer cancel()
	rungs := []struct {
		what string
		do   func() error
		wait time.Duration
	}{
		{"asking the guest to end", func() error {
			return l.gate.conn.Send(gate.Message{Kind: gate.Shutdown, Grace: grace.Milliseconds()})
		}, grace},
		{"pressing the power button", func() error { return l.instance.PowerButton(ctx) }, powerButtonWait},
		{"stopping the VMM", func() error { return l.instance.Stop(ctx) }, vmmStopWait},
	}
	for _, r := range rungs {
		if r.wait <= 0 {
			continue
		}
		l.logf("%s (up to %s)", r.what, r.wait)
		if err := guarded(r.what, r.do); err != nil {
			l.logf("%s: %v", r.what, err)
			continue
		}
		if l.goneWithin(gone, r.wait) {
			return nil
		}
	}
	l.logf("the VM does not end by itself: it is killed")
	return nil
}

// goneWithin waits for the VMM's end, and reads the gate's messages meanwhile.
func (l *life) goneWithin(gone <-chan struct{}, wait time.Duration) bool {
	limit := after(wait)
	for {
		select {
		case <-gone:
			return true
		case <-limit:
			return false
		case m, ok := <-l.gate.messages:
			if !ok {
				l.gate.messages = nil
				continue
			}
			l.heed(m)
		}
	}
}

// awaitMessage waits during the start for the gate to say want.
func (l *life) awaitMessage(ctx context.Context, want gate.Kind, limit time.Duration) error {
	gone, lost := exited(l.instance), l.lostShare()
	for timer := after(limit); ; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer:
			return coded(ExitTimeout, fmt.Errorf("not within %s", limit))
		case <-gone:
			return l.endedEarly()
		case err := <-lost:
			if l.endsSoon(gone) {
				return l.endedEarly()
			}
			return errors.Join(errors.New("the server of a share ended"), err)
		case <-l.gate.ended:
			return fmt.Errorf("the gate ended: %w; see %s", l.gate.why(), l.paths.Log+"/gate.log")
		case m, ok := <-l.gate.messages:
			if !ok {
				l.gate.messages = nil
				continue
			}
			if m.Kind == want {
				return nil
			}
			if m.Kind == gate.Progress {
				l.note(l.Status().Step, "%s", m.Detail)
			}
			l.heed(m)
		}
	}
}
