package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
)

// What VMM and virtiofsd need beside the guest's memory. Measured on a Debian 13
// with KVM, a guest of 512 MiB that has touched all of it, two virtiofsd:
// QEMU 10.0 40 MiB (6 of them the kernel's, for page tables), cloud-hypervisor 53
// 8 MiB, virtiofsd 1 MiB each. The rest is for the pages of disks and images that
// the kernel keeps for them, without which every read waits for a disk.
const (
	overheadBase     = 128 << 20
	overheadShare    = 32 << 20
	overheadShift    = 5       // 1/32 of the guest's memory
	overheadCodeQEMU = 1 << 30 // QEMU's cache of translated code, at most (its tb-size)
)

// overhead is how much memory VMM and the servers of shares may take over the
// guest's own, where the declaration doesn't say.
func overhead(memory int64, shares int, emulated bool) int64 {
	o := int64(overheadBase) + int64(shares)*overheadShare + memory>>overheadShift
	if emulated {
		o += overheadCodeQEMU
	}
	return o
}

// Bounds of the gate, which has 4 MiB and ten threads: what it keeps for a guest
// is bounded by itself, and this holds if it is not.
const (
	gateMemory = 256 << 20
	gateTasks  = 256
)

// cpuPeriod is what cpu.max counts in, in microseconds: the kernel's own default.
const cpuPeriod = 100_000

// cgroupValue is a file of a cgroup and what is written to it.
type cgroupValue struct{ file, value string }

// Limits are those that hold for a VM's processes.
type Limits struct {
	// Cgroup is the VM's own, as in /proc/PID/cgroup.
	Cgroup string `json:"cgroup,omitempty"`
	// None is why no limits apply; then nothing else is set.
	None string `json:"none,omitempty"`

	Memory    int64   `json:"memory,omitempty"`    // bytes, of VMM and virtiofsd together, the guest's own included
	Swap      int64   `json:"swap,omitempty"`      // bytes
	CPUs      float64 `json:"cpus,omitempty"`      // 0: as much as there is
	CPUWeight int     `json:"cpuWeight,omitempty"` // against other VMs
	Tasks     int     `json:"tasks,omitempty"`
}

// limitsOf are a declaration's.
func limitsOf(vm *config.VM, shares int, emulated bool) Limits {
	over := int64(vm.Limits.MemoryOverhead)
	if over == 0 {
		over = overhead(int64(vm.Memory), shares, emulated)
	}
	return Limits{
		Memory: int64(vm.Memory) + over, Swap: int64(vm.Limits.Swap),
		CPUs: float64(vm.Limits.CPUs) / 100, CPUWeight: vm.Limits.CPUWeight, Tasks: vm.Limits.Tasks,
	}
}

// values are what the limits are in the leaf of VMM and virtiofsd. The weight is
// not among them: it counts between VMs, and so on the VM's own cgroup.
func (l Limits) values() []cgroupValue {
	quota := "max"
	if l.CPUs > 0 {
		quota = strconv.FormatInt(int64(l.CPUs*cpuPeriod+0.5), 10)
	}
	return []cgroupValue{
		{"memory.oom.group", "1"}, // a VM without one of its processes is of no use
		{"memory.max", strconv.FormatInt(l.Memory, 10)},
		{"memory.swap.max", strconv.FormatInt(l.Swap, 10)},
		{"cpu.max", quota + " " + strconv.Itoa(cpuPeriod)},
		{"pids.max", strconv.Itoa(l.Tasks)},
	}
}

func gateValues() []cgroupValue {
	return []cgroupValue{
		{"memory.oom.group", "1"},
		{"memory.max", strconv.Itoa(gateMemory)},
		{"memory.swap.max", "0"},
		{"pids.max", strconv.Itoa(gateTasks)},
	}
}

// String is the limits in one line.
func (l Limits) String() string {
	if l.None != "" {
		return "none apply: " + l.None
	}
	words := []string{"memory " + config.Size(l.Memory>>20<<20).String()}
	if l.CPUs > 0 {
		words = append(words, "cpus "+strconv.FormatFloat(l.CPUs, 'f', -1, 64))
	}
	return strings.Join(append(words, fmt.Sprintf("cpu weight %d", l.CPUWeight), fmt.Sprintf("tasks %d", l.Tasks)), ", ")
}

// setLimits makes the cgroups of the gate and of the VM proper, into which they
// are born. Where none can be had it says why, and no limits apply.
func (l *life) setLimits(ctx context.Context) error {
	l.leaves = leaves{}
	limits := limitsOf(l.vm, l.shareCount(), l.emulated)
	err := l.enterCgroup(ctx)
	var none *noLimitsError
	if errors.As(err, &none) {
		l.note("limits", "no limits apply: %s", none.why)
		l.update(func(st *Status) { st.Limits = &Limits{None: none.why} })
		return nil
	}
	if err != nil {
		return err
	}
	base := l.cgroups.base
	l.undo.push("the VM's cgroups", func() error {
		return errors.Join(base.sub(vmLeaf).remove(), base.sub(gateLeaf).remove())
	})
	for _, leaf := range []struct {
		cgroup
		values []cgroupValue
	}{{base.sub(vmLeaf), limits.values()}, {base.sub(gateLeaf), gateValues()}} {
		// Its counters are this start's.
		if err := errors.Join(leaf.remove(), leaf.make()); err != nil {
			return err
		}
		if err := leaf.set(leaf.values); err != nil {
			return err
		}
	}
	if err := l.setWeight(ctx, limits.CPUWeight); err != nil {
		return err
	}
	l.leaves = leaves{vm: base.sub(vmLeaf), gate: base.sub(gateLeaf)}
	limits.Cgroup = base.path()
	l.update(func(st *Status) { st.Limits = &limits })
	return nil
}

// shareCount is how many virtiofsd the VM has.
func (l *life) shareCount() int {
	n := 1 + len(l.vm.Shares) // the image's
	if len(l.secrets) > 0 {
		n++
	}
	return n
}

// leaves are the cgroups that processes are born into; "" where there are none.
type leaves struct{ vm, gate cgroup }

// set writes values. A kernel without swap has no limit for it.
func (g cgroup) set(values []cgroupValue) error {
	for _, v := range values {
		err := g.write(v.file, v.value)
		if errors.Is(err, fs.ErrNotExist) && v.file == "memory.swap.max" {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot set %s of the cgroup %s: %w", v.file, g.path(), Bare(err))
		}
	}
	return nil
}

// spawnGuest starts the VMM or a virtiofsd, in the cgroup that the limits are on.
func (l *life) spawnGuest(cmd *exec.Cmd) error {
	return l.leaves.vm.hold(cmd, func() error { return l.spawner.spawnDispensable(cmd) })
}

// spawnGate starts the gate, in its own.
func (l *life) spawnGate(cmd *exec.Cmd) error {
	return l.leaves.gate.hold(cmd, func() error { return l.spawner.spawn(cmd) })
}

// hold lets start begin cmd's process in the cgroup, so that there is no moment at
// which it is in another (clone3(2), CLONE_INTO_CGROUP). Where that can't be, it is
// moved as soon as it is there, with what it has started until then.
func (g cgroup) hold(cmd *exec.Cmd, start func() error) error {
	if g == "" {
		return start()
	}
	if !bornInCgroup() {
		if err := start(); err != nil {
			return err
		}
		if err := g.adopt(cmd.Process.Pid); err != nil {
			// It is as if it had never been there: nobody else waits for it.
			return errors.Join(fmt.Errorf("cannot use the VM's cgroup: %w", err), cmd.Process.Kill(), ignoreExit(cmd.Wait()))
		}
		return nil
	}
	dir, err := os.Open(string(g))
	if err != nil {
		return fmt.Errorf("cannot use the VM's cgroup: %w", err)
	}
	defer dir.Close()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	return start()
}

// bornInCgroup says whether this process may call clone3(2). A sandbox that looks at
// what is cloned can't look into its arguments, and says that there is no such call,
// as systemd's RestrictNamespaces= does.
var bornInCgroup = sync.OnceValue(func() bool {
	// Arguments of no length are refused before anything is done.
	_, _, err := unix.Syscall(unix.SYS_CLONE3, 0, 0, 0)
	return err == unix.EINVAL
})

// adopt moves a process that was started beside the cgroup into it, and what that
// has started until then, which is in its process group.
func (g cgroup) adopt(pid int) error {
	beside := g.parent().sub(supervisorLeaf)
	for moved := []int{pid}; len(moved) > 0; {
		for _, p := range moved {
			if err := g.join(p); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		all, err := beside.processes()
		if err != nil {
			return err
		}
		moved = slices.DeleteFunc(all, func(p int) bool {
			group, err := unix.Getpgid(p)
			return err != nil || group != pid
		})
	}
	return nil
}

// ignoreExit drops the error of a process that was killed.
func ignoreExit(err error) error {
	if errors.As(err, new(*exec.ExitError)) {
		return nil
	}
	return err
}

// explainEnd adds to the error that the VM ended with what the kernel has done to
// its processes by the limits. It must be asked before they are undone.
func (l *life) explainEnd(err error) error {
	if err == nil || l.leaves.vm == "" {
		return err
	}
	memory, merr := l.leaves.vm.counts("memory.events")
	tasks, terr := l.leaves.vm.counts("pids.events")
	if err := errors.Join(merr, terr); err != nil {
		l.logf("cannot read what the limits have done: %v", err)
	}
	if why := limitsReached(memory, tasks, limitsOf(l.vm, l.shareCount(), l.emulated), int64(l.vm.Memory)); why != "" {
		return fmt.Errorf("%w; %s", err, why)
	}
	return err
}

// limitsReached says what the counters of the VM's cgroup (memory.events and
// pids.events) mean; "" when nothing was refused.
func limitsReached(memory, tasks map[string]int64, l Limits, guest int64) string {
	var why []string
	switch {
	case memory["oom_kill"] > 0 && memory["oom"] > 0:
		why = append(why, fmt.Sprintf("out of memory: VMM and virtiofsd needed more than %s over the guest's %s and were killed; more can be declared as limits.memoryOverhead",
			config.Size((l.Memory-guest)>>20<<20), config.Size(guest)))
	case memory["oom_kill"] > 0:
		why = append(why, "out of memory: the host had none left, and its kernel killed the VM's processes")
	}
	if tasks["max"] > 0 {
		why = append(why, fmt.Sprintf("limits.tasks: VMM and virtiofsd wanted more than %d processes and threads", l.Tasks))
	}
	return strings.Join(why, "; ")
}
