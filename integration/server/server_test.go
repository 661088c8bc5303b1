// Package server holds the tests that need a whole server: they boot an emulated
// Debian 13 with systemd and KVM, and work on it as an administrator would.
package server

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/vmm"
)

// tableLimit bounds one column of the table in the emulated server.
const tableLimit = 30 * time.Minute

// TestTables runs the tables of package integration on the server: under QEMU
// with KVM, and under cloud-hypervisor where this machine has one to carry along.
func TestTables(t *testing.T) {
	h := emuhost.Start(t, emuhost.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), tableLimit)
	defer cancel()
	dir := t.TempDir()
	carryTests(ctx, t, h, dir, "..", "integration.test")
	program := cloudHypervisor()
	t.Run("doctor", func(t *testing.T) { doctor(t, h, dir, program != "") })
	for _, name := range []string{vmm.QEMU, vmm.CloudHypervisor} {
		t.Run(name, func(t *testing.T) {
			if name == vmm.CloudHypervisor && program == "" {
				t.Skipf("no cloud-hypervisor to carry along: neither %s nor the PATH has one", vmm.CloudHypervisorEnv)
			}
			ctx, cancel := context.WithTimeout(t.Context(), tableLimit)
			defer cancel()
			var out bytes.Buffer
			code, err := h.Exec(ctx, emuhost.Command{
				Dir:    inside,
				Argv:   []string{"./integration.test", "-test.v", "-test.timeout", tableLimit.String(), "-test.run", tables(program != "")},
				Env:    []string{"CLAWVM_TEST_VMM=" + name, "CLAWVM_TEST_BIN=" + inside + "/bin"},
				Stdout: &out, Stderr: &out,
			})
			t.Logf("on the server:\n%s", &out)
			if err != nil || code != 0 {
				t.Fatalf("the tests on the server ended with %d, %v", code, err)
			}
			if bytes.Contains(out.Bytes(), []byte("--- SKIP")) || !bytes.Contains(out.Bytes(), []byte("--- PASS")) {
				t.Fatal("something was not tested")
			}
		})
	}
}

// What is run on the server. The short list is what `make test` has the time for;
// the whole is run where there is a cloud-hypervisor, and when it is asked for.
const (
	shortTables = "^(TestLifeOfAVM|TestEnds)$"
	wholeTables = "^(TestLifeOfAVM|TestVerbs|TestKilledAtWill|TestEnds|TestWorkloadEnds)$"
)

// tables names the tests that are run on the server. CLAWVM_TEST_TABLES can be
// "all", or a pattern, to look at one.
func tables(cloudHypervisor bool) string {
	asked := os.Getenv("CLAWVM_TEST_TABLES")
	switch {
	case asked == "all", asked == "" && cloudHypervisor:
		return wholeTables
	case asked == "":
		return shortTables
	}
	return asked
}

// run runs the go command, for static programs.
func run(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %v: %v\n%s", args, err, out)
	}
}

func busybox(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox-static is not installed: the tests' guests are made of it (scripts/setup test)")
	}
	return path
}

// cloudHypervisor finds an installed cloud-hypervisor; "" when there is none.
func cloudHypervisor() string {
	if path := os.Getenv(vmm.CloudHypervisorEnv); path != "" {
		abs, err := filepath.Abs(path)
		if err == nil {
			return abs
		}
	}
	path, err := exec.LookPath("cloud-hypervisor")
	if err != nil {
		return ""
	}
	return path
}

// chosenVMM is cloud-hypervisor where there is one, else QEMU.
func chosenVMM() string {
	if cloudHypervisor() == "" {
		return vmm.QEMU
	}
	return vmm.CloudHypervisor
}

// tarOf streams a directory of the machine as an archive; done says how that went.
func tarOf(t *testing.T, dir, name string) (out io.Reader, done func() error) {
	t.Helper()
	cmd := exec.Command("tar", "-C", dir, "--xattrs", "--xattrs-include=*", "--numeric-owner", "--anchored", "--exclude=store/tmp", "--exclude=store/kernels", "-cf", "-", name)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return pipe, cmd.Wait
}
