package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"strings"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/storage"
	"github.com/clawvm/clawvm/vmm"
	"github.com/clawvm/clawvm/vmm/cloudhypervisor"
	"github.com/clawvm/clawvm/vmm/qemu"
)

// Planned is a part of what a VM's next `up` would do.
type Planned struct {
	Step string // of up
	Text string // what it would do or find; empty where Err says why it could not
	Err  error
}

// Preview says what the next `up` of a VM would do, as far as that can be said without making anything. The steps are up's own, where
// they change nothing.
func Preview(ctx context.Context, l Layout, name string) []Planned {
	s := &Supervisor{layout: l, paths: l.VM(name), name: name, journal: newJournal(), log: log.New(io.Discard, "", 0)}
	p := &preview{life: &life{Supervisor: s}}
	if err := p.life.loadDeclaration(ctx); err != nil {
		return []Planned{{Step: "declaration", Err: err}}
	}
	st, err := l.Dial(name).Status(ctx)
	p.up = err == nil && st.State != Stopped
	if p.up {
		p.say("state", "it is %s: `up` leaves it alone, `restart` does this", st.State)
	}
	p.say("declaration", "%s: %d vCPUs, %s of memory", p.life.vm.File, p.life.vm.VCPUs, p.life.vm.Memory)
	p.secrets(ctx)
	p.image(ctx)
	p.vmm(ctx)
	p.kernel()
	p.network(ctx)
	p.disks()
	return p.all
}

type preview struct {
	life *life
	up   bool
	all  []Planned
}

func (p *preview) say(step, format string, args ...any) {
	p.all = append(p.all, Planned{Step: step, Text: fmt.Sprintf(format, args...)})
}

func (p *preview) fail(step string, err error) { p.all = append(p.all, Planned{Step: step, Err: err}) }

// either says text when err is nil.
func (p *preview) either(step string, err error, format string, args ...any) {
	if err != nil {
		p.fail(step, err)
		return
	}
	p.say(step, format, args...)
}

func (p *preview) secrets(ctx context.Context) {
	err := p.life.checkSecrets(ctx)
	if n := len(p.life.secrets); n > 0 || err != nil {
		p.either("secrets", err, "%d, each with its source", n)
	}
}

func (p *preview) image(ctx context.Context) {
	if err := p.life.openImage(ctx); err != nil {
		p.fail("image", err)
		return
	}
	p.say("image", "%s, %s", p.life.vm.Image, p.life.image.Digest)
}

func (p *preview) vmm(ctx context.Context) {
	facts := vmm.LookHost()
	chosen, why, err := vmm.Choose(p.life.vm.VMM, facts)
	version := ""
	if err == nil {
		var program vmm.VMM = qemu.New(facts.QEMU)
		if chosen == vmm.CloudHypervisor {
			program = cloudhypervisor.New(facts.CloudHypervisor)
		}
		version, err = program.Version(ctx)
	}
	p.either("VMM", err, "%s %s: %s", chosen, version, why)
	p.life.virtiofsd, err = storage.FindVirtiofsd(ctx)
	if err != nil {
		p.fail("shares", err)
	}
}

func (p *preview) kernel() {
	k, err := kernel.Find(p.life.vm.Kernel, p.life.layout.Store())
	if err == nil {
		_, err = initBinary()
	}
	if err != nil {
		p.fail("kernel", err)
		return
	}
	p.say("kernel", "%s (%s)", k.Release, k.Origin)
}

func (p *preview) network(ctx context.Context) {
	l := p.life
	leases := network.Leases{Dir: l.layout.Leases(), Subnet: l.hostConfig.Address}
	held, ok, err := leases.Lookup(l.name)
	if err == nil {
		err = l.checkAddress(ctx)
	}
	switch want := l.vm.Address; {
	case err != nil:
		p.fail("address", err)
	case ok && (!want.IsValid() || want == held):
		p.say("address", "%v, which it holds", held)
	case want.IsValid():
		p.say("address", "%v, as declared", want)
	default:
		p.say("address", "the lowest free one of %v", l.hostConfig.Address.Masked())
	}
	if l.layout.ID != "" {
		if err := l.checkBridge(ctx); err != nil {
			p.fail("bridge", err)
		}
	}
	if err := l.checkShares(ctx); err != nil {
		p.fail("shares", err)
	} else if n := len(l.vm.Shares); n > 0 {
		p.say("shares", "%d of the host's directories", n)
	}
	if len(l.vm.Ports) == 0 {
		return
	}
	var ports []string
	for _, port := range l.vm.Ports {
		ports = append(ports, portText(port))
	}
	if !p.up { // one that is up listens there itself
		err = l.checkPorts(ctx)
	}
	p.either("ports", err, "%s", strings.Join(ports, ", "))
}

func (p *preview) disks() {
	for _, d := range p.life.layout.Disks(p.life.vm) {
		step := "disks"
		state, err := storage.LookDisk(d.Disk)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			p.say(step, "makes %s (%s)", d.Name, config.Size(d.Size))
		case err != nil:
			p.fail(step, err)
		case p.up:
		case state.Errors:
			p.say(step, "reads all of %s, in which the guest found an error", d.Name)
		case state.Unfinished:
			p.say(step, "finishes what is in the journal of %s", d.Name)
		default:
			p.say(step, "takes %s as it is", d.Name)
		}
	}
}

// NamedDisk is a disk of a VM, and what it is called by people.
type NamedDisk struct {
	storage.Disk
	Name string
}

// Disks are the disks that a declaration makes.
func (l Layout) Disks(vm *config.VM) []NamedDisk {
	paths := l.VM(vm.Name)
	var all []NamedDisk
	if vm.Overlay.Size > 0 {
		all = append(all, NamedDisk{storage.Disk{Path: paths.OverlayDisk(), Size: int64(vm.Overlay.Size), Label: overlayID}, "the overlay"})
	}
	for _, v := range vm.Volumes {
		all = append(all, NamedDisk{storage.Disk{Path: paths.VolumeDisk(v.Name), Size: int64(v.Size), Label: v.Name}, "the volume " + v.Name})
	}
	return all
}

// LoadVM reads the host's settings and the declaration of a VM.
func (l Layout) LoadVM(name string) (*config.Host, *config.VM, error) { return l.load(name) }

// Running says whether a VM has a supervisor. An error means that it could not be looked.
func (l Layout) Running(name string) (bool, error) { return locked(l.VM(name).Lock()) }

// Init finds the guest's init. An error says where it was looked for.
func Init() (string, error) { return initBinary() }
