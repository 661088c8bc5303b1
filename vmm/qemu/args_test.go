package qemu

import (
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/clawvm/clawvm/vmm"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestArgs(t *testing.T) {
	full := vmm.Machine{
		Name: "openclaw", VCPUs: 4, Memory: 2 << 30,
		Kernel: "/k/vmlinux", Initramfs: "/run/clawvm/openclaw/vmm/initramfs", Cmdline: "console=hvc0 quiet",
		Disks: []vmm.Disk{
			{ID: "overlay", Path: "/var/lib/clawvm/vms/openclaw/overlay.img"},
			{ID: "odd,id", Path: `/a,b/"quoted"\path`, ReadOnly: true},
		},
		Shares:  []vmm.Share{{Tag: "image", Socket: "/run/clawvm/openclaw/vmm/image.sock"}, {Tag: "secrets", Socket: "/run/a,b.sock"}},
		MAC:     net.HardwareAddr{2, 0x63, 192, 168, 83, 10},
		Console: os.Stdout,
	}
	clocked := full
	clocked.InstructionClock = true
	for name, c := range map[string]struct {
		machine vmm.Machine
		setup   setup
	}{
		"bare":           {vmm.Machine{Name: "a", VCPUs: 1, Memory: 128 << 20, Kernel: "/k", Initramfs: "/i", Cmdline: "quiet"}, setup{qmp: 3}},
		"kvm":            {full, setup{kvm: true, firmware: "/usr/share/qemu/qboot.rom", qmp: 3, agent: 4, tap: 5}},
		"emulated":       {full, setup{dataDir: "/opt/qemu/share/qemu", qmp: 3, agent: 4, tap: 5}},
		"clock":          {clocked, setup{qmp: 3, agent: 4, tap: 5}},
		"clock-with-kvm": {clocked, setup{kvm: true, qmp: 3, agent: 4, tap: 5}},
	} {
		t.Run(name, func(t *testing.T) {
			got := strings.Join(args(&c.machine, c.setup), "\n") + "\n"
			golden := filepath.Join("testdata", "args-"+name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("not as in %s:\n%s", golden, got)
			}
		})
	}
}
