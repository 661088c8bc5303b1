package emuhost_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/vmm/cloudhypervisor"
)

const (
	// insideLimit bounds all the tests that run in the emulated host: some fifteen machines, one after the other.
	insideLimit = 10 * time.Minute
	insideDir   = "/opt/inside"
	recordings  = "../../vmm/cloudhypervisor/testdata/v53"
)

// binary is an installed cloud-hypervisor; without one the test is skipped.
func binary(t *testing.T) string {
	t.Helper()
	path := os.Getenv(cloudhypervisor.BinaryVariable)
	if path == "" {
		var err error
		if path, err = exec.LookPath("cloud-hypervisor"); err != nil {
			t.Skipf("no cloud-hypervisor: neither %s nor the PATH has one", cloudhypervisor.BinaryVariable)
		}
	}
	return path
}

// build builds a static program.
func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %v: %v: %s", args, err, out)
	}
}

// insideHost boots a host with what vmm/cloudhypervisor's own tests need to run there.
func insideHost(t *testing.T) *emuhost.Host {
	t.Helper()
	program := binary(t)
	h := emuhost.Start(t, emuhost.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), insideLimit)
	defer cancel()
	base, err := emuhost.Prepare(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	init, tests := filepath.Join(dir, "init"), filepath.Join(dir, "inside.test")
	build(t, "build", "-trimpath", "-ldflags=-s -w", "-o", init, "./guest")
	build(t, "test", "-c", "-o", tests, "../../vmm/cloudhypervisor")
	k, err := kernel.Find(base.KernelDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	boot, err := kernel.Prepare(ctx, k, init, filepath.Join(emuhost.CacheDir(), "boot"))
	if err != nil {
		t.Fatal(err)
	}
	cmdline := filepath.Join(dir, "cmdline")
	if err := os.WriteFile(cmdline, []byte(kernel.Cmdline(kernel.CmdlineOptions{Emulated: true})), 0o644); err != nil {
		t.Fatal(err)
	}
	for to, from := range map[string]string{
		"vmlinux": boot.Vmlinux, "initramfs": boot.Initramfs, "cmdline": cmdline, "cloud-hypervisor": program, "inside.test": tests,
	} {
		if err := h.CopyIn(ctx, from, filepath.Join(insideDir, to)); err != nil {
			t.Fatal(err)
		}
	}
	h.Must(t, "modprobe", "tun")
	h.Must(t, "udevadm", "wait", "--timeout=60", "/dev/kvm", "/dev/net/tun")
	return h
}

// inside runs those of vmm/cloudhypervisor's tests whose names match.
func inside(t *testing.T, h *emuhost.Host, match string, env ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), insideLimit)
	defer cancel()
	var out bytes.Buffer
	code, err := h.Exec(ctx, emuhost.Command{
		Argv:   []string{insideDir + "/inside.test", "-test.v", "-test.failfast=false", "-test.timeout=9m", "-test.run", match},
		Env:    append([]string{"CLAWVM_INSIDE=" + insideDir, cloudhypervisor.BinaryVariable + "=" + insideDir + "/cloud-hypervisor"}, env...),
		Stdout: &out, Stderr: &out,
	})
	t.Logf("in the emulated host:\n%s", &out)
	if err != nil || code != 0 {
		t.Fatalf("the tests in the emulated host ended with %d, %v", code, err)
	}
	if !bytes.Contains(out.Bytes(), []byte("--- PASS")) {
		t.Fatal("nothing was tested")
	}
}

// TestCloudHypervisor boots real machines under the real cloud-hypervisor.
func TestCloudHypervisor(t *testing.T) {
	inside(t, insideHost(t), "^TestInside")
}

// TestRecord records from a real cloud-hypervisor what vmm/cloudhypervisor's tests replay where there is none.
func TestRecord(t *testing.T) {
	if os.Getenv("CLAWVM_RECORD") == "" {
		t.Skip("rewrites vmm/cloudhypervisor/testdata; CLAWVM_RECORD=1 asks for it")
	}
	h := insideHost(t)
	const there = "/tmp/recorded"
	inside(t, h, "^TestInsideRecord$", "CLAWVM_RECORD_TO="+there)
	ctx, cancel := context.WithTimeout(t.Context(), insideLimit)
	defer cancel()
	if err := os.MkdirAll(recordings, 0o755); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if code, err := h.Exec(ctx, emuhost.Command{Argv: []string{"tar", "-C", there, "-cf", "-", "."}, Stdout: &archive}); err != nil || code != 0 {
		t.Fatalf("cannot fetch what was recorded: %d, %v", code, err)
	}
	cmd := exec.Command("tar", "-C", recordings, "--no-same-owner", "-xf", "-")
	cmd.Stdin = &archive
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
