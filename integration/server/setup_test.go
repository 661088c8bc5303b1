package server

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/clawvm/clawvm/integration/emuhost"
)

// inside is where the programs lie in the emulated server, of tests that do not
// install them.
const inside = "/opt/clawvm-test"

// carryTests puts clawvm's programs, the test program of the package pkg, as name, and what their guests are made of on the
// server. It builds in dir.
func carryTests(ctx context.Context, t *testing.T, h *emuhost.Host, dir, pkg, name string) {
	t.Helper()
	run(t, "build", "-trimpath", "-o", dir+"/bin/", "../../cmd/...")
	run(t, "test", "-c", "-o", filepath.Join(dir, name), pkg)
	copyIn(ctx, t, h, map[string]string{
		inside + "/bin":          dir + "/bin",
		inside + "/" + name:      filepath.Join(dir, name),
		"/usr/local/bin/busybox": busybox(t),
	})
	loadDevices(t, h)
}

// made does `make install` into a directory, and leaves the example's declaration
// out.
func made(ctx context.Context, t *testing.T) (dest string) {
	t.Helper()
	dest = t.TempDir()
	if out, err := exec.CommandContext(ctx, "make", "-s", "-C", "../..", "install", "DESTDIR="+dest).CombinedOutput(); err != nil {
		t.Fatalf("make install: %v\n%s", err, out)
	}
	if err := os.Remove(filepath.Join(dest, "etc/clawvm/vms/openclaw.yaml")); err != nil {
		t.Fatal(err)
	}
	return dest
}

// copyIn copies files and directories to the server, each by where it goes, and
// this machine's cloud-hypervisor where it has one.
func copyIn(ctx context.Context, t *testing.T, h *emuhost.Host, files map[string]string) {
	t.Helper()
	if program := cloudHypervisor(); program != "" {
		files["/usr/local/bin/cloud-hypervisor"] = program
	}
	for to, from := range files {
		if err := h.CopyIn(ctx, from, to); err != nil {
			t.Fatal(err)
		}
	}
}

// loadDevices loads what guests need: udev knows no module for an emulated
// processor.
func loadDevices(t *testing.T, h *emuhost.Host) {
	t.Helper()
	h.Must(t, "modprobe", "-a", "tun", "kvm-amd")
	h.Must(t, "udevadm", "wait", "--timeout=60", "/dev/kvm", "/dev/net/tun")
}
