package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/network"
)

// leftover is something of ours that nothing needs any more.
type leftover struct {
	what   string
	remove func() error
}

// bootUnused is how long nothing was started from a prepared kernel when it is
// removed from the cache; making it anew takes half a second.
const bootUnused = 7 * 24 * time.Hour

// Collect removes what VMs that were killed left behind: processes, network
// ports, packet filter rules, run directories; with all, also the bridge and the
// tables, when no VM runs. It says what it removed. What it can't look at, it
// leaves alone and reports; it never touches what doesn't carry this root's mark.
func Collect(ctx context.Context, l Layout, all bool) (removed []string, err error) {
	hostConfig, err := config.LoadHost(l.HostConfig())
	if err != nil {
		return nil, coded(ExitDeclaration, err)
	}
	bridge := network.Bridge{Name: hostConfig.Bridge, Address: hostConfig.Address, Owner: l.ID}
	rules := network.Rules{Bridge: bridge, Lock: l.RulesLock()}

	var locks []*os.File // of the dead VMs, so that none is started meanwhile
	defer func() {
		for _, lock := range locks {
			lock.Close()
		}
	}()
	var errs []error
	running := 0
	names, err := l.withRunDir()
	if err != nil {
		return nil, err
	}
	ports, err := bridge.Ports()
	if err != nil {
		// Not "there are none": nothing of the network is removed.
		errs = append(errs, err)
	}
	byPort := map[string]network.PortStatus{}
	for _, p := range ports {
		byPort[p.VM] = p
		names = append(names, p.VM)
	}
	ruled, err := rules.List()
	if err != nil {
		errs = append(errs, err)
	}
	for vm := range ruled {
		names = append(names, vm)
	}
	grouped, err := l.cgroupsLeft()
	if err != nil {
		errs = append(errs, err)
	}
	names = append(names, grouped...)
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		lock, err := takeLock(l.VM(name).Lock())
		if err != nil {
			running++
			if !errors.Is(err, errLocked) {
				errs = append(errs, err)
			}
			continue
		}
		locks = append(locks, lock)
		killed, err := killMarked(l.Mark(name))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if killed > 0 {
			removed = append(removed, fmt.Sprintf("%d processes of VM %s", killed, name))
		}
		var found []leftover
		if p, ok := byPort[name]; ok {
			found = append(found, leftover{"port " + p.TAP + " of VM " + name, func() error {
				return bridge.RemovePort(network.Port{VM: name, TAP: p.TAP})
			}})
		}
		if address, ok := ruled[name]; ok {
			found = append(found, leftover{"packet filter rules of VM " + name, func() error { return rules.Remove(name, address) }})
		}
		if slices.Contains(grouped, name) {
			found = append(found, leftover{"cgroup of VM " + name, func() error {
				return errors.Join(l.subtree().sub(name).remove(), l.removeSubtree())
			}})
		}
		rest, err := runLeftovers(l.VM(name))
		if err != nil {
			errs = append(errs, err)
		}
		for _, o := range append(found, rest...) {
			if err := o.remove(); err != nil {
				errs = append(errs, fmt.Errorf("cannot remove %s: %w", o.what, err))
				continue
			}
			removed = append(removed, o.what)
		}
	}
	pruned, err := kernel.Prune(ctx, l.BootCache(), bootUnused)
	if err != nil {
		errs = append(errs, err)
	}
	removed = append(removed, pruned...)
	if all && running == 0 && len(errs) == 0 {
		if err := network.RemoveBridge(bridge); err != nil {
			errs = append(errs, err)
		} else {
			removed = append(removed, "bridge "+bridge.Name+" and the packet filter tables")
		}
	}
	return removed, errors.Join(errs...)
}

// runLeftovers is what lies in a dead VM's run directory beside its lock.
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
		if path := filepath.Join(p.Run, e.Name()); path != p.Lock() {
			found = append(found, leftover{path, func() error { return os.RemoveAll(path) }})
		}
	}
	return found, nil
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
	lock, err := takeLock(paths.Lock())
	if errors.Is(err, errLocked) {
		return nil, fmt.Errorf("cannot remove VM %s: it runs; clawvm down %s first", name, name)
	}
	if err != nil {
		return nil, err
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
	return kept, errors.Join(leases.Release(name), os.RemoveAll(paths.Log), os.RemoveAll(paths.Run))
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
