package vmm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The names of the VMMs, in a declaration and everywhere else.
const (
	CloudHypervisor = "cloud-hypervisor"
	QEMU            = "qemu"
	auto            = "auto"
)

// CloudHypervisorEnv names the environment variable with the path of a cloud-hypervisor that goes before the PATH's.
const CloudHypervisorEnv = "CLAWVM_CLOUD_HYPERVISOR"

// qemuBinary is QEMU's program for this architecture.
const qemuBinary = "qemu-system-x86_64"

// How to get a VMM, for errors.
const (
	getQEMU            = "`apt-get install qemu-system-x86` on Debian"
	getCloudHypervisor = "a static binary of v53 is at github.com/cloud-hypervisor/cloud-hypervisor/releases; put it on the PATH or name it in " + CloudHypervisorEnv
)

// Facts is what the host can do, as far as the choice of a VMM depends on it.
type Facts struct {
	// Flags: the CPU shows vmx or svm. /dev/kvm alone proves nothing; there are kernels that open it and make VMs in which no
	// stock kernel boots.
	Flags bool
	// NoKVM is why /dev/kvm doesn't serve; "" when a VM could be made with it.
	NoKVM string
	// KVMGroup is the group that may open /dev/kvm, for Machine.Groups; -1 when everybody may, or nobody but root.
	KVMGroup int
	// CloudHypervisor and QEMU are the programs' paths; "" when they aren't there.
	CloudHypervisor string
	QEMU            string
	// NoCloudHypervisor is why what CLAWVM_CLOUD_HYPERVISOR names can't be used; "" as a rule.
	NoCloudHypervisor string
}

// Hardware says whether the host's processor can run guests.
func (f Facts) Hardware() bool { return f.Flags && f.NoKVM == "" }

// noHardware is why it can't.
func (f Facts) noHardware() string {
	if !f.Flags {
		return "the CPU shows neither vmx nor svm"
	}
	return f.NoKVM
}

// Choose decides which VMM runs a VM, and says why in a few words. declared is "auto" (or ""), "cloud-hypervisor" or
// "qemu"; a VMM that is named is taken or refused, never replaced.
func Choose(declared string, f Facts) (name, why string, err error) {
	switch declared {
	case "", auto:
		return f.auto()
	case CloudHypervisor:
		if f.CloudHypervisor == "" {
			return "", "", fmt.Errorf("cannot use cloud-hypervisor: %s; %s", f.whyItIsMissing(), getCloudHypervisor)
		}
		if !f.Hardware() {
			return "", "", fmt.Errorf("cannot use cloud-hypervisor: it needs KVM, and %s; declare `vmm: qemu`, which can emulate", f.noHardware())
		}
		return CloudHypervisor, "as declared", nil
	case QEMU:
		if f.QEMU == "" {
			return "", "", fmt.Errorf("cannot use qemu: %s is not installed; %s", qemuBinary, getQEMU)
		}
		if !f.Hardware() {
			return QEMU, "as declared; emulating, since " + f.noHardware(), nil
		}
		return QEMU, "as declared, with KVM", nil
	}
	return "", "", fmt.Errorf("cannot use VMM %q: it is one of auto, cloud-hypervisor, qemu", declared)
}

func (f Facts) auto() (name, why string, err error) {
	switch {
	case f.Hardware() && f.CloudHypervisor != "":
		return CloudHypervisor, "it is installed, and KVM works", nil
	case f.Hardware() && f.QEMU != "":
		return QEMU, "with KVM, since " + f.whyNoCloudHypervisor(), nil
	case f.QEMU != "":
		return QEMU, "emulating, since " + f.noHardware(), nil
	case f.Hardware():
		return "", "", fmt.Errorf("cannot choose a VMM: %s, nor is %s; for cloud-hypervisor, %s; for QEMU, %s",
			f.whyNoCloudHypervisor(), qemuBinary, getCloudHypervisor, getQEMU)
	}
	return "", "", fmt.Errorf("cannot choose a VMM: %s, so QEMU has to emulate, and %s is not installed; %s",
		f.noHardware(), qemuBinary, getQEMU)
}

// whyItIsMissing is whyNoCloudHypervisor after its name.
func (f Facts) whyItIsMissing() string {
	if f.NoCloudHypervisor != "" {
		return f.NoCloudHypervisor
	}
	return "it is not installed"
}

func (f Facts) whyNoCloudHypervisor() string {
	if f.NoCloudHypervisor != "" {
		return f.NoCloudHypervisor
	}
	return "cloud-hypervisor is not installed"
}

// LookHost looks what the host can do. It changes nothing; a VM that it makes in /dev/kvm to see whether that
// works is gone again.
func LookHost() Facts {
	f := programs()
	f.NoKVM, f.KVMGroup = lookKVM(kvmDevice)
	return f
}

// GlanceHost is LookHost without trying KVM, which is taken to work where its device is there: making a VM costs
// milliseconds.
func GlanceHost() Facts {
	f := programs()
	if _, err := os.Stat(kvmDevice); err != nil {
		f.NoKVM = noDevice
	}
	return f
}

const (
	kvmDevice = "/dev/kvm"
	noDevice  = kvmDevice + " isn't there"
)

// programs finds the VMMs, and whether the processor could run guests.
func programs() Facts {
	f := Facts{Flags: cpuFlags(), KVMGroup: -1, QEMU: lookPath(qemuBinary)}
	named := os.Getenv(CloudHypervisorEnv)
	if named == "" {
		f.CloudHypervisor = lookPath("cloud-hypervisor")
		return f
	}
	path, err := exec.LookPath(named)
	if err != nil {
		f.NoCloudHypervisor = fmt.Sprintf("%s names %s, which can't be run: %v", CloudHypervisorEnv, named, bareError(err))
		return f
	}
	f.CloudHypervisor = path
	return f
}

// bareError is what an error of exec.LookPath says beside the program's name.
func bareError(err error) error {
	var lookup *exec.Error
	if errors.As(err, &lookup) {
		err = lookup.Err
	}
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	return err
}

func lookPath(name string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	return path
}

// cpuFlags says whether the first processor has virtualisation. A host whose /proc/cpuinfo can't be read has none
// that would be known of.
func cpuFlags() bool {
	b, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && hasFlags(string(b))
}

func hasFlags(cpuinfo string) bool {
	for line := range strings.Lines(cpuinfo) {
		key, value, _ := strings.Cut(line, ":")
		if strings.TrimSpace(key) != "flags" {
			continue
		}
		for flag := range strings.FieldsSeq(value) {
			if flag == "vmx" || flag == "svm" {
				return true
			}
		}
		return false
	}
	return false
}

// From the kernel's include/uapi/linux/kvm.h.
const (
	kvmGetAPIVersion = 0xae00
	kvmCreateVM      = 0xae01
	kvmAPIVersion    = 12 // has been that since 2007
)

// lookKVM says why KVM can't be used, if so, and which group may open its device. It makes a VM, since one may be
// refused where the device opens: another hypervisor can hold the processor's virtualisation.
func lookKVM(path string) (no string, group int) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return path + " isn't there", -1
		}
		return fmt.Sprintf("%s doesn't open: %v", path, err), -1
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err.Error(), -1
	}
	group = -1
	switch mode := info.Mode().Perm(); {
	case mode&0o006 == 0o006:
	case mode&0o060 == 0o060:
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			group = int(st.Gid)
		}
	case os.Getuid() == 0:
		return fmt.Sprintf("only root may open %s (mode %04o); VMMs run as users of their own. Give it a group: chgrp kvm %s && chmod 660 %s", path, mode, path, path), -1
	}
	version, err := unix.IoctlRetInt(fd, kvmGetAPIVersion)
	if err != nil {
		return fmt.Sprintf("%s is not KVM: %v", path, err), -1
	}
	if version != kvmAPIVersion {
		return fmt.Sprintf("%s speaks version %d, not %d", path, version, kvmAPIVersion), -1
	}
	vm, err := unix.IoctlRetInt(fd, kvmCreateVM)
	if err != nil {
		return fmt.Sprintf("%s makes no VM: %v", path, err), -1
	}
	if err := unix.Close(vm); err != nil {
		return fmt.Sprintf("%s: %v", path, err), -1
	}
	return "", group
}
