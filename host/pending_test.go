package host

import (
	"testing"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/vmm"
)

// TestAnotherVMMIsPending: where the declaration leaves the choice to the host, a
// VMM that was installed or went away, or KVM that works now, is told of.
func TestAnotherVMMIsPending(t *testing.T) {
	both := vmm.Facts{Flags: true, QEMU: "/q", CloudHypervisor: "/c"}
	broken := both
	broken.NoKVM = "/dev/kvm makes no VM"
	for _, c := range []struct {
		name, declared, runs string
		glance, look         vmm.Facts
		want                 string
		looks                bool
	}{
		{"cloud-hypervisor was installed", "auto", vmm.QEMU, both, both, "vmm qemu → cloud-hypervisor", true},
		{"as it was", "auto", vmm.CloudHypervisor, both, both, "", false},
		{"KVM doesn't work", "auto", vmm.QEMU, both, broken, "", true},
		{"cloud-hypervisor was removed", "auto", vmm.CloudHypervisor, vmm.Facts{Flags: true, QEMU: "/q"}, vmm.Facts{Flags: true, QEMU: "/q"}, "vmm cloud-hypervisor → qemu", true},
		{"both were removed", "auto", vmm.CloudHypervisor, vmm.Facts{}, vmm.Facts{}, "", false},
		{"said", "qemu", vmm.QEMU, both, both, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			vm, err := config.Parse("x", "x.yaml", []byte("image: base\nvmm: "+c.declared+"\n"), nil)
			if err != nil {
				t.Fatal(err)
			}
			o := newOutlook(Layout{Root: t.TempDir()})
			looks := false
			o.glance = func() vmm.Facts { return c.glance }
			o.look = func() vmm.Facts { looks = true; return c.look }
			got := ""
			for _, p := range o.pending(t.Context(), nil, Status{VMM: c.runs, Made: &Made{Declaration: config.Digest(vm.Fields())}}, vm) {
				if p.What == PendingVMM {
					got = p.String()
				}
			}
			if got != c.want || looks != c.looks {
				t.Errorf("pending: %q, and KVM was tried: %t; want %q, %t", got, looks, c.want, c.looks)
			}
		})
	}
}
