package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/internal/durable"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/storage"
)

// leftover is something of ours that nothing needs any more.
type leftover struct {
	what   string
	remove func() error
}

// bootUnused is how long nothing was started from a prepared kernel when it is
// removed from the cache; making it anew takes half a second.
const bootUnused = 7 * 24 * time.Hour

// Sweep is what a collection is to do.
type Sweep struct {
	// All: also the bridge and the tables, when no VM is up.
	All bool
	// Overlays: also the overlays of VMs that nothing declares.
	Overlays bool
	// DryRun: say what there is, and remove nothing.
	DryRun bool
}

// Swept is what a collection found.
type Swept struct {
	// Removed is what was removed; in a dry run, what would be.
	Removed []string `json:"removed"`
	// Kept is what nothing declares and is kept all the same, because a guest's
	// data may be on it, each with the command that removes it.
	Kept []string `json:"kept"`
}

// Collect removes what VMs that were killed left behind. What it can't look at is
// an error, and whatever depends on it stays; it never touches what doesn't carry
// this root's mark, nor anything of a VM whose lock is held.
func Collect(ctx context.Context, l Layout, sweep Sweep) (swept Swept, err error) {
	hostConfig, err := config.LoadHost(l.HostConfig())
	if err != nil {
		return swept, coded(ExitDeclaration, err)
	}
	c := newCollector(l, hostConfig, sweep)
	defer func() { err = errors.Join(err, c.locks.unwind()) }()
	c.collectLeftovers()
	c.collectKernels(ctx)
	if sweep.All && c.running == 0 && len(c.errs) == 0 {
		c.take(leftover{"bridge " + c.bridge.Name + " and the packet filter tables", func() error { return network.RemoveBridge(c.bridge) }})
	}
	return c.swept, errors.Join(c.errs...)
}

// Leftovers says what VMs that were killed left behind: what a dry run of Collect
// finds, but for kernels that were not used for long, which hinder nobody. It
// changes nothing.
func Leftovers(l Layout, h *config.Host) (Swept, error) {
	c := newCollector(l, h, Sweep{DryRun: true})
	c.collectLeftovers()
	return c.swept, errors.Join(c.errs...)
}

// collector is one collection.
type collector struct {
	layout Layout
	sweep  Sweep
	bridge network.Bridge
	rules  network.Rules
	leases network.Leases

	ports   map[string]network.PortStatus
	ruled   map[string]netip.Addr
	leased  map[string]bool
	grouped []string
	running int
	locks   undoStack // of the dead VMs, so that none is started meanwhile

	swept Swept
	errs  []error
}

func newCollector(l Layout, h *config.Host, sweep Sweep) *collector {
	bridge := network.Bridge{Name: h.Bridge, Address: h.Address, Owner: l.ID}
	return &collector{
		layout: l, sweep: sweep, bridge: bridge,
		rules:  network.Rules{Bridge: bridge, Lock: l.RulesLock()},
		leases: network.Leases{Dir: l.Leases(), Subnet: h.Address},
		swept:  Swept{Removed: []string{}, Kept: []string{}},
	}
}

// collectLeftovers collects what dead VMs left, and what belongs to no VM.
func (c *collector) collectLeftovers() {
	for _, name := range c.names() {
		c.collectVM(name)
		if !c.sweep.All {
			// A VM that is started meanwhile is no hindrance but to the bridge's end.
			c.failed(c.locks.unwind())
		}
	}
	store := storage.Store{Dir: c.layout.Store()}
	halves, err := store.Abandoned()
	c.failed(err)
	for _, path := range halves {
		c.take(leftover{path, func() error { return store.RemoveAbandoned() }})
	}
}

// names are the VMs that something is there of; each kind of thing is looked for
// by itself, since any of them can be all that is left.
func (c *collector) names() []string {
	names, err := c.layout.withRunDir()
	c.failed(err)
	ports, err := c.bridge.Ports()
	c.failed(err)
	c.ports = map[string]network.PortStatus{}
	for _, p := range ports {
		c.ports[p.VM] = p
		names = append(names, p.VM)
	}
	c.ruled, err = c.rules.List()
	c.failed(err)
	names = slices.AppendSeq(names, maps.Keys(c.ruled))
	marked, err := c.layout.marked()
	c.failed(err)
	names = append(names, marked...)
	leases, err := c.leases.List()
	c.failed(err)
	c.leased = map[string]bool{}
	for _, vm := range leases {
		c.leased[vm] = true
		names = append(names, vm)
	}
	grouped, err := c.layout.cgroupsLeft()
	c.failed(err)
	c.grouped = grouped
	names = append(names, grouped...)
	if c.sweep.All {
		// One that is started for the first time needs the bridge, too.
		declared, err := c.layout.Declared()
		c.failed(err)
		names = append(names, declared...)
	}
	states, err := os.ReadDir(c.layout.StateRoot())
	if !errors.Is(err, fs.ErrNotExist) {
		c.failed(err)
	}
	for _, e := range states {
		names = append(names, e.Name())
	}
	names = slices.DeleteFunc(names, func(n string) bool { return config.ValidName(n) != nil })
	slices.Sort(names)
	return slices.Compact(names)
}

func (c *collector) failed(err error) {
	if err != nil {
		c.errs = append(c.errs, err)
	}
}

// take removes a left-over, or in a dry run only tells of it.
func (c *collector) take(o leftover) {
	if !c.sweep.DryRun {
		if err := o.remove(); err != nil {
			c.failed(fmt.Errorf("cannot remove %s: %w", o.what, err))
			return
		}
	}
	c.swept.Removed = append(c.swept.Removed, o.what)
}

// collectVM collects what a dead VM left. The VM's lock is held until the stack of
// locks is unwound.
func (c *collector) collectVM(name string) {
	paths := c.layout.VM(name)
	_, runErr := os.Lstat(paths.Run)
	held, err := locked(paths.Lock())
	if err == nil && !held && !c.sweep.DryRun {
		var lock *os.File
		if lock, err = takeLock(paths.Lock()); err == nil {
			c.locks.push("the lock of VM "+name, lock.Close)
		} else if errors.Is(err, errLocked) {
			held, err = true, nil
		}
	}
	if err != nil || held {
		c.running++
		c.failed(err)
		return
	}
	if errors.Is(runErr, fs.ErrNotExist) && !c.sweep.DryRun {
		// Made only to be locked.
		c.locks.push("the lock of VM "+name, func() error { return removeRunDir(paths) })
	}
	mark := c.layout.Mark(name)
	pids, err := markedProcesses(mark)
	if err != nil {
		c.failed(err)
		return
	}
	if len(pids) > 0 {
		killed := len(c.errs)
		c.take(leftover{fmt.Sprintf("%d processes of VM %s", len(pids), name), func() error { _, err := killMarked(mark); return err }})
		if len(c.errs) > killed {
			return // they may hold the rest
		}
	}
	if p, ok := c.ports[name]; ok {
		c.take(leftover{"port " + p.TAP + " of VM " + name, func() error {
			return c.bridge.RemovePort(network.Port{VM: name, TAP: p.TAP})
		}})
	}
	if address, ok := c.ruled[name]; ok {
		c.take(leftover{"packet filter rules of VM " + name, func() error { return c.rules.Remove(name, address) }})
	}
	if slices.Contains(c.grouped, name) {
		c.take(leftover{"cgroup of VM " + name, func() error {
			return errors.Join(c.layout.subtree().sub(name).remove(), c.layout.removeSubtree())
		}})
	}
	rest, err := runLeftovers(paths)
	c.failed(err)
	unfinished, err := unfinishedFiles(paths)
	c.failed(err)
	for _, o := range append(rest, unfinished...) {
		c.take(o)
	}
	c.collectUndeclared(name)
}

// collectUndeclared looks at what stays of a VM while it is down, when nothing
// declares it any more. A lease of nobody goes; a disk may hold a guest's data, so
// it is named and kept, and an overlay goes when that is asked for.
func (c *collector) collectUndeclared(name string) {
	_, err := c.layout.Declaration(name)
	var missing *NotDeclaredError
	if !errors.As(err, &missing) {
		c.failed(err) // can't be looked: taken for declared
		return
	}
	paths := c.layout.VM(name)
	state, err := os.ReadDir(paths.State)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.failed(err)
		return
	}
	if len(state) == 0 {
		if c.leased[name] {
			c.take(leftover{"lease of VM " + name + ", of which there is nothing else", func() error { return c.leases.Release(name) }})
		}
		return
	}
	if _, err := os.Lstat(paths.OverlayDisk()); err == nil && c.sweep.Overlays {
		c.take(leftover{paths.OverlayDisk(), func() error { return os.Remove(paths.OverlayDisk()) }})
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.failed(err)
	}
	c.swept.Kept = append(c.swept.Kept, fmt.Sprintf("%s: nothing declares VM %s; `clawvm rm %s` removes it, with --volumes its volumes too", paths.State, name, name))
}

// collectKernels collects the prepared kernels that nothing was started from for
// long.
func (c *collector) collectKernels(ctx context.Context) {
	cache := c.layout.BootCache()
	look := func() ([]string, error) { return kernel.Prune(ctx, cache, bootUnused) }
	if c.sweep.DryRun {
		look = func() ([]string, error) { return kernel.Prunable(cache, bootUnused) }
	}
	found, err := look()
	c.failed(err)
	c.swept.Removed = append(c.swept.Removed, found...)
}

// runLeftovers is what lies in a dead VM's run directory beside its lock, and what
// its next start gives back to its unit.
func runLeftovers(p Paths) ([]leftover, error) {
	entries, err := os.ReadDir(p.Run)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var found []leftover
	for _, e := range entries {
		if path := filepath.Join(p.Run, e.Name()); path != p.Lock() && path != p.UnitWeight() {
			found = append(found, leftover{path, func() error { return removeRun(path) }})
		}
	}
	return found, nil
}

// unfinishedFiles are those that a killed process was about to give another name,
// in a VM's state directory. The VM's lock is held, so nobody is at work on them.
func unfinishedFiles(p Paths) ([]leftover, error) {
	var found []leftover
	for _, dir := range []string{p.State, filepath.Dir(p.VolumeDisk("x"))} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return found, err
		}
		for _, e := range entries {
			half := strings.HasSuffix(e.Name(), ".raw"+storage.HalfMade)
			if e.Type().IsRegular() && (half || durable.IsUnfinished(e.Name(), filepath.Base(p.LastEnd()))) {
				path := filepath.Join(dir, e.Name())
				found = append(found, leftover{path, func() error { return os.Remove(path) }})
			}
		}
	}
	return found, nil
}

// removeRun removes something of a run directory. A tmpfs of ours that is mounted
// in it is taken away first; what others mounted there is not looked into, since
// removing would go on in it.
func removeRun(path string) error {
	mounts, err := mountsBelow(path)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.source != storage.TmpfsSource || m.kind != "tmpfs" {
			return fmt.Errorf("%s is mounted there, which is not clawvm's: umount %s", m.source, m.at)
		}
		if err := storage.Unmount(m.at); err != nil {
			return err
		}
	}
	return os.RemoveAll(path)
}

// removeRunDir removes a VM's run directory, whose lock is held: the lock last, since
// from then on the VM may be another's, which has made the directory anew.
func removeRunDir(p Paths) error {
	rest, err := runLeftovers(p)
	errs := []error{err}
	for _, o := range rest {
		errs = append(errs, o.remove())
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, path := range []string{p.UnitWeight(), p.Lock(), p.Run} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return nil
}

// mount is a line of /proc/self/mountinfo (proc(5)).
type mount struct{ at, kind, source string }

// mountsBelow lists what is mounted at path or below it, the innermost first.
func mountsBelow(path string) ([]mount, error) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cannot look what is mounted: %w", err)
	}
	var found []mount
	for line := range strings.Lines(string(raw)) {
		about, what, ok := strings.Cut(line, " - ")
		fields, source := strings.Fields(about), strings.Fields(what)
		if !ok || len(fields) < 5 || len(source) < 2 {
			continue
		}
		at := unescapeMount(fields[4])
		if at == path || strings.HasPrefix(at, path+"/") {
			found = append(found, mount{at, source[0], source[1]})
		}
	}
	slices.Reverse(found)
	return found, nil
}

// unescapeMount undoes what the kernel does to white space in mountinfo.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// Remove forgets a VM that is down: its disks (volumes only when told so), its
// lease, its logs, and the declaration's link when `up FILE` made it.
func Remove(ctx context.Context, l Layout, name string, volumes bool) (kept []string, err error) {
	if err := config.ValidName(name); err != nil {
		return nil, coded(ExitUsage, err)
	}
	paths := l.VM(name)
	if err := l.knows(name); err != nil {
		return nil, err
	}
	lock, err := l.lockVM(ctx, name)
	if errors.Is(err, errLocked) {
		return nil, fmt.Errorf("cannot remove VM %s: it runs; clawvm down %s first", name, name)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot remove VM %s: %w", name, err)
	}
	defer lock.Close()
	if _, err := killMarked(l.Mark(name)); err != nil {
		return nil, err
	}
	hostConfig, err := config.LoadHost(l.HostConfig())
	if err != nil {
		return nil, coded(ExitDeclaration, err)
	}
	bridge := network.Bridge{Name: hostConfig.Bridge, Address: hostConfig.Address, Owner: l.ID}
	leases := network.Leases{Dir: l.Leases(), Subnet: hostConfig.Address}
	ports, err := bridge.Ports()
	if err != nil {
		return nil, err
	}
	for _, p := range ports {
		if p.VM == name {
			if err := bridge.RemovePort(network.Port{VM: name, TAP: p.TAP}); err != nil {
				return nil, err
			}
		}
	}
	address, leased, err := leases.Lookup(name)
	if err != nil {
		return nil, err
	}
	if leased {
		if err := (network.Rules{Bridge: bridge, Lock: l.RulesLock()}).Remove(name, address); err != nil {
			return nil, err
		}
	}
	state, err := os.ReadDir(paths.State)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	volumesDir := filepath.Dir(paths.VolumeDisk("x"))
	for _, e := range state {
		path := filepath.Join(paths.State, e.Name())
		if path == volumesDir && !volumes {
			kept = append(kept, path)
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return kept, err
		}
	}
	if len(kept) == 0 {
		if err := os.RemoveAll(paths.State); err != nil {
			return kept, err
		}
	}
	if err := removeDeclarationLink(l, name); err != nil {
		return kept, err
	}
	// The lease last but for what holds the lock: until here a second rm finds
	// what the first one left.
	return kept, errors.Join(leases.Release(name), os.RemoveAll(paths.Log), removeRunDir(paths))
}

// knows says, by its error, whether there is anything of a VM of that name.
func (l Layout) knows(name string) error {
	_, err := l.Declaration(name)
	var missing *NotDeclaredError
	if !errors.As(err, &missing) {
		return err
	}
	p := l.VM(name)
	for _, dir := range []string{p.State, p.Log, p.Run} {
		if _, serr := os.Lstat(dir); serr == nil {
			return nil
		}
	}
	return err
}

// removeDeclarationLink removes the link that `up FILE` made. A declaration that
// is a file is its owner's.
func removeDeclarationLink(l Layout, name string) error {
	file, err := l.Declaration(name)
	var missing *NotDeclaredError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return err
	}
	if st, err := os.Lstat(file); err != nil || st.Mode()&os.ModeSymlink == 0 {
		return err
	}
	return os.Remove(file)
}
