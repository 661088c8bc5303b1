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
	"github.com/clawvm/clawvm/network"
)

// Entry is a line of `clawvm ls`.
type Entry struct {
	Status
	// Health is "ready" once the workload answered, "starting" before that,
	// "unreachable" when the guest's agent is not heard of any more, and empty for
	// a VM that is down.
	Health string `json:"health,omitempty"`
	// End is how the VM ended last; of one that is down.
	End *End `json:"end,omitempty"`
	// Problem is why the declaration can't be used.
	Problem string `json:"problem,omitempty"`
	// Declared: false for a VM that runs although its declaration is gone.
	Declared bool `json:"declared"`
}

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
	for _, n := range running {
		if !all[n] {
			if held, err := locked(l.VM(n).Lock()); err == nil && held {
				list = append(list, n)
			}
		}
	}
	hostConfig, hostErr := config.LoadHost(l.HostConfig())
	entries := make([]Entry, len(list))
	slots := make(chan struct{}, listParallel)
	var wg sync.WaitGroup
	for i, name := range list {
		slots <- struct{}{}
		wg.Go(func() {
			entries[i] = look(ctx, l, name, hostConfig, hostErr)
			entries[i].Declared = all[name]
			<-slots
		})
	}
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
	e := look(ctx, l, name, hostConfig, hostErr)
	e.Declared = err == nil
	return e, nil
}

func look(ctx context.Context, l Layout, name string, hostConfig *config.Host, hostErr error) Entry {
	paths := l.VM(name)
	st, err := l.Dial(name).Status(ctx)
	if err == nil {
		e := Entry{Status: st}
		switch {
		case st.State == Running && st.Lost != "":
			e.Health = "unreachable"
		case st.State == Running:
			e.Health = "ready"
		case st.State == Starting:
			e.Health = "starting"
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
			e.State = Failed
		}
	}
	if hostErr != nil {
		e.Problem = hostErr.Error()
		return e
	}
	file, err := l.Declaration(name)
	if err != nil {
		return e
	}
	vm, err := config.Load(file, hostConfig)
	if err != nil {
		e.Problem = err.Error()
		return e
	}
	e.VMM, e.VCPUs, e.Memory = vm.VMM, vm.VCPUs, int64(vm.Memory)
	for _, p := range vm.Ports {
		e.Ports = append(e.Ports, portText(p))
	}
	if vm.Address.IsValid() {
		e.Address = vm.Address.String()
	} else if a, ok, err := (network.Leases{Dir: l.Leases(), Subnet: hostConfig.Address}).Lookup(name); err == nil && ok {
		e.Address = a.String()
	}
	return e
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
	if e.State == Stopped || e.State == Failed || e.Started.IsZero() {
		return 0
	}
	return time.Since(e.Started)
}
