package host

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
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

// happening is what ended a wait.
type happening int

const (
	asked     happening = iota + 1 // the context ended
	late                           // the limit is over
	vmmGone                        // the VMM ended
	shareGone                      // a virtiofsd ended, and the VMM did not with it
	gateGone                       // the gate ended
	told                           // until was told what it waits for
)

// watch is what a wait heeds beside the gate's messages.
type watch struct {
	vmm   bool                    // the VMM's end
	parts bool                    // those of gate and virtiofsd
	asks  bool                    // requests are done: the VM is ready
	limit time.Duration           // 0: none
	until func(gate.Message) bool // nil: no message ends the wait
}

// wait takes note of what the gate says until something of w happens. An error
// explains the end of a virtiofsd.
func (l *life) wait(ctx context.Context, w watch) (happening, error) {
	if l.gone == nil {
		l.gone, l.lost = exited(l.instance), l.lostShare()
	}
	var gone, gateEnded <-chan struct{}
	var lost <-chan error
	var limit <-chan time.Time
	var requests <-chan request
	if w.vmm {
		gone = l.gone
	}
	if w.parts {
		lost, gateEnded = l.lost, l.gate.ended
	}
	if w.asks {
		requests = l.requests
	}
	if w.limit > 0 {
		limit = after(w.limit)
	}
	for {
		select {
		case <-ctx.Done():
			return asked, nil
		case <-limit:
			return late, nil
		case <-gone:
			return vmmGone, nil
		case err := <-lost:
			l.over()
			// virtiofsd ends when its client does: only then it is no fault.
			if l.endsBy(err) {
				return vmmGone, nil
			}
			return shareGone, err
		case r := <-requests:
			r.done <- r.do(l)
		case <-gateEnded:
			return gateGone, nil
		case m, ok := <-l.gate.messages:
			if !ok {
				l.gate.messages = nil
				continue
			}
			l.heed(m)
			if w.until != nil && w.until(m) {
				return told, nil
			}
		}
	}
}

// endTogether is how far apart the ends of a VMM and its virtiofsd may be seen.
const endTogether = 2 * time.Second

// endsBy says whether the VMM ended as well, and a virtiofsd that ended with err
// only followed it. One that was killed, or broke, may take the VMM along.
func (l *life) endsBy(err error) bool {
	select {
	case <-l.gone:
		broke := new(exec.ExitError)
		return !errors.As(err, &broke) || l.instance.Wait().Reason != vmm.ExitFailed
	case <-after(endTogether):
		return false
	}
}

// awaitEnd waits for whatever ends a VM that is ready, and says how it ended.
func (l *life) awaitEnd(ctx context.Context) (EndKind, error) {
	what, err := l.wait(ctx, watch{vmm: true, parts: true, asks: true, until: func(m gate.Message) bool {
		return m.Kind == gate.Lost && l.restartsSick()
	}})
	l.over()
	switch what {
	case told:
		// Its disks may still be finished: the power button is not the agent's.
		return EndAgent, errors.Join(fmt.Errorf("VM %s: the guest's agent does not answer any more: %s", l.name, l.Status().Lost), l.shutDown(0))
	case asked:
		return EndByOwner, nil
	case vmmGone:
		return l.howItEnded()
	}
	err = l.partGone(what, err)
	return kindOf(err), fmt.Errorf("VM %s: %w", l.name, err)
}

// partGone is the error of a part without which the guest can't go on.
func (l *life) partGone(what happening, err error) error {
	if what == shareGone {
		return ended(EndShare, fmt.Errorf("the server of a share ended, and the guest cannot go on without: %w", err))
	}
	return ended(EndGate, fmt.Errorf("the gate ended: %w; see %s", l.gate.why(), l.paths.Log+"/gate.log"))
}

// heed takes note of what the gate tells of a running guest.
func (l *life) heed(m gate.Message) {
	switch m.Kind {
	case gate.WorkloadEnded:
		l.workload = &m
		l.guestf("the workload ended: %s", m.Detail)
		l.update(func(st *Status) {
			st.Workload, st.Since, st.Check = m.Detail, time.Time{}, nil
			if m.Again {
				st.Restarts++
				st.Faults = addFault(st.Faults, Fault{time.Now().UTC(), workloadEnd(m), "the workload ended: " + m.Detail})
			}
		})
	case gate.Ending:
		l.announced = &m
		l.guestf("the guest ends: %s %s", m.Kind, m.Detail)
	case gate.Lost:
		if l.Status().State == Stopping {
			break // the agent ends with its guest, as was asked for
		}
		l.guestf("the guest's agent does not answer any more: %s", m.Detail)
		l.update(func(st *Status) { st.Lost = m.Detail })
	case gate.Progress:
		l.guestf("guest: %s", m.Detail)
	case gate.Answers:
		l.hear(time.Now())
	case gate.ClockSet:
		l.heedClock(m)
	case gate.Ready:
		l.update(func(st *Status) { st.Since = time.Now().UTC() })
	case gate.Checked:
		l.heedHealth(m)
	case gate.Connected:
		l.met = true
	default:
		l.guestf("the gate said what is not understood: %q", m.Kind)
	}
}

// workloadEnd is the kind of an end of the workload.
func workloadEnd(m gate.Message) EndKind {
	switch m.Cause {
	case gate.CauseMemory:
		return EndOutOfMemory
	case gate.CauseHealth:
		return EndUnhealthy
	}
	return EndWorkload
}

// howItEnded explains the end of a VMM that nobody asked to end.
func (l *life) howItEnded() (EndKind, error) {
	l.drain()
	exit := l.instance.Wait()
	kind := exitKind(exit)
	switch {
	case kind == EndPowerOff && l.announced != nil && l.announced.Detail == gate.EndWorkload:
		return l.workloadIsOver()
	case kind.byGuest():
		return kind, nil
	}
	return kind, fmt.Errorf("VM %s: %s; clawvm logs --console %s shows the end of its console", l.name, exit, l.name)
}

// exitKind is the kind of a VMM's end.
func exitKind(x vmm.Exit) EndKind {
	switch x.Reason {
	case vmm.ExitRebooted:
		return EndReboot
	case vmm.ExitPoweredOff:
		return EndPowerOff
	case vmm.ExitPanicked:
		return EndPanic
	case vmm.ExitKilled:
		return EndVMMKilled
	}
	return EndVMM
}

// workloadIsOver explains the end of a guest whose workload ended for good.
func (l *life) workloadIsOver() (EndKind, error) {
	kind, how := EndWorkload, fmt.Sprintf("exit code %d", l.announced.Code)
	if l.workload != nil {
		kind, how = workloadEnd(*l.workload), l.workload.Detail
	}
	if l.announced.Code == 0 {
		l.logf("the workload ended: %s", how)
		return kind, nil
	}
	return kind, coded(l.announced.Code, fmt.Errorf("VM %s: the workload ended: %s; clawvm logs %s shows what it said", l.name, how, l.name))
}

// endedEarly explains the end of a VMM before its guest was ready.
func (l *life) endedEarly() error {
	l.drain()
	if l.announced != nil {
		switch l.announced.Detail {
		case gate.EndWorkload:
			kind, how := EndWorkload, fmt.Sprintf("exit code %d", l.announced.Code)
			if l.workload != nil {
				kind, how = workloadEnd(*l.workload), l.workload.Detail
			}
			return ended(kind, coded(max(l.announced.Code, ExitFailed), fmt.Errorf("the workload ended before it was ready: %s", how)))
		case gate.EndFailed:
			return ended(EndGuestSetup, errors.New("the guest could not be set up; the end of its console says why"))
		}
	}
	exit := l.instance.Wait()
	return ended(exitKind(exit), fmt.Errorf("the VM ended before it was ready: %s", exit))
}

// drain reads what the gate said before the VMM's end was seen.
func (l *life) drain() {
	l.wait(context.Background(), watch{limit: drainWait})
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
	if !l.met {
		grace = 0 // nobody is there who could be asked: the power button is all that a guest which boots may heed
	}
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
		if what, _ := l.wait(context.Background(), watch{vmm: true, limit: r.wait}); what == vmmGone {
			return nil
		}
	}
	l.logf("the VM does not end by itself: it is killed")
	return nil
}

// awaitMessage waits during the start for the gate to say want.
func (l *life) awaitMessage(ctx context.Context, want gate.Kind, limit time.Duration) error {
	what, err := l.wait(ctx, watch{vmm: true, parts: true, limit: limit, until: func(m gate.Message) bool {
		switch m.Kind {
		case gate.Progress:
			l.journal.add(Progress{Step: l.Status().Step, State: StepNote, Text: m.Detail})
		case gate.WorkloadEnded:
			l.journal.add(Progress{Step: l.Status().Step, State: StepNote, Text: "the workload ended: " + m.Detail})
		}
		return m.Kind == want
	}})
	switch what {
	case asked:
		return context.Cause(ctx)
	case told:
		return nil
	case vmmGone:
		return l.endedEarly()
	case late:
		err := fmt.Errorf("not within %s", limit)
		if st := l.Status(); st.Workload != "" {
			err = fmt.Errorf("%w; the workload was started again %d times, and ended last: %s", err, st.Restarts, st.Workload)
		}
		return coded(ExitTimeout, err)
	}
	return l.partGone(what, err)
}
