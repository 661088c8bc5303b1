package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/util"
	"github.com/godbus/dbus/v5"

	"github.com/clawvm/clawvm/config"
)

// The cgroups of a VM, below its own. Three, since no cgroup that hands out
// controllers may hold processes, and since each is to end without the others.
const (
	supervisorLeaf = "supervisor"
	// gateLeaf has the gate to itself: one that is taken over must not eat what
	// the supervisor lives on, nor be killed with the VMM before its logs are written.
	gateLeaf = "gate"
	vmLeaf   = "vm" // VMM and virtiofsd, whose shared memory is charged to who touches it first
)

// limitControllers are what the limits need. With io, `top` has nothing more to
// say than /proc has.
var limitControllers = []string{"cpu", "memory", "pids"}

// noLimitsError says why no limits apply. It stops no start.
type noLimitsError struct{ why string }

func (e *noLimitsError) Error() string { return e.why }

func noLimits(format string, args ...any) error { return &noLimitsError{fmt.Sprintf(format, args...)} }

// cgroupPlace is where a VM's cgroups are.
type cgroupPlace struct {
	base cgroup // the VM's own
	unit string // systemd's name for it; "" where it is ours
	from cgroup // where the supervisor was before; "" where it need not go back
}

// placement is what is done to come by a cgroup of the VM's own.
type placement int

const (
	placeHere    placement = iota + 1 // the supervisor's own was handed over to it
	placeAbove                        // the same, and it is in the leaf already
	placeScope                        // systemd makes one
	placeSubtree                      // nobody manages cgroups: one of ours
)

// cgroupFacts is what the choice depends on.
type cgroupFacts struct {
	name           string // of the supervisor's cgroup
	delegated      bool   // it is marked as handed over
	aboveDelegated bool   // the one above is
	alone          bool   // the supervisor is the only process in it
	systemd        bool   // systemd manages this host
}

// choosePlace decides. Below systemd nobody may make cgroups but where it says
// so, which is the unit's own (Delegate=yes) or a scope that it is asked for.
func choosePlace(f cgroupFacts) placement {
	switch {
	case f.delegated && f.alone:
		return placeHere
	case f.aboveDelegated && f.alone && f.name == supervisorLeaf: // DelegateSubgroup=
		return placeAbove
	case f.systemd:
		return placeScope
	}
	return placeSubtree
}

// enterCgroup finds or makes the VM's cgroup and moves the supervisor into its
// leaf. Once done it stays so until the supervisor ends.
func (s *Supervisor) enterCgroup(ctx context.Context) error {
	if s.cgroups != nil {
		return nil
	}
	if !cgroupMount.mounted() {
		return noLimits("cgroup v2 is not mounted at %s", cgroupMount)
	}
	own, err := cgroupOf(os.Getpid())
	if err != nil {
		return noLimits("cannot tell the supervisor's own cgroup: %v", err)
	}
	inside, err := own.processes()
	if err != nil {
		return noLimits("cannot look into the supervisor's own cgroup: %v", err)
	}
	place := &cgroupPlace{}
	switch choosePlace(cgroupFacts{
		name: own.name(), delegated: own.delegated(), aboveDelegated: own.parent().delegated(),
		alone: slices.Equal(inside, []int{os.Getpid()}), systemd: util.IsRunningSystemd(),
	}) {
	case placeHere:
		place.base, place.unit = own, unitName(own)
	case placeAbove:
		place.base, place.unit = own.parent(), unitName(own.parent())
	case placeScope:
		if place.base, err = s.makeScope(ctx); err != nil {
			return err
		}
		place.unit = unitName(place.base)
	case placeSubtree:
		if place.base, err = s.layout.makeSubtree(s.name); err != nil {
			return err
		}
		place.from = own
	}
	if err := place.enter(); err != nil {
		if left := s.leave(place); left != nil {
			s.logf("%v", left)
		}
		return err
	}
	s.cgroups = place
	return nil
}

// unitName is the unit whose cgroup it is; "" when it is none's.
func unitName(g cgroup) string {
	if n := g.name(); strings.HasSuffix(n, unitSuffix) || strings.HasSuffix(n, scopeSuffix) {
		return n
	}
	return ""
}

// enter moves the supervisor into its leaf and turns on the controllers for all leaves.
func (p *cgroupPlace) enter() error {
	if err := p.base.canLimit(); err != nil {
		return err
	}
	leaf := p.base.sub(supervisorLeaf)
	if err := leaf.make(); err != nil {
		return noLimits("cannot make the cgroup %s: %v", leaf.path(), Bare(err))
	}
	if !leaf.has("cgroup.kill") {
		return noLimits("the kernel is older than Linux 5.14")
	}
	if err := leaf.join(os.Getpid()); err != nil {
		return err
	}
	if err := p.base.enable(limitControllers); err != nil {
		return noLimits("cannot turn on controllers below the cgroup %s: %v", p.base.path(), err)
	}
	return nil
}

// canLimit says, by its error, that a cgroup has not all of the controllers.
func (g cgroup) canLimit() error {
	have, err := g.controllers()
	if err != nil {
		return err
	}
	var missing []string
	for _, c := range limitControllers {
		if !slices.Contains(have, c) {
			missing = append(missing, c)
		}
	}
	switch {
	case len(missing) == 0:
		return nil
	case g == cgroupMount:
		return noLimits("cgroup v2 has no %s on this host, which may have them in cgroup v1; boot with systemd.unified_cgroup_hierarchy=1 and without cgroup_disable=", strings.Join(missing, ", "))
	}
	return noLimits("the cgroup %s has no %s", g.path(), strings.Join(missing, ", "))
}

// initialPIDs is the first process namespace's name (PROC_PID_INIT_INO), in which
// systemd reads the numbers of processes that it is told.
const initialPIDs = "pid:[4026531836]"

// makeScope asks systemd for a transient scope around this process, and returns
// its cgroup.
func (s *Supervisor) makeScope(ctx context.Context) (cgroup, error) {
	if ns, err := os.Readlink("/proc/self/ns/pid"); err != nil || ns != initialPIDs {
		return "", noLimits("systemd manages the cgroups, and this is not its process namespace")
	}
	conn, err := systemd.NewWithContext(ctx)
	if err != nil {
		return "", noLimits("systemd manages the cgroups, and does not answer: %v", err)
	}
	defer conn.Close()
	name := s.layout.scopeName(s.name)
	done := make(chan string, 1)
	_, err = conn.StartTransientUnitContext(ctx, name, "fail", []systemd.Property{
		systemd.PropDescription("clawvm VM " + s.name + " of " + s.layout.Root),
		systemd.PropSlice(vmSlice),
		systemd.PropPids(uint32(os.Getpid())),
		{Name: "Delegate", Value: dbus.MakeVariant(true)},
		{Name: "CollectMode", Value: dbus.MakeVariant("inactive-or-failed")},
	}, done)
	if err != nil {
		return "", noLimits("systemd makes no scope %s: %v", name, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return "", noLimits("systemd makes no scope %s: the job is %s", name, result)
		}
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	own, err := cgroupOf(os.Getpid())
	if err != nil {
		return "", err
	}
	if own.name() != name {
		return "", noLimits("systemd made the scope %s, and left the supervisor in %s", name, own.path())
	}
	return own, nil
}

// vmSlice holds all VMs of a host that systemd manages.
const vmSlice = "clawvm.slice"

// scopeName is the scope of a supervisor that no unit started. The process's
// number keeps it apart from one that systemd has not seen the end of yet.
func (l Layout) scopeName(vm string) string {
	return fmt.Sprintf("clawvm-%s-%s-%d%s", l.ID, vm, os.Getpid(), scopeSuffix)
}

const scopeSuffix = ".scope"

// subtree holds the cgroups of this root's VMs where nobody manages them.
func (l Layout) subtree() cgroup { return cgroupMount.sub("clawvm-" + l.ID) }

// makeSubtree makes the cgroup of a VM in this root's own subtree.
func (l Layout) makeSubtree(vm string) (cgroup, error) {
	if err := cgroupMount.canLimit(); err != nil {
		return "", err
	}
	if err := cgroupMount.enable(limitControllers); err != nil {
		return "", noLimits("cannot turn on the controllers %s of cgroup v2: %v", strings.Join(limitControllers, ", "), Bare(err))
	}
	base := l.subtree().sub(vm)
	for {
		err := l.subtree().make()
		if err == nil {
			err = l.subtree().enable(limitControllers)
		}
		if err == nil {
			err = base.remove() // what a killed supervisor left
		}
		if err == nil {
			err = base.make()
		}
		switch {
		case err == nil:
			return base, nil
		case errors.Is(err, os.ErrNotExist): // the last VM that ended took it away between two of these
			if !cgroupMount.mounted() {
				return "", noLimits("cgroup v2 is gone from %s", cgroupMount)
			}
		default:
			return "", noLimits("cannot make the cgroup %s: %v", base.path(), Bare(err))
		}
	}
}

// leaveCgroup takes the supervisor out of the VM's cgroup, at its end, and removes
// it. What systemd made, systemd removes.
func (s *Supervisor) leaveCgroup() error {
	p := s.cgroups
	s.cgroups = nil
	if p == nil {
		return nil
	}
	return s.leave(p)
}

func (s *Supervisor) leave(p *cgroupPlace) error {
	if p.from == "" {
		return nil
	}
	if err := p.from.join(os.Getpid()); err != nil {
		// It was a session's, and went with it. The root holds whoever has no other.
		if err := cgroupMount.join(os.Getpid()); err != nil {
			return fmt.Errorf("cannot leave the cgroup %s: %w", p.base.path(), err)
		}
	}
	return errors.Join(p.base.remove(), s.layout.removeSubtree())
}

// removeSubtree removes this root's subtree when no VM has a cgroup in it.
func (l Layout) removeSubtree() error {
	err := os.Remove(string(l.subtree()))
	if err == nil || errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.EBUSY) {
		return nil
	}
	return fmt.Errorf("cannot remove the cgroup %s: %w", l.subtree().path(), Bare(err))
}

// cgroupsLeft lists the VMs that have a cgroup in this root's subtree. Those that
// systemd made go with their last process.
func (l Layout) cgroupsLeft() ([]string, error) {
	entries, err := os.ReadDir(string(l.subtree()))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the VMs' cgroups: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && config.ValidName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
