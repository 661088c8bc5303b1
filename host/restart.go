package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/clawvm/clawvm/config"
)

// When a VM that failed is started again. The pauses are those of the guest's
// init for its workload (guest/boot), and docker's; the limit is systemd's
// StartLimitBurst, over a longer time, since the pauses alone take minutes.
const (
	firstPause   = time.Second      // doubled for each further fault
	longestPause = time.Minute      // reached with the seventh
	goodLife     = time.Minute      // ready for so long, a VM starts with the first pause again
	quickEnd     = 10 * time.Second // a reboot or power-off so soon after ready is counted as a fault
	faultWindow  = 10 * time.Minute // faults longer ago don't count
	loopFaults   = 3                // so many within the window are shown as a crash loop
	startLimit   = 10               // so many within the window, and the VM is not started any more
	faultsKept   = startLimit       // of the VM and its workload together
)

// Fault is an end of the VM or of its workload that was not asked for.
type Fault struct {
	Time   time.Time `json:"time"`
	Kind   EndKind   `json:"kind"`
	Reason string    `json:"reason"`
}

// String is the fault in one line: when, the kind, why.
func (f Fault) String() string {
	return fmt.Sprintf("%s %s: %s", f.Time.Local().Format(time.DateTime), f.Kind, f.Reason)
}

// addFault adds f to the faults that are kept, in a slice of its own.
func addFault(faults []Fault, f Fault) []Fault {
	return append(slices.Clone(faults[max(0, len(faults)-faultsKept+1):]), f)
}

// recent counts the faults within the window before now. A clock that was set
// back makes none of them older.
func recent(faults []Fault, now time.Time) (n int) {
	for _, f := range faults {
		if now.Sub(f.Time) < faultWindow {
			n++
		}
	}
	return n
}

// crashLoop says whether a VM fails again and again, its workload included; since
// is since when it is ready without a break, or zero.
func crashLoop(faults []Fault, since, now time.Time) bool {
	if !since.IsZero() && now.Sub(since) >= goodLife {
		return false
	}
	return recent(faults, now) >= loopFaults
}

// revival decides whether and when the next life of a VM begins.
type revival struct {
	faults []Fault // of the VM, the last ones
	row    int     // faults since the last life that was good
	lived  bool    // the VM was ready once: before that, a start that fails is its owner's to see
}

// decision is what follows the end of a life.
type decision struct {
	again bool
	pause time.Duration // before the next life
	loop  bool          // not again, because the limit is reached
}

// after decides what follows the end e of a life which was ready for the time
// ready; 0 means never.
func (r *revival) after(policy string, e End, ready time.Duration) decision {
	r.lived = r.lived || ready > 0
	if ready >= goodLife {
		r.row = 0
	}
	if e.fault() || e.Kind.byGuest() && ready < quickEnd {
		r.row++
		r.faults = addFault(r.faults, Fault{e.Time, e.Kind, e.why()})
	}
	switch {
	case !startsAgain(policy, e, r.lived):
		return decision{}
	case e.Kind.byGuest() && ready >= quickEnd:
		return decision{again: true}
	case recent(r.faults, e.Time) >= r.limit():
		return decision{loop: true}
	}
	return decision{again: true, pause: pauseAfter(r.row)}
}

// limit is the start limit: a guest that reboots before it was ever ready is one
// that can't start, and who waits for it is to hear so soon.
func (r *revival) limit() int {
	if !r.lived {
		return loopFaults
	}
	return startLimit
}

// byGuest says whether the guest ended the VM in order.
func (k EndKind) byGuest() bool { return k == EndReboot || k == EndPowerOff }

// fault says whether the end is one that was not asked for, by owner or guest.
func (e *End) fault() bool {
	return e.Kind != EndByOwner && !e.Kind.byGuest() && (e.Kind != EndWorkload || e.Code != 0)
}

// why is the end in words.
func (e *End) why() string {
	switch {
	case e.Reason != "":
		return e.Reason
	case e.Kind == EndPowerOff:
		return "the guest powered off"
	case e.Kind == EndReboot:
		return "the guest rebooted"
	}
	return "as asked"
}

// startsAgain is the restart policy for the VM. The workload's own end is decided
// upon in the guest, by the same policy.
func startsAgain(policy string, e End, lived bool) bool {
	switch e.Kind {
	case EndByOwner, EndDeclaration, EndWorkload, EndOutOfMemory, EndUnhealthy:
		return false
	case EndReboot:
		return true // what the guest asked for is not a failure
	case EndPowerOff:
		return lived && policy == config.RestartAlways
	}
	return lived && policy != config.RestartNo
}

// pauseAfter is the pause after so many faults in a row.
func pauseAfter(row int) time.Duration {
	if row <= 0 {
		return 0
	}
	if row > 6 { // 2⁶ s are more than the longest
		return longestPause
	}
	return firstPause << (row - 1)
}

// endError is an error that ends a life, with its kind.
type endError struct {
	kind EndKind
	err  error
}

func (e *endError) Error() string { return e.err.Error() }
func (e *endError) Unwrap() error { return e.err }

// ended gives err a kind, unless it has one.
func ended(kind EndKind, err error) error {
	var have *endError
	if err == nil || errors.As(err, &have) {
		return err
	}
	return &endError{kind, err}
}

// kindOf is the kind of an error that ended a life.
func kindOf(err error) EndKind {
	var e *endError
	switch {
	case err == nil:
		return EndByOwner
	case errors.As(err, &e):
		return e.kind
	}
	switch ExitCode(err) {
	case ExitDeclaration, ExitNoSuchVM:
		return EndDeclaration
	case ExitTimeout:
		return EndNotReady
	}
	return EndHost
}

// lives runs the VM, and again each time that its guest reboots, and after a
// fault as its `restart:` says: always with a new VMM, new virtiofsd and a new
// gate, since a VMM that resets in place would wait for daemons that are gone.
func (s *Supervisor) lives(ctx context.Context) (End, error) {
	var r revival
	policy := config.RestartNo
	for {
		l := &life{Supervisor: s, clockSet: make(chan struct{}, 1)}
		s.setLife(l)
		kind, err := l.live(ctx)
		err = l.explainEnd(err)
		s.setLife(nil)
		if l.vm != nil {
			policy = l.vm.Restart
		}
		if undoErr := l.undo.unwind(); undoErr != nil {
			err = errors.Join(err, leftError{fmt.Errorf("VM %s ended, but %w; clawvm gc cleans up", s.name, undoErr)})
			// One that its owner ended stays down, whatever is left of it.
			if kind.byGuest() {
				kind = EndHost
			}
		}
		now := time.Now()
		e := End{Time: now.UTC(), Started: s.Status().Started, Kind: kind, Code: ExitCode(err), Left: errors.As(err, new(leftError))}
		if err != nil {
			e.Reason = err.Error()
		}
		var ready time.Duration
		if st := s.Status(); !st.Ready.IsZero() {
			ready = max(now.Sub(st.Ready), 1)
		}
		d := r.after(policy, e, ready)
		if d.loop {
			err = &CodedError{ExitCrashLoop, fmt.Errorf("VM %s failed %d times within %s and is not started any more; clawvm up %s tries again; the last time: %s",
				s.name, recent(r.faults, now), inWords(faultWindow), s.name, e.why())}
			e.Code, e.Reason, e.CrashLoop = ExitCrashLoop, err.Error(), true
		}
		st := s.Status()
		if e.fault() || e.CrashLoop {
			st.Faults = addFault(st.Faults, Fault{e.Time, e.Kind, e.why()})
		}
		e.Faults = st.Faults
		if !d.again {
			s.tellSystemd("STOPPING=1")
			return e, err
		}
		s.logf("this life ended: %s: %s", e.Kind, e.why())
		if err := writeEnd(s.paths.LastEnd(), e); err != nil {
			s.logf("%v", err)
		}
		if !s.rest(ctx, e, d.pause) {
			return End{Time: time.Now().UTC(), Started: e.Started, Kind: EndByOwner, Faults: e.Faults}, nil
		}
	}
}

func (s *Supervisor) setLife(l *life) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life = l
}

// rest waits for the pause before the next life, and says whether there is to be
// one: its owner can end the VM meanwhile.
func (s *Supervisor) rest(ctx context.Context, e End, pause time.Duration) bool {
	s.journal.restart()
	text := "starting again"
	if pause > 0 {
		text += " in " + inWords(pause)
	}
	text += ", after: " + e.why()
	s.logf("%s", text)
	s.journal.add(Progress{Step: restartStep, State: StepNote, Text: text})
	s.update(func(st *Status) {
		*st = st.nextLife(e, pause)
	})
	select {
	case <-s.wake: // of an earlier rest, which was over already
	default:
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-s.down:
		return false
	case <-s.wake:
		s.logf("its owner starts it now")
	case <-timer.C:
	}
	s.update(func(st *Status) { st.State, st.Again = Starting, time.Time{} })
	return true
}

// startNow begins the next life of a VM that waits for it; another it leaves alone.
func (s *Supervisor) startNow() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// restartStep is what notes between two lives are about.
const restartStep = "restart"

// nextLife is the status between a life that ended as e says and the next.
func (st Status) nextLife(e End, pause time.Duration) Status {
	st.State, st.Step, st.Ready, st.Since, st.Lost, st.Check = Restarting, "", time.Time{}, time.Time{}, "", nil
	st.Again = e.Time.Add(pause)
	if e.Kind == EndReboot {
		st.Reboots++
	} else {
		st.VMRestarts++
	}
	st.Faults, e.Faults = e.Faults, nil
	st.Previous = &e
	return st
}

// inWords is a duration as a person writes it: 10 min and not 10m0s.
func inWords(d time.Duration) string {
	if d >= time.Minute && d%time.Minute == 0 {
		return fmt.Sprintf("%d min", d/time.Minute)
	}
	return fmt.Sprintf("%g s", d.Seconds())
}
