package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/vmm"
)

const (
	// envServer asks for the bench on an emulated server with KVM: its pairs of starts, some 15 s each.
	envServer = "CLAWVM_BENCH_SERVER"
	// serverLimit bounds it: 20 pairs under two VMMs, on a machine that does something else as well.
	serverLimit = 45 * time.Minute
	// serverDir is where the programs lie there.
	serverDir = "/opt/clawvm-bench"
)

// TestServer runs the bench where KVM works: on an emulated server, which has it
// when the machine has not. What it comes to is written beside the other results.
func TestServer(t *testing.T) {
	pairs := os.Getenv(envServer)
	if pairs == "" {
		t.Skipf("takes ten minutes: %s=20 asks for it, with 20 pairs of starts", envServer)
	}
	h := emuhost.Start(t, emuhost.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), serverLimit)
	defer cancel()
	dir := t.TempDir()
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir+"/", "../../cmd/...", ".", "./trivial")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	files := map[string]string{dir: serverDir}
	for _, program := range []string{"busybox", "cloud-hypervisor"} {
		path := ""
		if program == "cloud-hypervisor" {
			path = os.Getenv(vmm.CloudHypervisorEnv)
		}
		if path == "" {
			path, _ = exec.LookPath(program) // what isn't there is said by the bench
		}
		if path != "" {
			files[path] = "/usr/local/bin/" + program
		}
	}
	for from, to := range files {
		if err := h.CopyIn(ctx, from, to); err != nil {
			t.Fatal(err)
		}
	}
	h.Must(t, "modprobe", "-a", "tun", "kvm-amd", "nf_conntrack")
	h.Must(t, "udevadm", "wait", "--timeout=60", "/dev/kvm", "/dev/net/tun")
	const results = serverDir + "/results"
	code, err := h.Exec(ctx, emuhost.Command{
		Dir:    serverDir,
		Argv:   []string{"./bench", "-bin", serverDir, "-trivial", serverDir + "/trivial", "-pairs", pairs, "-out", results},
		Stdout: os.Stdout, Stderr: os.Stderr,
	})
	if err != nil || code != 0 {
		t.Fatalf("the bench on the server ended with %d, %v", code, err)
	}
	name := strings.TrimSpace(h.Must(t, "ls", results))
	raw := h.Must(t, "cat", filepath.Join(results, name))
	const out = "../../docs/benchmarks"
	if err := os.WriteFile(filepath.Join(out, strings.TrimSuffix(name, ".json")+"-emulated-server.json"), []byte(raw), 0o644); err != nil {
		t.Fatal(err)
	}
}
