package host

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/internal/durable"
)

// sunPathMax is the longest path of a unix socket: sun_path holds 108 bytes
// with the terminating NUL (unix(7)).
const sunPathMax = 107

// longestSocket is the longest path of a socket below a root that is reached by
// its absolute path, for the longest VM name (32 bytes). The VMM's sockets are
// reached from inside the root, see Layout.relative.
const longestSocket = "/run/clawvm/" + "nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn" + "/control.sock"

// Layout says where everything of one clawvm root lies. Two roots on one host
// share nothing: each has an id of its own in every owner mark.
type Layout struct {
	// Root is "/" for the system's own, or the directory given by --root.
	Root string
	// ID is eight hexadecimal digits, made once and kept in the root.
	ID string
}

// OpenLayout returns the layout of root, which it makes absolute, and makes the
// root's id when there is none. A root whose sockets would be longer than the
// kernel allows is refused.
func OpenLayout(root string) (Layout, error) {
	l, err := layoutBelow(root)
	if err != nil {
		return l, err
	}
	if err := l.makeSkeleton(); err != nil {
		return Layout{}, fmt.Errorf("cannot use root %s: %w", l.Root, err)
	}
	if l.ID, err = ensureID(l.rootID()); err != nil {
		return Layout{}, fmt.Errorf("cannot use root %s: %w", l.Root, err)
	}
	return l, nil
}

// LookLayout is OpenLayout for who changes nothing and needn't be root. The id
// is empty where the root has none yet, or where it can't be read.
func LookLayout(root string) (Layout, error) {
	l, err := layoutBelow(root)
	if err != nil {
		return l, err
	}
	l.ID, err = readID(l.rootID())
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return Layout{}, fmt.Errorf("cannot use root %s: %w", l.Root, err)
	}
	return l, nil
}

// layoutBelow is the layout of root without its id.
func layoutBelow(root string) (Layout, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return Layout{}, fmt.Errorf("cannot use root %s: %w", root, err)
	}
	l := Layout{Root: abs}
	if n := len(l.path(longestSocket)); n > sunPathMax {
		return Layout{}, coded(ExitUsage, fmt.Errorf("cannot use root %s: the sockets below it would have paths of up to %d bytes, and the kernel allows %d; choose one that is %d bytes shorter",
			abs, n, sunPathMax, n-sunPathMax))
	}
	return l, nil
}

func (l Layout) rootID() string { return l.path("/var/lib/clawvm/root-id") }

// makeSkeleton makes the directories that VMs' uids pass through, whatever the
// umask of who makes them first. Those that are there are left alone.
func (l Layout) makeSkeleton() error {
	for _, dir := range []string{"", "/var", "/var/lib", "/var/lib/clawvm", "/var/lib/clawvm/vms", "/var/log", "/var/log/clawvm", "/run", "/run/clawvm"} {
		path := l.path(dir)
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// ensureID reads the id in file, or makes one. Of two that make it at the same
// time one wins, and both return the winner's.
func ensureID(file string) (string, error) {
	id, err := readID(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	raw := make([]byte, 4)
	rand.Read(raw)
	new := hex.EncodeToString(raw)
	// Under a name of its own: of two that begin at once each has its file.
	tmp := filepath.Join(filepath.Dir(file), "."+filepath.Base(file)+"-"+new)
	if err := durable.WriteFile(tmp, []byte(new+"\n"), 0o644); err != nil {
		return "", err
	}
	defer os.Remove(tmp)
	// Link fails when the name exists, so the first one stays.
	if err := durable.Link(tmp, file); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return readID(file)
}

func readID(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(b))
	if raw, err := hex.DecodeString(id); err != nil || len(raw) != 4 {
		return "", fmt.Errorf("%s does not hold eight hexadecimal digits; restore it, or remove it when no VM of this root runs", file)
	}
	return id, nil
}

func (l Layout) path(p string) string { return filepath.Join(l.Root, p) }

// relative is path as the VMM and the gate are given it: relative to the root,
// which is their working directory. They run under uids that may not pass
// through the directories above it, when the root lies in somebody's home.
func (l Layout) relative(path string) string {
	if rel, err := filepath.Rel(l.Root, path); err == nil && !l.IsSystem() {
		return rel
	}
	return path
}

// IsSystem says whether this is the host's own root and not a try-out.
func (l Layout) IsSystem() bool { return l.Root == "/" }

// HostConfig is the file of host-wide settings.
func (l Layout) HostConfig() string { return l.path("/etc/clawvm/clawvm.yaml") }

// Declarations is the directory of the VMs' declarations.
func (l Layout) Declarations() string { return l.path("/etc/clawvm/vms") }

// Store is the directory of images and guest kernels.
func (l Layout) Store() string { return l.path("/var/lib/clawvm/store") }

// BootCache holds each kernel's extracted vmlinux and initramfs. It is not in the
// store, because the VMMs' uids read it.
func (l Layout) BootCache() string { return l.path("/var/lib/clawvm/boot") }

// Downloads is the cache of what image recipes download.
func (l Layout) Downloads() string { return l.path("/var/cache/clawvm") }

// Leases is the directory of address leases.
func (l Layout) Leases() string { return l.path("/var/lib/clawvm/leases") }

// RulesLock is the file that is locked while packet filter rules change.
func (l Layout) RulesLock() string { return l.path("/run/clawvm/.rules.lock") }

// RunRoot is the directory that holds the VMs' run directories.
func (l Layout) RunRoot() string { return l.path("/run/clawvm") }

// StateRoot is the directory that holds the VMs' state directories.
func (l Layout) StateRoot() string { return l.path("/var/lib/clawvm/vms") }

// VM is the part of the layout that belongs to one VM.
func (l Layout) VM(name string) Paths {
	return Paths{
		Run:   l.path("/run/clawvm/" + name),
		State: l.path("/var/lib/clawvm/vms/" + name),
		Log:   l.path("/var/log/clawvm/" + name),
	}
}

// Mark identifies what belongs to a VM of this root: the value of [markVariable]
// in the environment of its processes.
func (l Layout) Mark(name string) string { return "clawvm:" + l.ID + ":" + name }

// Declaration finds the declaration of a VM by its name.
func (l Layout) Declaration(name string) (string, error) {
	if err := config.ValidName(name); err != nil {
		return "", err
	}
	for _, ext := range declarationExtensions {
		file := filepath.Join(l.Declarations(), name+ext)
		if _, err := os.Stat(file); err == nil {
			return file, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", coded(ExitDeclaration, fmt.Errorf("cannot read the declaration of VM %s: %s: %w", name, file, Bare(err)))
		}
	}
	return "", &NotDeclaredError{Name: name, Want: filepath.Join(l.Declarations(), name+declarationExtensions[0])}
}

var declarationExtensions = []string{".yaml", ".yml", ".json"}

// NotDeclaredError is the error of a name without a declaration.
type NotDeclaredError struct{ Name, Want string }

func (e *NotDeclaredError) Error() string {
	return fmt.Sprintf("cannot find VM %s: nothing declares it; write its declaration to %s, or give a file to `clawvm up`", e.Name, e.Want)
}

// Declared lists the names of the VMs that have a declaration, sorted.
func (l Layout) Declared() ([]string, error) {
	entries, err := os.ReadDir(l.Declarations())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the declared VMs: %w", err)
	}
	var names []string
	for _, e := range entries {
		name, ok := declarationName(e.Name())
		if ok && (len(names) == 0 || names[len(names)-1] != name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// declarationName returns the VM's name that a declaration's file name stands for.
func declarationName(file string) (string, bool) {
	for _, ext := range declarationExtensions {
		if name, ok := strings.CutSuffix(filepath.Base(file), ext); ok {
			return name, config.ValidName(name) == nil
		}
	}
	return "", false
}

// Paths are the places of one VM.
type Paths struct {
	Run   string // sockets and what lives as long as the VM runs
	State string // disks, generated secrets
	Log   string // the logs
}

// Lock is the file that the supervisor holds locked while it lives.
func (p Paths) Lock() string { return filepath.Join(p.Run, "lock") }

// Control is the supervisor's socket.
func (p Paths) Control() string { return filepath.Join(p.Run, "control.sock") }

// UnitWeight keeps the weight that the VM's unit had before the declared one was
// set, for as long as that is.
func (p Paths) UnitWeight() string { return filepath.Join(p.Run, "unit-weight") }

// GateSocket is the socket through which exec reaches the guest.
func (p Paths) GateSocket() string { return filepath.Join(p.Run, "gate.sock") }

// VMM is the directory of the VMM's own sockets.
func (p Paths) VMM() string { return filepath.Join(p.Run, "vmm") }

// Secrets is where the VM's tmpfs of secrets is mounted, in the supervisor's
// mount namespace only.
func (p Paths) Secrets() string { return filepath.Join(p.Run, "secrets") }

// Initramfs is the initramfs with this start's boot document.
func (p Paths) Initramfs() string { return filepath.Join(p.Run, "initramfs") }

// OverlayDisk is the writable layer, when it is a disk.
func (p Paths) OverlayDisk() string { return filepath.Join(p.State, "overlay.raw") }

// VolumeDisk is the disk of a volume.
func (p Paths) VolumeDisk(name string) string {
	return filepath.Join(p.State, "volumes", name+".raw")
}

// KeptSecrets holds the values that clawvm keeps: generated ones and those read
// from standard input.
func (p Paths) KeptSecrets() string { return filepath.Join(p.State, "secrets") }

// LastEnd is the record of how the VM ended last.
func (p Paths) LastEnd() string { return filepath.Join(p.State, "last-end.json") }

// SupervisorLog is the supervisor's own log.
func (p Paths) SupervisorLog() string { return filepath.Join(p.Log, "supervisor.log") }

// VMMLog is what the VMM writes to its standard error.
func (p Paths) VMMLog() string { return filepath.Join(p.Log, "vmm.log") }

// ShareLog is the log of the virtiofsd that serves a share.
func (p Paths) ShareLog(tag string) string {
	return filepath.Join(p.Log, "virtiofsd-"+tag+".log")
}

// GateLogs is the directory that the gate may write. It belongs to the gate's
// uid, so whoever reads there must not follow symbolic links.
func (p Paths) GateLogs() string { return filepath.Join(p.Log, "guest") }

// ConsoleLog is what the guest's kernel and init print.
func (p Paths) ConsoleLog() string { return filepath.Join(p.GateLogs(), "console.log") }

// WorkloadLog is what the workload prints.
func (p Paths) WorkloadLog() string { return filepath.Join(p.GateLogs(), "workload.log") }

// NetLog has one JSON line for each query and connection.
func (p Paths) NetLog() string { return filepath.Join(p.GateLogs(), "net.jsonl") }
