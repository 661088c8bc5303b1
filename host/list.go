package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/clawvm/clawvm/config"
)

// Entry is a line of `clawvm ls`.
type Entry struct {
	Status
	// Health is one of the Health constants; empty for a VM that is down in order.
	Health string `json:"health,omitempty"`
	// Why is the reason of a state or health that is not as wished, in one line.
	Why string `json:"why,omitempty"`
	// End is how the VM ended last; of one that is down.
	End *End `json:"end,omitempty"`
	// Problem is why the declaration can't be used.
	Problem string `json:"problem,omitempty"`
	// Pending is what the VM's next start would change, of one that runs.
	Pending []Pending `json:"pending,omitempty"`
	// Declared: false for a VM that runs although its declaration is gone.
	Declared bool `json:"declared"`
	// Enabled: systemd brings it up at boot.
	Enabled bool `json:"enabled"`
}

// What Entry.Health says.
const (
	HealthStarting    = "starting"    // the workload has not answered yet
	HealthReady       = "ready"       // it has answered
	HealthHealthy     = "healthy"     // its health check passes
	HealthUnhealthy   = "unhealthy"   // its health check fails
	HealthRestarting  = "restarting"  // it ended, and is started again
	HealthUnreachable = "unreachable" // the guest's agent is not heard of any more
	HealthCrashLoop   = "crash-loop"  // VM or workload ends again and again
)

// health is the health of a VM that has a supervisor, and its reason.
func (st Status) health(now time.Time) (health, why string) {
	if crashLoop(st.Faults, st.Since, now) {
		return HealthCrashLoop, loopReason(st.Faults, now)
	}
	switch st.State {
	case Restarting:
		if st.Previous != nil {
			why = "after: " + st.Previous.why()
		}
		return HealthRestarting, why
	case Starting:
		return HealthStarting, ""
	case Running:
		switch {
		case st.Lost != "":
			return HealthUnreachable, "the guest's agent does not answer: " + st.Lost
		case st.Since.IsZero():
			return HealthRestarting, "the workload ended: " + st.Workload
		case st.Check != nil && st.Check.Unhealthy:
			return HealthUnhealthy, st.Check.String()
		case st.Check != nil:
			return HealthHealthy, ""
		}
		return HealthReady, ""
	}
	return "", ""
}

// loopReason is why a VM is in a crash loop.
func loopReason(faults []Fault, now time.Time) string {
	return fmt.Sprintf("%d failures within %s; the last: %s", recent(faults, now), inWords(faultWindow), faults[len(faults)-1].Reason)
}

// Idle says whether the VM is down in order, and nothing is wrong with it.
func (e Entry) Idle() bool { return e.State == Stopped && e.Problem == "" }

// listParallel is how many supervisors are asked at once.
const listParallel = 16

// List tells of every VM that is declared or runs, by name.
func List(ctx context.Context, l Layout) ([]Entry, error) {
	declared, err := l.Declared()
	if err != nil {
		return nil, err
	}
	all := make(map[string]bool, len(declared))
	for _, n := range declared {
		all[n] = true
	}
	running, err := l.withRunDir()
	if err != nil {
		return nil, err
	}
	list := append([]string(nil), declared...)
	mayRun := make(map[string]bool, len(running))
	for _, n := range running {
		mayRun[n] = true
		if !all[n] {
			if held, err := locked(l.VM(n).Lock()); err == nil && held {
				list = append(list, n)
			}
		}
	}
	hostConfig, hostErr := config.LoadHost(l.HostConfig())
	enabled := enabledVMs(l)
	entries := make([]Entry, len(list))
	next := newOutlook(l)
	// A worker for many VMs, and not one for each: reading YAML goes deep, and each
	// would grow a stack of its own for it.
	work := make(chan int)
	var wg sync.WaitGroup
	for range min(listParallel, len(list)) {
		wg.Go(func() {
			for i := range work {
				name := list[i]
				entries[i] = look(ctx, l, name, mayRun[name], hostConfig, hostErr, next)
				entries[i].Declared, entries[i].Enabled = all[name], enabled[name]
			}
		})
	}
	for i := range list {
		work <- i
	}
	close(work)
	wg.Wait()
	return entries, nil
}

// Look tells of one VM.
func Look(ctx context.Context, l Layout, name string) (Entry, error) {
	_, err := l.Declaration(name)
	var missing *NotDeclaredError
	if err != nil && !errors.As(err, &missing) {
		return Entry{}, err
	}
	held, lockErr := locked(l.VM(name).Lock())
	if err != nil && (lockErr != nil || !held) {
		return Entry{}, err
	}
	hostConfig, hostErr := config.LoadHost(l.HostConfig())
	e := look(ctx, l, name, true, hostConfig, hostErr, newOutlook(l))
	e.Declared, e.Enabled = err == nil, enabledVMs(l)[name]
	return e, nil
}

// look tells of one VM; mayRun: it has a run directory, without which there is no
// supervisor to ask.
func look(ctx context.Context, l Layout, name string, mayRun bool, hostConfig *config.Host, hostErr error, next *outlook) Entry {
	paths := l.VM(name)
	var st Status
	err := error(ErrNotRunning)
	if mayRun {
		st, err = l.Dial(name).Status(ctx)
	}
	if err == nil {
		e := Entry{Status: st}
		e.Health, e.Why = st.health(time.Now())
		if vm, err := l.effective(name, hostConfig, hostErr); err != nil {
			e.Problem = err.Error()
		} else if vm != nil {
			e.Pending = next.pending(ctx, l.Dial(name), st, vm)
		}
		return e
	}
	e := Entry{Status: Status{Name: name, State: Stopped}}
	if !errors.Is(err, ErrNotRunning) {
		e.Problem = err.Error()
	}
	if end, err := readEnd(paths.LastEnd()); err != nil {
		e.Problem = err.Error()
	} else if end != nil {
		e.End = end
		if end.Failed() {
			e.State, e.Why = Failed, end.why()
		}
		if end.CrashLoop {
			e.Health = HealthCrashLoop
		}
	}
	vm, err := l.effective(name, hostConfig, hostErr)
	if err != nil {
		e.Problem = err.Error()
	}
	if vm == nil {
		return e
	}
	e.VMM, e.VCPUs, e.Memory = vm.VMM, vm.VCPUs, int64(vm.Memory)
	e.Ports = portTexts(vm.Ports)
	if vm.Address.IsValid() {
		e.Address = vm.Address.String()
	} else if a, ok := next.lease(name, hostConfig.Address); ok {
		e.Address = a.String()
	}
	return e
}

// effective is the declaration of a VM as its next start would have it; nil when
// there is none.
func (l Layout) effective(name string, hostConfig *config.Host, hostErr error) (*config.VM, error) {
	if hostErr != nil {
		return nil, hostErr
	}
	file, err := l.Declaration(name)
	if err != nil {
		return nil, nil // Entry.Declared says so
	}
	return config.Load(file, hostConfig)
}

// withRunDir lists the VMs that have a run directory, whether they run or not.
func (l Layout) withRunDir() ([]string, error) {
	entries, err := os.ReadDir(l.RunRoot())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the running VMs: %w", err)
	}
	var list []string
	for _, e := range entries {
		if e.IsDir() && config.ValidName(e.Name()) == nil {
			list = append(list, e.Name())
		}
	}
	return list, nil
}

// Uptime is how long the VM has been up.
func (e Entry) Uptime() time.Duration {
	if e.State == Stopped || e.State == Failed || e.State == Restarting || e.Started.IsZero() {
		return 0
	}
	return time.Since(e.Started)
}
