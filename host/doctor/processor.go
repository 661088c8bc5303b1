package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/storage"
	"github.com/clawvm/clawvm/vmm"
	"github.com/clawvm/clawvm/vmm/cloudhypervisor"
	"github.com/clawvm/clawvm/vmm/qemu"
)

func checkCPU(context.Context, *look) []Finding {
	raw, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return []Finding{broken("cpu", Unknown, err)}
	}
	return []Finding{processor(string(raw))}
}

// processor reads /proc/cpuinfo.
func processor(cpuinfo string) Finding {
	model, flags := "processor", map[string]bool{}
	for line := range strings.Lines(cpuinfo) {
		if strings.TrimSpace(line) == "" && len(flags) > 0 {
			break // the others are the same
		}
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "model name":
			model = strings.TrimSpace(value)
		case "flags":
			for f := range strings.FieldsSeq(value) {
				flags[f] = true
			}
		}
	}
	f := Finding{Check: "cpu", Severity: OK}
	can := "neither vmx nor svm"
	switch {
	case flags["vmx"]:
		can = "vmx"
	case flags["svm"]:
		can = "svm"
	default:
		f.Severity = Note
		f.Do = "turn virtualisation on in the firmware; on a rented virtual server ask for nested virtualisation or take a dedicated one"
	}
	f.Seen = model + ": " + can
	if flags["hypervisor"] {
		f.Seen += "; this host is a VM itself, guests are nested"
	}
	return f
}

func checkKVM(ctx context.Context, k *look) []Finding {
	f := k.facts
	const emulates = "without KVM, QEMU emulates guests, 10 to 30 times slower"
	if _, err := os.Stat("/dev/kvm"); err == nil && !k.root {
		if err := unix.Access("/dev/kvm", unix.R_OK|unix.W_OK); errors.Is(err, unix.EACCES) {
			return []Finding{broken("kvm", Unknown, fmt.Errorf("/dev/kvm: %w", err))}
		}
	}
	switch {
	case !f.Flags:
		return found("kvm", Warning, emulates, "the CPU shows neither vmx nor svm: no stock kernel boots in KVM, whether /dev/kvm is there or not")
	case f.NoKVM != "":
		seen, do, told := strings.Cut(f.NoKVM, ". ")
		if !told {
			do = "modprobe kvm_intel or kvm_amd; `dmesg | grep -i kvm` says why not"
		}
		return found("kvm", Warning, do+"; "+emulates, "%s", seen)
	}
	// Before the check's own end, by which nothing would be said of a guest that hangs.
	ctx, cancel := context.WithTimeout(ctx, k.Limit*3/4)
	defer cancel()
	if err := vmm.TryKVM(ctx); err != nil {
		return []Finding{{Check: "kvm", Severity: Error, Seen: err.Error(),
			Do: "`dmesg | grep -i kvm` may say why; declare `vmm: qemu` and take the device away (modprobe -r kvm_amd kvm_intel) to have guests emulated"}}
	}
	return found("kvm", OK, "", "a guest runs in /dev/kvm")
}

func checkCloudHypervisor(ctx context.Context, k *look) []Finding {
	const name = vmm.CloudHypervisor
	if k.facts.NoCloudHypervisor != "" {
		return found(name, Error, "correct "+vmm.CloudHypervisorEnv+", or unset it for the one on the PATH", "%s", k.facts.NoCloudHypervisor)
	}
	if k.facts.CloudHypervisor == "" {
		do := ""
		if k.facts.Hardware() {
			do = "a static binary of v53 is at github.com/cloud-hypervisor/cloud-hypervisor/releases; put it on the PATH"
		}
		return found(name, Note, do, "not installed; QEMU serves")
	}
	version, err := cloudhypervisor.New(k.facts.CloudHypervisor).Version(ctx)
	switch {
	case err != nil && k.facts.Hardware():
		return []Finding{broken(name, Error, err)}
	case err != nil:
		return []Finding{broken(name, Note, err)}
	case !k.facts.Hardware():
		return found(name, Note, "", "%s at %s, not used: it needs KVM", version, k.facts.CloudHypervisor)
	}
	return found(name, OK, "", "%s at %s", version, k.facts.CloudHypervisor)
}

func checkQEMU(ctx context.Context, k *look) []Finding {
	const get = "apt-get install qemu-system-x86"
	if k.facts.QEMU == "" {
		if k.facts.Hardware() && k.facts.CloudHypervisor != "" {
			return found(vmm.QEMU, Note, "", "not installed; cloud-hypervisor serves")
		}
		return found(vmm.QEMU, Error, get, "not installed, and cloud-hypervisor can't serve")
	}
	version, err := qemu.New(k.facts.QEMU).Version(ctx)
	if err != nil {
		return []Finding{broken(vmm.QEMU, Error, err)}
	}
	how := "with KVM"
	if !k.facts.Hardware() {
		how = "emulating"
	}
	return found(vmm.QEMU, OK, "", "%s at %s, %s", version, k.facts.QEMU, how)
}

func checkVirtiofsd(ctx context.Context, _ *look) []Finding {
	d, err := storage.FindVirtiofsd(ctx)
	switch {
	case err != nil:
		return []Finding{broken("virtiofsd", Error, err)}
	case d.Legacy:
		return found("virtiofsd", Note, "Debian 13 has the newer one, package virtiofsd", "%s at %s, QEMU's own: it serves no writable shares", d.Version, d.Path)
	}
	return found("virtiofsd", OK, "", "%s at %s", d.Version, d.Path)
}

func checkDiskPrograms(context.Context, *look) []Finding {
	if err := storage.CheckPrograms(); err != nil {
		return found("disk-programs", Error, "apt-get install e2fsprogs", "%s", oneLine(err))
	}
	return found("disk-programs", OK, "", "mke2fs and e2fsck are there")
}

// checkGuestKernel looks for what guests boot: a kernel, and clawvm's init.
func checkGuestKernel(_ context.Context, k *look) []Finding {
	var all []Finding
	switch found, err := kernel.Find("", k.Layout.Store()); {
	case err != nil:
		all = append(all, broken("guest-kernel", Error, err))
	default:
		all = append(all, Finding{Check: "guest-kernel", Severity: OK, Seen: fmt.Sprintf("%s (%s)", found.Release, found.Origin)})
	}
	if _, err := host.Init(); err != nil {
		all = append(all, broken("guest-init", Error, err))
	}
	return all
}
