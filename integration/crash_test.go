package integration

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// crashVM is small, and has a process of each kind.
const crashVM = `
image: small
vmm: %s
vcpus: 1
memory: 256MiB
overlay: {tmpfs: 16MiB}
volumes:
  - {name: state, mount: /var/lib/state, size: 64MiB}
secrets:
  made: {generate: 32}
ports: ["127.0.0.1:18081:8080"]
run: {argv: [httpd, -f, -p, "8080", -h, /srv/www], user: app, ready: {tcp: 8080}, stop: {timeout: 5s}}
`

// TestKilledAtWill kills each process of a VM, and all at once, and compares the
// host with how a clean down leaves it.
func TestKilledAtWill(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	w.declare(t, "crash", fmt.Sprintf(crashVM, vmmName()))
	t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "crash") })
	w.must(t, "up", "crash")
	w.must(t, "exec", "crash", "--", "sh", "-c", "echo synced > /var/lib/state/file && sync")
	w.must(t, "down", "crash")
	clean := w.snapshot(t)

	kinds := []string{"supervisor", "gate", "vmm", "virtiofsd", "all"}
	for i, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			w.must(t, "up", "crash")
			victims := w.processes(t, "crash")[kind]
			if kind == "all" {
				for _, pids := range w.processes(t, "crash") {
					victims = append(victims, pids...)
				}
			}
			if len(victims) == 0 {
				t.Fatalf("found no process of kind %s among %v", kind, w.processes(t, "crash"))
			}
			for _, pid := range victims {
				kill(t, pid)
			}
			eventually(t, "all of the VM's processes are gone", 30*time.Second, func() bool {
				return len(w.processes(t, "crash")) == 0
			})
			// By turns: what gc leaves, and what the next up and down leave.
			if i%2 == 0 {
				w.must(t, "gc")
				w.compare(t, clean, w.snapshot(t))
			}
			w.must(t, "up", "crash")
			if n := len(w.processes(t, "crash")["vmm"]); n != 1 {
				t.Errorf("%d VMMs run, want one", n)
			}
			if got := w.must(t, "exec", "crash", "cat", "/var/lib/state/file"); strings.TrimSpace(got) != "synced" {
				t.Errorf("the volume holds %q", got)
			}
			w.must(t, "down", "crash")
			w.compare(t, clean, w.snapshot(t))
		})
	}
}

// processes are the VM's, by kind.
func (w *world) processes(t *testing.T, vm string) map[string][]int {
	t.Helper()
	found := map[string][]int{}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		var pid int
		fmt.Sscan(filepath.Base(d), &pid)
		raw, err := os.ReadFile(d + "/cmdline")
		if err != nil || len(raw) == 0 {
			continue // gone, or a zombie
		}
		args := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
		env, err := os.ReadFile(d + "/environ")
		if err != nil {
			continue
		}
		ours := strings.Contains(string(env), ":"+vm+"\x00") && strings.Contains(string(env), "CLAWVM_MARK=")
		switch {
		case filepath.Base(args[0]) == "clawvm" && slices.Contains(args, "run") && args[len(args)-1] == vm:
			found["supervisor"] = append(found["supervisor"], pid)
		case !ours:
		case args[len(args)-1] == "gate":
			found["gate"] = append(found["gate"], pid)
		case strings.Contains(args[0], "virtiofsd"):
			found["virtiofsd"] = append(found["virtiofsd"], pid)
		case strings.Contains(args[0], "qemu") || strings.Contains(args[0], "cloud-hypervisor"):
			found["vmm"] = append(found["vmm"], pid)
		default:
			found["other"] = append(found["other"], pid)
		}
	}
	return found
}

// snapshot is what the host has, by kind, in words that stay the same as long as
// the things do.
func (w *world) snapshot(t *testing.T) map[string][]string {
	t.Helper()
	run := func(argv ...string) []string {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", argv, err, out)
		}
		return strings.Split(strings.TrimSpace(string(out)), "\n")
	}
	shot := map[string][]string{
		"links":      run("ip", "-br", "link"),
		"addresses":  run("ip", "-br", "addr"),
		"neighbours": run("ip", "neigh", "show", "nud", "permanent"),
		"rules":      run("nft", "list", "ruleset"),
		"policy":     run("ip", "rule"),
		"listeners":  run("sh", "-c", "ss -tulnH | awk '{print $1, $5}' | sort"),
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	shot["mounts"] = strings.Split(strings.TrimSpace(string(mounts)), "\n")
	for _, dir := range []string{"run", "var/lib/clawvm/vms", "var/lib/clawvm/leases"} {
		err := filepath.WalkDir(filepath.Join(w.root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			shot["files"] = append(shot["files"], d.Type().String()+" "+path)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return shot
}

func (w *world) compare(t *testing.T, want, got map[string][]string) {
	t.Helper()
	for kind := range want {
		for _, line := range got[kind] {
			if !slices.Contains(want[kind], line) {
				t.Errorf("%s: left behind: %s", kind, line)
			}
		}
		for _, line := range want[kind] {
			if !slices.Contains(got[kind], line) {
				t.Errorf("%s: missing: %s", kind, line)
			}
		}
	}
}
