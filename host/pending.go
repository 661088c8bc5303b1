package host

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/vmm"
	"github.com/clawvm/clawvm/vmm/cloudhypervisor"
	"github.com/clawvm/clawvm/vmm/qemu"
)

// Version is clawvm's own, as its build says. Whoever makes the program sets it
// before anything else.
var Version = "devel"

// Made is what a VM was started with: what it goes by until its owner starts it
// again, whatever is installed, built or written meanwhile.
type Made struct {
	Clawvm      string `json:"clawvm"`               // the supervisor's version
	VMM         string `json:"vmm,omitempty"`        // the VMM's version
	Declaration string `json:"declaration"`          // stands for the effective declaration; see config.Digest
	ImageName   string `json:"imageName,omitempty"`  // what the declaration calls the image
	KernelFile  string `json:"kernelFile,omitempty"` // the path of the kernel's image
	Program     string `json:"program,omitempty"`    // the path of clawvm's file
	VMMProgram  string `json:"vmmProgram,omitempty"` // the path of the VMM's file
	// Files are the three files as they were; see identity.
	Files map[string]string `json:"files,omitempty"`
}

// Pending is a difference between a running VM and what its next start would be.
type Pending struct {
	What  string `json:"what"`  // PendingDeclaration, …
	Needs string `json:"needs"` // NeedsReload or NeedsRestart
	config.Change
}

// What a Pending is about.
const (
	PendingDeclaration = "declaration" // Field is the declaration's
	PendingImage       = "image"       // the name stands for another image
	PendingKernel      = "kernel"
	PendingVMM         = "vmm"
	PendingClawvm      = "clawvm"
)

// What makes a Pending hold.
const (
	NeedsReload  = "reload"
	NeedsRestart = "restart"
)

// liveFields are the fields of a declaration that reload can change.
var liveFields = []string{"secrets", "ports", "nameservers", "egress"}

// String is the difference for a person.
func (p Pending) String() string {
	switch p.What {
	case PendingDeclaration:
		return p.Change.String()
	case PendingImage:
		return fmt.Sprintf("image %s is now %s", p.Field, short(p.Is))
	}
	return fmt.Sprintf("%s %s → %s", p.Field, p.Was, p.Is)
}

// short is as much of a digest as people compare.
func short(digest string) string { return digest[:min(len(digest), len("sha256:")+12)] }

// record notes what the VM is made of, for Status.
func (l *life) record() error {
	fields := l.vm.Fields()
	made := &Made{
		Clawvm: Version, VMM: l.vmmVersionText, Declaration: config.Digest(fields), ImageName: l.vm.Image,
		KernelFile: l.kernel.Image, VMMProgram: l.vmmFile(), Files: map[string]string{},
	}
	var err error
	// Its path, also when the file was replaced meanwhile.
	if made.Program, err = os.Executable(); err != nil {
		return err
	}
	for _, path := range []string{made.KernelFile, made.Program, made.VMMProgram} {
		if made.Files[path], err = identity(path); err != nil {
			return err
		}
	}
	if first := l.first; first != nil && first.made != nil {
		// The supervisor is the one that it was, and so is the kernel.
		made.Files[made.Program], made.Files[made.KernelFile] = first.made.Files[made.Program], first.made.Files[made.KernelFile]
	}
	l.update(func(st *Status) { st.Made = made })
	l.setFields(fields)
	return nil
}

func (l *life) vmmFile() string {
	if l.vmmProgram.Name() == vmm.CloudHypervisor {
		return l.hostFacts.CloudHypervisor
	}
	return l.hostFacts.QEMU
}

// setFields keeps the declaration that the VM goes by, for who compares.
func (s *Supervisor) setFields(fields []config.Field) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fields = fields
	if m := s.status.Made; m != nil {
		changed := *m // others may read the old one
		changed.Declaration = config.Digest(fields)
		s.status.Made = &changed
	}
}

func (s *Supervisor) declaration() []config.Field {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fields
}

// beginning is what a supervisor's first life was made of. The guest's reboots and
// the starts after a fault are of the same: a file that is being edited, or an image
// that has just been built, waits until the owner starts the VM again.
type beginning struct {
	hostConfig *config.Host
	vm         *config.VM // as reloaded
	image      string     // digest
	kernel     *kernel.Kernel
	boot       *kernel.Boot
	made       *Made
}

// begin keeps what the life is made of, if it is the first that is ready.
func (l *life) begin() {
	if l.first == nil {
		l.first = &beginning{l.hostConfig, l.vm, l.image.Digest, l.kernel, l.boot, l.Status().Made}
	}
}

// bootKeep is how often the boot files of a running VM are said to be in use: well
// within bootUnused.
const bootKeep = bootUnused / 7

// keepBoot says so, until stop. The guest's next reboot needs them.
func (l *life) keepBoot() (stop func() error) {
	done := make(chan struct{})
	var all sync.WaitGroup
	boot := l.boot
	all.Go(func() {
		tick := time.NewTicker(bootKeep)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if !boot.Use(context.Background(), l.layout.BootCache()) {
					l.logf("the boot files are gone: the guest's next reboot makes them anew")
				}
			case <-done:
				return
			}
		}
	})
	return func() error {
		close(done)
		all.Wait()
		return nil
	}
}

// DropOverlay removes the overlay disk of a VM that is down: its next start begins
// with the image as it is. Volumes and kept secrets stay.
func DropOverlay(ctx context.Context, l Layout, name string) error {
	p := l.VM(name)
	lock, err := l.lockVM(ctx, name)
	if errors.Is(err, errLocked) {
		return fmt.Errorf("cannot recreate VM %s: it was started again meanwhile", name)
	}
	if err != nil {
		return fmt.Errorf("cannot recreate VM %s: %w", name, err)
	}
	defer lock.Close()
	if err := os.Remove(p.OverlayDisk()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot recreate VM %s: %w", name, err)
	}
	return nil
}

// outlook finds out what the next starts of VMs would be made of. What many VMs
// share is found once.
type outlook struct {
	layout Layout

	mu      sync.Mutex
	kernels map[string]*kernel.Kernel // by what is declared; nil: there is none
	files   map[string]string         // identities
	digests map[string]string         // of images, by name

	glance, look func() vmm.Facts // what the host can do: at first sight, and tried

	readLeases sync.Once
	leases     map[string]netip.Addr // by VM
}

func newOutlook(l Layout) *outlook {
	return &outlook{
		layout: l, kernels: map[string]*kernel.Kernel{}, files: map[string]string{}, digests: map[string]string{},
		glance: sync.OnceValue(vmm.GlanceHost), look: sync.OnceValue(vmm.LookHost),
	}
}

// chosen is the VMM that the next start of a VM would choose, where the choice is
// the host's; else it is the one that runs.
func (o *outlook) chosen(declared, runs string) string {
	if declared != config.VMMAuto {
		return runs
	}
	if name, _, err := vmm.Choose(declared, o.glance()); err != nil || name == runs {
		return runs
	}
	name, _, err := vmm.Choose(declared, o.look())
	if err != nil {
		return runs
	}
	return name
}

// cached is the answer to a question that is asked once.
func cached[T any](o *outlook, known map[string]T, key string, find func() T) T {
	o.mu.Lock()
	defer o.mu.Unlock()
	v, ok := known[key]
	if !ok {
		v = find()
		known[key] = v
	}
	return v
}

// pending compares a running VM with what its next start would be. What can't be
// found out is not pending: it is the next start's to refuse.
func (o *outlook) pending(ctx context.Context, client *Client, st Status, vm *config.VM) []Pending {
	made := st.Made
	if made == nil {
		return nil // an older supervisor, or one that starts
	}
	var all []Pending
	add := func(what, field, was, is string) {
		all = append(all, Pending{what, NeedsRestart, config.Change{Field: field, Was: was, Is: is}})
	}
	is := vm.Fields()
	if config.Digest(is) != made.Declaration {
		was, err := client.Declaration(ctx)
		if err != nil {
			return nil // it has just ended
		}
		for _, c := range config.Changes(was, is) {
			needs := NeedsRestart
			if slices.Contains(liveFields, c.Top()) {
				needs = NeedsReload
			}
			all = append(all, Pending{PendingDeclaration, needs, c})
		}
	}
	if vm.Image == made.ImageName {
		if d := o.digest(vm.Image); d != "" && d != st.Image {
			add(PendingImage, vm.Image, st.Image, d)
		}
	}
	if k := o.kernel(vm.Kernel); k != nil {
		if k.Release != st.Kernel {
			add(PendingKernel, "kernel", st.Kernel, k.Release)
		} else if k.Image == made.KernelFile && o.replaced(made, k.Image) {
			add(PendingKernel, "kernel", st.Kernel, "another build of it")
		}
	}
	if chosen := o.chosen(vm.VMM, st.VMM); chosen != st.VMM {
		add(PendingVMM, "vmm", st.VMM, chosen)
	} else if o.replaced(made, made.VMMProgram) {
		if now := o.vmmVersion(ctx, st.VMM, made.VMMProgram); now != "" && now != made.VMM {
			add(PendingVMM, st.VMM, made.VMM, now)
		}
	}
	if o.replaced(made, made.Program) {
		switch self, err := os.Executable(); {
		case err != nil || self != made.Program:
			add(PendingClawvm, "clawvm", made.Clawvm, "another")
		case Version != made.Clawvm:
			add(PendingClawvm, "clawvm", made.Clawvm, Version)
		case Version == "devel":
			add(PendingClawvm, "clawvm", Version, "another build")
		}
	}
	return all
}

// replaced says whether another file lies at the path now.
func (o *outlook) replaced(made *Made, path string) bool {
	was := made.Files[path]
	now := cached(o, o.files, path, func() string {
		if _, err := os.Stat(path); err != nil {
			return "" // removed, which is no upgrade
		}
		id, err := identity(path)
		if err != nil {
			return ""
		}
		return id
	})
	return was != "" && now != "" && was != now
}

// lease is the address that a VM holds. The directory is read once, whoever asks:
// with a thousand VMs each has a thousand names.
func (o *outlook) lease(vm string, subnet netip.Prefix) (netip.Addr, bool) {
	o.readLeases.Do(func() {
		// Leases that can't be read are the next start's to refuse.
		o.leases, _ = network.Leases{Dir: o.layout.Leases(), Subnet: subnet}.ByVM()
	})
	a, ok := o.leases[vm]
	return a, ok
}

func (o *outlook) digest(image string) string {
	return cached(o, o.digests, image, func() string {
		d, err := o.layout.Images().Digest(image)
		if err != nil {
			return ""
		}
		return d
	})
}

func (o *outlook) kernel(declared string) *kernel.Kernel {
	return cached(o, o.kernels, declared, func() *kernel.Kernel {
		k, err := kernel.Find(declared, o.layout.Store())
		if err != nil {
			return nil
		}
		return k
	})
}

// vmmVersion asks an installed VMM for its version, once as long as its program
// stays the same: QEMU takes 30 ms to say it.
func (o *outlook) vmmVersion(ctx context.Context, name, program string) string {
	v, err := programVersion(ctx, o.layout, name, program)
	if err != nil {
		return ""
	}
	return v
}

func programVersion(ctx context.Context, l Layout, name, program string) (string, error) {
	var p vmm.VMM = qemu.New(program)
	if name == vmm.CloudHypervisor {
		p = cloudhypervisor.New(program)
	}
	return remember(filepath.Join(l.Known(), name+".json"), []string{program},
		func(version string) bool { return version != "" },
		func() (string, error) { return p.Version(ctx) })
}

// Reasons are all that is pending, for a person; needs says what makes it hold:
// a restart, unless a reload is enough.
func Reasons(all []Pending) (needs string, reasons []string) {
	for _, p := range all {
		if needs != NeedsRestart {
			needs = p.Needs
		}
		reasons = append(reasons, p.String())
	}
	return needs, reasons
}
