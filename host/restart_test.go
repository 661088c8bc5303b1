package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/vmm"
)

var noon = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)

func TestWhatIsStartedAgain(t *testing.T) {
	const ( // no, on-failure, always: n no, y yes
		never    = "nnn"
		faulty   = "nyy"
		always   = "nny"
		whatever = "yyy"
	)
	for kind, want := range map[EndKind]string{
		EndByOwner: never, EndDeclaration: never, EndWorkload: never, EndOutOfMemory: never, EndUnhealthy: never,
		EndPowerOff: always, EndReboot: whatever,
		EndPanic: faulty, EndGuestSetup: faulty, EndAgent: faulty, EndVMM: faulty, EndVMMKilled: faulty, EndShare: faulty,
		EndGate: faulty, EndNotReady: faulty, EndHost: faulty,
	} {
		for i, policy := range []string{config.RestartNo, config.RestartOnFailure, config.RestartAlways} {
			r := revival{lived: true}
			got := r.after(policy, End{Time: noon, Kind: kind, Code: 1}, goodLife)
			if got.again != (want[i] == 'y') || got.loop {
				t.Errorf("%s with restart: %s: %+v", kind, policy, got)
			}
		}
	}
}

func TestAStartThatNeverWorkedIsNotTriedAgain(t *testing.T) {
	for _, kind := range []EndKind{EndHost, EndNotReady, EndVMM, EndPanic, EndPowerOff} {
		var r revival
		if got := r.after(config.RestartAlways, End{Time: noon, Kind: kind, Code: 1}, 0); got != (decision{}) {
			t.Errorf("%s: %+v", kind, got)
		}
	}
}

func TestPausesDoubleAndAGoodLifeEndsTheRow(t *testing.T) {
	r := revival{lived: true}
	now := noon
	fault := func(ready time.Duration) decision {
		now = now.Add(5 * time.Minute) // so that the limit stays out of it
		return r.after(config.RestartOnFailure, End{Time: now, Kind: EndVMM, Code: 1}, ready)
	}
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		if got := fault(time.Second); !got.again || got.pause != want*time.Second {
			t.Errorf("fault %d: %+v, want a pause of %d s", i+1, got, want)
		}
	}
	if got := fault(goodLife); got.pause != time.Second {
		t.Errorf("after a good life: %+v, want a pause of 1 s", got)
	}
	if got := r.after(config.RestartOnFailure, End{Time: now, Kind: EndReboot}, goodLife); !got.again || got.pause != 0 {
		t.Errorf("a reboot: %+v, want a start at once", got)
	}
}

func TestTheStartLimit(t *testing.T) {
	r := revival{lived: true}
	now := noon
	for i := range startLimit - 1 {
		now = now.Add(time.Minute)
		if got := r.after(config.RestartAlways, End{Time: now, Kind: EndPanic, Code: 1}, time.Second); !got.again {
			t.Fatalf("fault %d: %+v", i+1, got)
		}
	}
	// The first of them is out of the window by then.
	late := r
	if got := late.after(config.RestartAlways, End{Time: noon.Add(time.Minute + faultWindow), Kind: EndPanic, Code: 1}, time.Second); !got.again {
		t.Errorf("%d faults in more than %s: %+v", startLimit, faultWindow, got)
	}
	if got := r.after(config.RestartAlways, End{Time: now.Add(time.Second), Kind: EndPanic, Code: 1}, time.Second); got.again || !got.loop {
		t.Errorf("%d faults within %s: %+v, want the end", startLimit, faultWindow, got)
	}
}

func TestAGuestThatRebootsAtOnceIsSlowedDown(t *testing.T) {
	reboot := End{Time: noon, Kind: EndReboot}
	r := revival{}
	if got := r.after(config.RestartNo, reboot, 0); !got.again || got.pause != time.Second {
		t.Errorf("before it was ready: %+v", got)
	}
	r.after(config.RestartNo, reboot, 0)
	if got := r.after(config.RestartNo, reboot, 0); !got.loop {
		t.Errorf("the third time, never ready: %+v, want the end", got)
	}
}

func TestACrashLoopIsOneUntilItHasBeenReadyForAWhile(t *testing.T) {
	var faults []Fault
	for i := range loopFaults {
		if crashLoop(faults, time.Time{}, noon) {
			t.Errorf("%d faults are a crash loop", i)
		}
		faults = addFault(faults, Fault{noon, EndPanic, "x"})
	}
	for _, c := range []struct {
		since, now time.Time
		want       bool
	}{
		{time.Time{}, noon, true},
		{noon, noon.Add(goodLife - 1), true},
		{noon, noon.Add(goodLife), false},
		{time.Time{}, noon.Add(faultWindow), false},
	} {
		if got := crashLoop(faults, c.since, c.now); got != c.want {
			t.Errorf("ready since %s, at %s: %t", c.since, c.now, got)
		}
	}
	for range 3 * faultsKept {
		faults = addFault(faults, Fault{noon, EndPanic, "x"})
	}
	if len(faults) != faultsKept {
		t.Errorf("%d faults are kept, want %d", len(faults), faultsKept)
	}
}

func TestKindOfAnError(t *testing.T) {
	for want, err := range map[EndKind]error{
		EndByOwner:     nil,
		EndGate:        fmt.Errorf("VM x: %w", ended(EndGate, errors.New("gone"))),
		EndWorkload:    cannotStart("x", stepError{"ready", ended(EndWorkload, coded(78, errors.New("its own 78")))}),
		EndDeclaration: cannotStart("x", stepError{"declaration", coded(ExitDeclaration, errors.New("wrong"))}),
		EndNotReady:    cannotStart("x", stepError{"ready", coded(ExitTimeout, errors.New("late"))}),
		EndHost:        cannotStart("x", stepError{"disks", errors.New("no space left on device")}),
	} {
		if got := kindOf(err); got != want {
			t.Errorf("%v is %s, want %s", err, got, want)
		}
	}
	for reason, want := range map[vmm.ExitReason]EndKind{
		vmm.ExitPoweredOff: EndPowerOff, vmm.ExitRebooted: EndReboot, vmm.ExitPanicked: EndPanic, vmm.ExitKilled: EndVMMKilled, vmm.ExitFailed: EndVMM,
	} {
		if got := exitKind(vmm.Exit{Reason: reason}); got != want {
			t.Errorf("%s is %s, want %s", reason, got, want)
		}
	}
}

func restingSupervisor(t *testing.T) (*Supervisor, *bytes.Buffer) {
	t.Helper()
	var said bytes.Buffer
	return &Supervisor{name: "x", journal: newJournal(), log: log.New(&said, "", 0), down: make(chan time.Duration, 1), wake: make(chan struct{}, 1),
		status: Status{State: Running, Ready: noon, Since: noon, Lost: "x"}}, &said
}

func TestDownEndsTheWaitForTheNextLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, said := restingSupervisor(t)
		e := End{Time: time.Now(), Kind: EndVMMKilled, Code: 1, Reason: "the VMM was killed", Faults: []Fault{{noon, EndVMMKilled, "the VMM was killed"}}}
		again := make(chan bool)
		began := time.Now()
		go func() { again <- s.rest(t.Context(), e, 8*time.Second) }()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		st := s.Status()
		if st.State != Restarting || st.VMRestarts != 1 || !st.Ready.IsZero() || st.Lost != "" || st.Previous == nil || st.Previous.Kind != EndVMMKilled || len(st.Faults) != 1 {
			t.Errorf("while it waits: %+v", st)
		}
		if left := time.Until(st.Again); left != 5*time.Second {
			t.Errorf("starts again in %s, want 5 s", left)
		}
		if events, _, _ := s.journal.from(0); len(events) != 1 || !strings.Contains(events[0].Text, "in 8 s, after: the VMM was killed") {
			t.Errorf("who follows is told %v", events)
		}
		s.requestDown(time.Second)
		if <-again {
			t.Error("a VM that was taken down is started again")
		}
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("down during the wait took until %s after its begin, want at once", took)
		}
		if !strings.Contains(said.String(), "starting again in 8 s") {
			t.Errorf("the log says %q", said)
		}
	})
}

func TestUpEndsTheWaitForTheNextLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := restingSupervisor(t)
		s.startNow() // of a VM that doesn't wait: nothing comes of it
		again := make(chan bool)
		began := time.Now()
		go func() { again <- s.rest(t.Context(), End{Time: began, Kind: EndPanic, Code: 1}, time.Minute) }()
		time.Sleep(2 * time.Second)
		s.startNow()
		if !<-again {
			t.Error("it is not started")
		}
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("started after %s, want 2 s", took)
		}
	})
}

func TestTheNextLifeBeginsAfterThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := restingSupervisor(t)
		began := time.Now()
		if !s.rest(t.Context(), End{Time: began, Kind: EndReboot}, 4*time.Second) {
			t.Error("no next life")
		}
		if took := time.Since(began); took != 4*time.Second {
			t.Errorf("after %s, want 4 s", took)
		}
		if st := s.Status(); st.State != Starting || st.Reboots != 1 || st.VMRestarts != 0 || !st.Again.IsZero() {
			t.Errorf("then: %+v", st)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if s.rest(ctx, End{Time: time.Now(), Kind: EndPanic}, time.Hour) {
			t.Error("SIGTERM during the wait starts the next life")
		}
	})
}

func TestHealthOfARunningVM(t *testing.T) {
	for want, st := range map[string]Status{
		HealthReady:       {State: Running, Since: noon},
		HealthUnreachable: {State: Running, Since: noon, Lost: "its connection ended"},
		HealthRestarting:  {State: Running, Workload: "exit code 3"},
		HealthStarting:    {State: Starting},
		"":                {State: Stopping},
		HealthCrashLoop:   {State: Starting, Faults: []Fault{{noon, EndPanic, "x"}, {noon, EndPanic, "x"}, {noon, EndWorkload, "the workload ended: exit code 1"}}},
	} {
		got, why := st.health(noon.Add(time.Second))
		if got != want {
			t.Errorf("%+v is %q, want %q", st, got, want)
		}
		if want == HealthCrashLoop && why != "3 failures within 10 min; the last: the workload ended: exit code 1" {
			t.Errorf("why: %q", why)
		}
	}
}

func TestEndsOfOlderVersionsAreRead(t *testing.T) {
	file := filepath.Join(t.TempDir(), "last-end.json")
	if err := os.WriteFile(file, []byte(`{"time":"2026-01-01T12:00:00Z","reason":"VM x: the gate ended","code":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := readEnd(file)
	if err != nil || !e.Failed() || e.Kind != "" || !strings.HasSuffix(e.String(), "exit code 1: VM x: the gate ended") {
		t.Errorf("%v, %v", e, err)
	}
	if err := writeEnd(file, End{Time: noon, Kind: EndPanic, Code: 1, Reason: "r", CrashLoop: true, Faults: []Fault{{noon, EndPanic, "r"}}}); err != nil {
		t.Fatal(err)
	}
	if e, err = readEnd(file); err != nil || e.Kind != EndPanic || !e.CrashLoop || len(e.Faults) != 1 {
		t.Errorf("%+v, %v", e, err)
	}
}
