package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/network"
)

// Usage is what a VM takes of its host: its VMM, virtiofsd, gate and supervisor
// together.
type Usage struct {
	Name  string `json:"name"`
	State State  `json:"state"`
	// CPU is the processor time since the look before, in percent of one processor.
	CPU float64 `json:"cpu"`
	// Memory is what is really used, in bytes; pages of files that the kernel can
	// drop at any time are left out. MemoryMax is what VMM and virtiofsd may use,
	// or the guest's own memory where no limits apply.
	Memory    int64 `json:"memory"`
	MemoryMax int64 `json:"memoryMax"`
	// Received and Sent are the guest's bytes on the network, since its start.
	Received uint64 `json:"received"`
	Sent     uint64 `json:"sent"`
	// Read and Written are bytes from and to the host's disks, since its start.
	Read    uint64 `json:"read"`
	Written uint64 `json:"written"`
	// Disk is the space that overlay and volumes take on the host, in bytes.
	Disk int64 `json:"disk"`
	// Tasks are processes and threads.
	Tasks int `json:"tasks"`
}

// Top looks at VMs again and again.
type Top struct {
	layout Layout
	bridge network.Bridge
	before map[string]cpuSample
}

// cpuSample is the processor time that a VM had used at a moment.
type cpuSample struct {
	supervisor int
	at         time.Time
	used       time.Duration
}

// NewTop makes a Top for the VMs of a root.
func NewTop(l Layout) (*Top, error) {
	h, err := config.LoadHost(l.HostConfig())
	if err != nil {
		return nil, coded(ExitDeclaration, err)
	}
	bridge := network.Bridge{Name: h.Bridge, Address: h.Address, Owner: l.ID}
	return &Top{layout: l, bridge: bridge, before: map[string]cpuSample{}}, nil
}

// Look tells of the VMs called so, or of all that run. The processor time is that
// since the last Look, and at the first one nothing. A VM that is named and isn't
// up is an error.
func (t *Top) Look(ctx context.Context, names []string) ([]Usage, error) {
	running := names
	if len(names) == 0 {
		var err error
		if running, err = t.layout.withRunDir(); err != nil {
			return nil, err
		}
	}
	processes, err := processTable()
	if err != nil {
		return nil, err
	}
	ports, err := t.bridge.Ports()
	if err != nil {
		return nil, err
	}
	taps := map[string]string{}
	for _, p := range ports {
		taps[p.VM] = p.TAP
	}
	list := []Usage{}
	for _, name := range running {
		st, err := t.layout.Dial(name).Status(ctx)
		if err != nil && len(names) == 0 && errors.Is(err, ErrNotRunning) {
			continue
		}
		if err != nil {
			if _, known := t.layout.Declaration(name); known != nil {
				err = known
			}
			return nil, err
		}
		u, err := t.usage(st, processes, taps[name])
		if err != nil {
			return nil, fmt.Errorf("cannot look at VM %s: %w", name, err)
		}
		list = append(list, u)
	}
	return list, nil
}

func (t *Top) usage(st Status, all map[int]process, tap string) (Usage, error) {
	u := Usage{Name: st.Name, State: st.State, MemoryMax: st.Memory}
	now := cpuSample{supervisor: st.PID, at: time.Now()}
	grouped := st.Limits != nil && st.Limits.Cgroup != ""
	for _, pid := range family(all, st.PID) {
		p := all[pid]
		u.Tasks += p.tasks
		// Of one that has ended meanwhile nothing is counted. With LVM and the like
		// the cgroup's io.stat has each byte twice, so this is asked in any case.
		if io, err := p.IO(); err == nil {
			u.Read += io.ReadBytes
			u.Written += io.WriteBytes
		}
		if grouped {
			continue
		}
		now.used += p.used
		// By shares: the guest's memory is the VMM's and each virtiofsd's.
		if m, err := p.ProcSMapsRollup(); err == nil {
			u.Memory += int64(m.Pss)
		}
	}
	if grouped {
		var err error
		if u.Memory, now.used, err = cgroupMount.sub(st.Limits.Cgroup).usage(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return u, err
		}
		u.MemoryMax = st.Limits.Memory
	}
	if before, ok := t.before[st.Name]; ok {
		u.CPU = percent(before, now)
	}
	t.before[st.Name] = now
	if tap != "" {
		// One that goes down has its port no more.
		if received, sent, err := t.bridge.Counters(tap); err == nil {
			u.Received, u.Sent = received, sent
		}
	}
	var err error
	u.Disk, err = diskSpace(t.layout.VM(st.Name))
	return u, err
}

// percent is the processor time between two moments, of one processor. Of two
// lives there is nothing to compare.
func percent(before, now cpuSample) float64 {
	took := now.at.Sub(before.at)
	if before.supervisor != now.supervisor || now.used < before.used || took <= 0 {
		return 0
	}
	return 100 * float64(now.used-before.used) / float64(took)
}

// usage is the memory that a cgroup really uses, and its processor time.
func (g cgroup) usage() (memory int64, used time.Duration, err error) {
	if memory, err = g.count("memory.current"); err != nil {
		return 0, 0, err
	}
	stat, err := g.counts("memory.stat")
	if err != nil {
		return 0, 0, err
	}
	cpu, err := g.counts("cpu.stat")
	if err != nil {
		return 0, 0, err
	}
	return max(memory-stat["inactive_file"], 0), time.Duration(cpu["usage_usec"]) * time.Microsecond, nil
}

// process is a process of the host at one moment.
type process struct {
	procfs.Proc
	parent, tasks int
	used          time.Duration // processor time
}

// processTable reads the host's processes.
func processTable() (map[int]process, error) {
	list, err := procfs.AllProcs()
	if err != nil {
		return nil, fmt.Errorf("cannot list the host's processes: %w", err)
	}
	all := make(map[int]process, len(list))
	for _, p := range list {
		st, err := p.Stat()
		if err != nil {
			continue // it has ended
		}
		all[p.PID] = process{p, st.PPID, st.NumThreads, time.Duration(st.CPUTime() * float64(time.Second))}
	}
	return all, nil
}

// family is a process and all that descend from it.
func family(all map[int]process, root int) []int {
	children := map[int][]int{}
	for pid, p := range all {
		children[p.parent] = append(children[p.parent], pid)
	}
	if _, ok := all[root]; !ok {
		return nil
	}
	found := []int{root}
	for i := 0; i < len(found); i++ {
		found = append(found, children[found[i]]...)
	}
	return found
}

// blockSize is what st_blocks counts in (stat(2)).
const blockSize = 512

// diskSpace is what a VM's disks take: they are sparse, and smaller than they look.
func diskSpace(p Paths) (int64, error) {
	files, err := filepath.Glob(p.VolumeDisk("*"))
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, file := range append(files, p.OverlayDisk()) {
		var st unix.Stat_t
		err := unix.Lstat(file, &st)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("cannot look at the disk %s: %w", file, err)
		}
		sum += st.Blocks * blockSize
	}
	return sum, nil
}
