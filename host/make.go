package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	osuser "os/user"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/network/egress"
	"github.com/clawvm/clawvm/network/egress/policy"
	"github.com/clawvm/clawvm/secrets"
	"github.com/clawvm/clawvm/storage"
	"github.com/clawvm/clawvm/vmm"
)

// cleanUp removes what an earlier life that was killed left: processes first, so
// that nothing holds the rest.
func (l *life) cleanUp(context.Context) error {
	killed, err := killMarked(l.layout.Mark(l.name))
	if err != nil {
		return err
	}
	if killed > 0 {
		l.note("left-overs", "ended %d processes of a start that was killed", killed)
	}
	users, err := l.users()
	if err != nil {
		return err
	}
	if err := awaitEnds(users...); err != nil {
		return err
	}
	return l.clearRun()
}

// clearRun empties the run directory but for what the supervisor itself holds.
func (l *life) clearRun() error {
	entries, err := os.ReadDir(l.paths.Run)
	if err != nil {
		return err
	}
	keep := []string{l.paths.Lock(), l.paths.Control(), l.paths.UnitWeight()}
	var errs []error
	for _, e := range entries {
		if path := filepath.Join(l.paths.Run, e.Name()); !slices.Contains(keep, path) {
			errs = append(errs, removeRun(path))
		}
	}
	return errors.Join(errs...)
}

// ids are the uids (and gids of the same number) of a VM's two unprivileged
// processes.
type ids struct{ vmm, gate int }

// idsOf gives each address of the subnet two uids.
func idsOf(base uint32, index int) ids {
	return ids{vmm: int(base) + 2*index, gate: int(base) + 2*index + 1}
}

// lease takes the VM's address, and with it its uids.
func (l *life) lease(context.Context) error {
	h := l.hostConfig
	leases := network.Leases{Dir: l.layout.Leases(), Subnet: h.Address}
	var err error
	if l.address, err = leases.Acquire(l.name, l.vm.Address); err != nil {
		return coded(ExitDeclaration, err)
	}
	l.index = leases.Index(l.address)
	l.ids = idsOf(h.UIDBase, l.index)
	for _, id := range []int{l.ids.vmm, l.ids.gate} {
		if u, err := osuser.LookupId(strconv.Itoa(id)); err == nil {
			return coded(ExitDeclaration, fmt.Errorf("uid %d, which the VM would run as, is user %s of this host; set another uidBase in %s", id, u.Username, l.layout.HostConfig()))
		}
	}
	l.bridge = network.Bridge{Name: h.Bridge, Address: h.Address, Owner: l.layout.ID}
	l.rules = network.Rules{Bridge: l.bridge, Lock: l.layout.RulesLock()}
	l.update(func(st *Status) { st.Address = l.address.String() })
	// The lease is the name's, not the run's: it stays when the VM ends.
	return nil
}

// Serials of disks, and tags of shares, as the guest finds them.
const (
	overlayID  = "overlay"
	volumeID   = "volume%d"
	storeTag   = "store"
	secretsTag = "secrets"
	shareTag   = "share%d"
)

// prepareDisks makes the disks that are not there yet, checks those that are,
// and hands them to the VMM's uid.
func (l *life) prepareDisks(ctx context.Context) error {
	// The VMM's uid passes through; the secrets below are closed to it.
	if err := makeDir(l.paths.State, 0o711, 0, 0); err != nil {
		return err
	}
	if len(l.vm.Volumes) > 0 {
		if err := makeDir(filepath.Dir(l.paths.VolumeDisk("x")), 0o711, 0, 0); err != nil {
			return err
		}
	}
	l.disks = nil
	if l.vm.Overlay.Size > 0 {
		if err := l.prepareDisk(ctx, overlayID, storage.Disk{Path: l.paths.OverlayDisk(), Size: int64(l.vm.Overlay.Size), Label: overlayID}); err != nil {
			return fmt.Errorf("overlay: %w", err)
		}
	}
	for i, v := range l.vm.Volumes {
		if err := l.prepareDisk(ctx, fmt.Sprintf(volumeID, i), storage.Disk{Path: l.paths.VolumeDisk(v.Name), Size: int64(v.Size), Label: v.Name}); err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
	}
	return nil
}

func (l *life) prepareDisk(ctx context.Context, id string, d storage.Disk) error {
	created, err := storage.EnsureDisk(ctx, d)
	if err != nil {
		return err
	}
	if err := storage.HandOver(d, l.ids.vmm, l.ids.vmm); err != nil {
		return err
	}
	if !created {
		if err := storage.CheckDisk(ctx, d, l.ids.vmm, l.ids.vmm); err != nil {
			return err
		}
	}
	l.disks = append(l.disks, vmm.Disk{ID: id, Path: l.layout.relative(d.Path)})
	return nil
}

// secretsSize bounds the tmpfs of a VM's secrets.
const secretsSize = 16 << 20

// stageSecrets copies the secrets into a tmpfs that this process alone sees, and
// stages them anew whenever a source changes.
func (l *life) stageSecrets(context.Context) error {
	if len(l.secrets) == 0 {
		return nil
	}
	dir := l.paths.Secrets()
	if err := makeDir(dir, 0o755, 0, 0); err != nil {
		return err
	}
	if err := storage.MountTmpfs(dir, secretsSize, 0o755); err != nil {
		return err
	}
	l.undo.push("the secrets' tmpfs", func() error {
		l.staging.Lock()
		defer l.staging.Unlock()
		l.staged = false
		return errors.Join(storage.Unmount(dir), os.Remove(dir))
	})
	l.staging.Lock()
	err := l.stage().Write(l.secrets)
	l.staged = err == nil
	l.staging.Unlock()
	if err != nil {
		return coded(ExitDeclaration, err)
	}
	l.watchSecrets()
	l.undo.push("the watch of the secrets' sources", l.unwatchSecrets)
	return nil
}

func (l *life) stage() secrets.Stage {
	return secrets.Stage{Dir: l.paths.Secrets(), Keep: l.paths.KeptSecrets()}
}

// restage replaces the staged secrets by what their sources hold now; all or, if
// one is unusable, none.
func (l *life) restage() error {
	l.staging.Lock()
	defer l.staging.Unlock()
	if !l.staged {
		// Without the tmpfs they would land on a disk; a start reads them anyway.
		return fmt.Errorf("VM %s has no staged secrets now: it declares none, or is starting or ending", l.name)
	}
	if err := secrets.Check(l.paths.KeptSecrets(), l.secrets); err != nil {
		return err
	}
	return l.stage().Write(l.secrets)
}

// attachPort makes the bridge and the VM's port of it.
func (l *life) attachPort(context.Context) error {
	notes, err := network.EnsureBridge(l.bridge)
	if err != nil {
		return err
	}
	for _, n := range notes {
		l.note("bridge", "%s", n)
	}
	p := l.port()
	// A TAP that an earlier life left may have another owner.
	if err := l.bridge.RemovePort(p); err != nil {
		if errors.Is(err, network.ErrNotOurs) {
			err = fmt.Errorf("%w; remove it (ip link del %s), or declare another `tap:`", err, p.TAP)
		}
		return err
	}
	l.undo.push("the port", func() error { return l.bridge.RemovePort(p) })
	return l.bridge.EnsurePort(p)
}

func (l *life) port() network.Port {
	p := network.Port{VM: l.name, TAP: l.vm.TAP, MAC: network.MAC(l.address), Address: l.address, UID: l.ids.vmm, GID: l.ids.vmm}
	if p.TAP == "" {
		p.TAP = network.TAPName(l.address)
	}
	if l.vm.MAC != "" {
		// The declaration's check has parsed it before.
		if mac, err := net.ParseMAC(l.vm.MAC); err == nil {
			p.MAC = mac
		}
	}
	return p
}

// openSockets opens what the gate works on and could not open itself.
func (l *life) openSockets(context.Context) error {
	l.undo.push("the gate's sockets", func() error {
		err := l.sockets.close()
		if rerr := os.Remove(l.paths.GateSocket()); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		return err
	})
	if err := l.sockets.openResolver(l.hostConfig.Address.Addr()); err != nil {
		return err
	}
	if err := l.sockets.openFlows(l.index); err != nil {
		return err
	}
	f, err := egress.OpenConntrack(l.address)
	if err := l.sockets.add(gate.FileConntrack, f, err); err != nil {
		return err
	}
	for i, p := range l.vm.Ports {
		if err := l.sockets.openPort(i, p); err != nil {
			return err
		}
	}
	if err := l.sockets.openConsole(); err != nil {
		return err
	}
	return l.sockets.openExec(l.paths.GateSocket())
}

// guestRules is what the packet filter has to know of the VM.
func (l *life) guestRules() network.Guest {
	p := l.port()
	return governed(network.Guest{
		VM: l.name, TAP: p.TAP, MAC: p.MAC, Address: l.address,
		Resolver: l.sockets.resolverPort, LogGroup: l.sockets.logGroup, NoGateway: l.vm.NoGateway,
	}, l.policySpec(l.vm))
}

// applyRules puts the VM's packet filter rules in place before anything can send
// a packet, and keeps them there when someone flushes the host's rule set.
func (l *life) applyRules(ctx context.Context) error {
	g := l.guestRules()
	l.undo.push("the packet filter rules", func() error { return l.rules.Remove(l.name, l.address) })
	l.ruled.Store(&g)
	if err := l.rules.Ensure(g); err != nil {
		return err
	}
	l.pins = newPins(policy.New(l.policySpec(l.vm)), l.rules.Pinner(l.name))
	l.undo.push("the pinned addresses", l.pins.close)
	// Only now: the rules are what makes the kernel load connection tracking.
	changed, err := egress.EnableAccounting()
	if err != nil {
		return err
	}
	if changed {
		l.note("rules", "net.netfilter.nf_conntrack_acct and nf_conntrack_timestamp were 0, are 1")
	}
	watch, cancel := context.WithCancel(context.WithoutCancel(ctx))
	watching := make(chan error, 1)
	go func() {
		watching <- l.rules.Watch(watch, func() {
			if err := l.rules.Ensure(*l.ruled.Load()); err != nil {
				l.logf("someone removed the packet filter rules, and they cannot be put back: %v", err)
				return
			}
			if err := l.pins.restore(); err != nil {
				l.logf("someone removed the packet filter rules: they are back, but for what the VM had looked up: %v", err)
				return
			}
			l.logf("someone removed the packet filter rules: they are back")
		})
	}()
	l.undo.push("the watch of the packet filter rules", func() error {
		cancel()
		if err := <-watching; err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
	return nil
}

// startGate starts the unprivileged half. From here on the supervisor keeps no
// copy of the sockets, so that a gate which is gone refuses and does not hang.
func (l *life) startGate(context.Context) error {
	if err := makeDir(l.paths.Log, 0o755, 0, 0); err != nil {
		return err
	}
	if err := ownLogs(l.paths.GateLogs(), l.ids.gate); err != nil {
		return err
	}
	if err := makeDir(l.paths.VMM(), 0o750, 0, l.ids.vmm); err != nil {
		return err
	}
	l.undo.push("the VMM's directory", func() error { return os.RemoveAll(l.paths.VMM()) })
	l.machine = l.describeMachine()
	channel, err := l.vmmProgram.OpenChannel(&l.machine)
	if err != nil {
		return err
	}
	l.machine.Agent = channel
	l.undo.push("the agent's channel", channel.Close)

	c := gate.Config{
		VM: l.name, Address: l.address, Naming: l.naming(l.vm),
		Resolver:     netip.AddrPortFrom(l.hostConfig.Address.Addr(), l.sockets.resolverPort),
		AgentListens: channel.Listening, InstructionClock: l.machine.InstructionClock, Logs: l.layout.relative(l.paths.GateLogs()),
	}
	l.reachable = make(map[uint16]bool)
	for _, p := range l.vm.Ports {
		c.Ports = append(c.Ports, forward(p))
		l.reachable[p.GuestPort] = true
	}
	pins, end, err := gate.Pair()
	if err != nil {
		return err
	}
	l.undo.push("the gate's connection for addresses", func() error { return errors.Join(pins.Close(), closeFile(end)) })
	files := append(l.sockets.files, namedFile{gate.FileAgent, channel.Host}, namedFile{gate.FilePins, end})
	if l.gate, err = l.startGateProcess(c, files); err != nil {
		return err
	}
	go l.servePins(pins)
	// Before the gate goes: it logs the ends of the connections that are cut. And
	// whoever gets the address next must not get their answers.
	l.undo.push("the guest's connections", func() error {
		_, err := egress.CutFlows(l.address, nil)
		return err
	})
	var errs []error
	for _, f := range files {
		errs = append(errs, closeFile(f.file))
	}
	l.sockets.files = nil
	return errors.Join(errs...)
}

// naming is how the VM's names are resolved.
func (l *life) naming(vm *config.VM) gate.Naming {
	n := gate.Naming{Policy: l.policySpec(vm)}
	for _, a := range vm.Nameservers {
		n.Upstreams = append(n.Upstreams, netip.AddrPortFrom(a, dnsPort))
	}
	return n
}

// dnsPort is where name servers listen.
const dnsPort = 53

// forward is a published port as the gate is told of it.
func forward(p config.Port) gate.Forward {
	return gate.Forward{Host: netip.AddrPortFrom(p.HostAddress, p.HostPort).String(), Guest: p.GuestPort}
}

// ownLogs makes the gate's log directory and gives it, and the files in it, to
// the gate's uid, which changes with the VM's address.
func ownLogs(dir string, uid int) error {
	if err := makeDir(dir, 0o750, uid, uid); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.Lchown(filepath.Join(dir, e.Name()), uid, uid))
	}
	return errors.Join(errs...)
}
