package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/host"
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
restart: no
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

	want := map[string]host.EndKind{
		"supervisor": host.EndSupervisor, "gate": host.EndGate, "vmm": host.EndVMMKilled, "virtiofsd": host.EndShare,
	}
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
			// By turns: what the kill and gc leave, and an up that comes at once.
			if i%2 == 0 {
				eventually(t, "all of the VM's processes are gone", 30*time.Second, func() bool {
					return len(w.processes(t, "crash")) == 0
				})
				if e := w.entry(t, "crash"); want[kind] != "" && (e.State != host.Failed || e.End == nil || e.End.Kind != want[kind]) {
					t.Errorf("%s, ended by %+v, want %s", e.State, e.End, want[kind])
				}
				w.must(t, "gc")
				w.compare(t, clean, w.snapshot(t))
			}
			if out := w.must(t, "up", "crash"); strings.Contains(out, "up already") {
				t.Errorf("up says\n%s", out)
			}
			if log := w.must(t, "logs", "--supervisor", "crash"); i%2 != 0 && !strings.Contains(log, "ended: "+string(want[kind])) {
				t.Errorf("the log does not say that it ended by %s:\n%s", want[kind], log)
			}
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
