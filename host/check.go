package host

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/guest/openclaw"
	"github.com/clawvm/clawvm/secrets"
	"github.com/clawvm/clawvm/storage"
	"github.com/clawvm/clawvm/vmm"
	"github.com/clawvm/clawvm/vmm/cloudhypervisor"
	"github.com/clawvm/clawvm/vmm/qemu"
)

// Check does the first steps of up, those that change nothing: it says all that
// is wrong with a VM's declaration, or missing on the host.
func Check(ctx context.Context, l Layout, name string) error {
	s := &Supervisor{layout: l, paths: l.VM(name), name: name, checking: true, journal: newJournal(), log: log.New(io.Discard, "", 0)}
	life := &life{Supervisor: s}
	if st, err := l.Dial(name).Status(ctx); err == nil {
		life.own = st.Ports // those that it holds are free when it is started again
	}
	var failed []stepError
	for _, st := range steps() {
		if st.phase != phaseCheck {
			break
		}
		err := st.do(life, ctx)
		if err == nil {
			continue
		}
		failed = append(failed, stepError{st.name, err})
		if life.vm == nil {
			break // the other steps look at what it declares
		}
	}
	if len(failed) > 0 {
		return cannotStart(name, failed...)
	}
	return nil
}

// load reads the host's settings and the declaration of VM name.
func (l Layout) load(name string) (*config.Host, *config.VM, error) {
	hostConfig, err := config.LoadHost(l.HostConfig())
	if err != nil {
		return nil, nil, coded(ExitDeclaration, err)
	}
	file, err := l.Declaration(name)
	if err != nil {
		return nil, nil, err
	}
	vm, err := config.Load(file, hostConfig)
	return hostConfig, vm, coded(ExitDeclaration, err)
}

// loadDeclaration reads the host's settings and the declaration.
func (l *life) loadDeclaration(context.Context) error {
	var err error
	if l.first != nil {
		l.hostConfig, l.vm = l.first.hostConfig, l.first.vm
	} else if l.hostConfig, l.vm, err = l.layout.load(l.name); err != nil {
		return err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("cannot ask for the host's memory: %w", err)
	}
	if have := int64(info.Totalram) * int64(info.Unit); int64(l.vm.Memory) > have {
		return coded(ExitDeclaration, l.vm.Problem("memory", fmt.Sprintf("%s is more than the %s that this host has", l.vm.Memory, config.Size(have>>20<<20)), "less than that"))
	}
	if l.vm.OpenClaw != nil {
		for _, weak := range openclaw.Lint(gatewayProfile(l.vm.OpenClaw)) {
			l.note("declaration", "%s", weak)
		}
	}
	l.mu.Lock()
	l.policy = l.vm.Restart
	l.mu.Unlock()
	l.update(func(st *Status) {
		st.VCPUs, st.Memory = l.vm.VCPUs, int64(l.vm.Memory)
		st.Ports = portTexts(l.vm.Ports)
	})
	return nil
}

// portText is a published port as docker prints it.
func portText(p config.Port) string {
	return fmt.Sprintf("%s:%d->%d/tcp", p.HostAddress, p.HostPort, p.GuestPort)
}

// checkSecrets looks at every source, so that a missing secret stops the start
// before anything is made.
func (l *life) checkSecrets(ctx context.Context) error {
	l.secrets = declaredSecrets(l.vm)
	if err := findCredentials(ctx, l.layout, l.name, l.secrets, !l.checking); err != nil {
		return err
	}
	return coded(ExitDeclaration, secrets.Check(l.paths.KeptSecrets(), l.secrets))
}

// declaredSecrets are a declaration's secrets, without the numbers of their
// owners, which only the image knows.
func declaredSecrets(vm *config.VM) []secrets.Secret {
	var list []secrets.Secret
	for _, s := range vm.Secrets {
		list = append(list, secrets.Secret{
			VM: vm.Name, Name: s.Name, File: s.File, Credential: s.Credential, Generate: s.Generate, Stdin: s.Stdin, Mode: os.FileMode(s.Mode),
		})
	}
	return list
}

// Secrets are the secrets that the declaration of VM name has.
func Secrets(ctx context.Context, l Layout, name string) ([]secrets.Secret, error) {
	_, vm, err := l.load(name)
	if err != nil {
		return nil, err
	}
	list := declaredSecrets(vm)
	return list, findCredentials(ctx, l, name, list, false)
}

// user is who the workload runs as.
type user struct {
	name     string
	uid, gid int
}

// openImage finds the image in the store, checks it against its manifest, and
// looks up the users that the declaration names.
func (l *life) openImage(ctx context.Context) error {
	store := storage.Store{Dir: l.layout.Store()}
	var err error
	ref := l.vm.Image
	if l.first != nil {
		ref = l.first.image
	}
	if l.image, err = store.Open(ref); err != nil {
		return coded(ExitDeclaration, err)
	}
	l.update(func(st *Status) { st.Image = l.image.Digest })
	if l.user, err = l.lookUp(workloadUser(l.vm)); err != nil {
		return coded(ExitDeclaration, err)
	}
	l.secrets, err = l.ownedSecrets(ctx, l.vm)
	return err
}

// ownedSecrets are a declaration's secrets, with the numbers that their owners
// have in the image.
func (l *life) ownedSecrets(ctx context.Context, vm *config.VM) ([]secrets.Secret, error) {
	list := declaredSecrets(vm)
	if err := findCredentials(ctx, l.layout, l.name, list, !l.checking); err != nil {
		return nil, err
	}
	for i, s := range vm.Secrets {
		owner := l.user
		if s.Owner != "" {
			var err error
			if owner, err = l.lookUp(s.Owner); err != nil {
				return nil, coded(ExitDeclaration, fmt.Errorf("cannot use secret %s: its owner: %w", s.Name, err))
			}
		}
		list[i].UID, list[i].GID = owner.uid, owner.gid
	}
	return list, nil
}

// lookUp finds a user, by name or as UID[:GID], in the image.
func (l *life) lookUp(name string) (user, error) {
	if name == "" {
		name = "root"
	}
	who, group, pair := strings.Cut(name, ":")
	uid, gid, _, err := l.image.LookupUser(who)
	if err != nil {
		return user{}, err
	}
	if pair {
		if gid, err = strconv.Atoi(group); err != nil {
			return user{}, fmt.Errorf("cannot look up the user %q: the group after the colon is not a number", name)
		}
	}
	return user{who, uid, gid}, nil
}

// chooseVMM decides what runs the guest, and finds the virtiofsd that serves it.
func (l *life) chooseVMM(ctx context.Context) error {
	l.hostFacts = vmm.LookHost()
	chosen, why, err := vmm.Choose(l.vm.VMM, l.hostFacts)
	if err != nil {
		return coded(ExitDeclaration, err)
	}
	switch chosen {
	case vmm.CloudHypervisor:
		l.vmmProgram = cloudhypervisor.New(l.hostFacts.CloudHypervisor)
	default:
		q := qemu.New(l.hostFacts.QEMU)
		q.KVM = l.hostFacts.Hardware()
		l.vmmProgram = q
	}
	version, err := programVersion(ctx, l.layout, chosen, l.vmmFile())
	if err != nil {
		return coded(ExitDeclaration, err)
	}
	l.vmmVersionText = version
	l.emulated = !l.hostFacts.Hardware()
	l.update(func(st *Status) { st.VMM = chosen })
	l.note("VMM", "%s %s: %s", chosen, version, why)
	if l.virtiofsd, err = storage.FindVirtiofsd(ctx); err != nil {
		return coded(ExitDeclaration, err)
	}
	return nil
}

// prepareKernel finds the guest's kernel and makes, once per kernel and version,
// what the VMM loads.
func (l *life) prepareKernel(ctx context.Context) error {
	if f := l.first; f != nil && f.boot.Use(ctx, l.layout.BootCache()) {
		l.kernel, l.boot = f.kernel, f.boot
		return nil
	}
	var err error
	if l.kernel, err = kernel.Find(l.vm.Kernel, l.layout.Store()); err != nil {
		return coded(ExitDeclaration, err)
	}
	init, err := initBinary()
	if err != nil {
		return err
	}
	l.update(func(st *Status) { st.Kernel = l.kernel.Release })
	l.boot, err = l.bootFiles(ctx, init)
	return err
}

// ownProgram is the program that runs, also when its file was replaced meanwhile.
const ownProgram = "/proc/self/exe"

// bootFiles are what the VMM loads. Making them anew to find that they are there
// would read and hash the kernel, its modules and the guest's init.
func (l *life) bootFiles(ctx context.Context, init string) (*kernel.Boot, error) {
	// depmod(8) rewrites these lists whenever modules change. What is made of them is this program's decision.
	on := []string{l.kernel.Image, init, ownProgram}
	if m := l.kernel.Modules; m != "" {
		on = append(on, m, filepath.Join(m, "modules.dep"), filepath.Join(m, "modules.builtin"))
	}
	name := sha256.Sum256([]byte(l.kernel.Image))
	file := filepath.Join(l.layout.Known(), "boot-"+hex.EncodeToString(name[:8])+".json")
	inUse := func(b *kernel.Boot) bool { return b.Use(ctx, l.layout.BootCache()) }
	return remember(file, on, inUse, func() (*kernel.Boot, error) {
		return kernel.Prepare(ctx, l.kernel, init, l.layout.BootCache())
	})
}

// initVariable names the guest's init where it isn't installed, as in tests.
const initVariable = "CLAWVM_INIT"

// initBinary finds the guest's init: beside this program, or where make install
// puts it.
func initBinary() (string, error) {
	if named := os.Getenv(initVariable); named != "" {
		return named, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("cannot find the program's own file: %w", err)
	}
	dir := filepath.Dir(self)
	candidates := []string{
		filepath.Join(dir, "clawvm-init"),
		filepath.Join(dir, "../lib/clawvm/clawvm-init"),
	}
	for _, c := range candidates {
		if _, err := os.Stat(c); err == nil {
			return c, nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("cannot use the guest's init: %w", err)
		}
	}
	return "", fmt.Errorf("cannot find the guest's init clawvm-init (looked at %s): install clawvm again, or set %s", strings.Join(candidates, " and "), initVariable)
}
