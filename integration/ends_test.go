package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/host"
)

// endsVM ends in all the ways that there are.
const endsVM = `
image: small
vmm: %s
vcpus: 1
memory: 256MiB
overlay: {tmpfs: 16MiB}
restart: on-failure
run: {argv: [httpd, -f, -p, "8080", -h, /srv/www], user: app, ready: {tcp: 8080}, stop: {timeout: 5s}}
`

// TestEnds ends a VM in each way but by its owner: each is told apart, and followed
// by what `restart:` says.
func TestEnds(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	w.declare(t, "ends", fmt.Sprintf(endsVM, vmmName()))
	t.Cleanup(func() {
		w.clawvm(t, "down", "--timeout", "1s", "ends")
		if t.Failed() {
			t.Logf("the supervisor says:\n%s", w.LastWords([]string{"ends"}))
		}
	})
	w.must(t, "up", "ends")

	root := func(t *testing.T, script string) {
		t.Helper()
		w.clawvm(t, "exec", "--root", "ends", "--", "sh", "-c", script) // its connection ends with the guest
	}
	killAll := func(kind string) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			victims := w.processes(t, "ends")[kind]
			if len(victims) == 0 {
				t.Fatalf("no process of kind %s", kind)
			}
			for _, pid := range victims {
				kill(t, pid)
			}
		}
	}
	// The pauses between the lives double from 1 s on. TestKilledAtWill ends one in
	// the other ways.
	restarts, faults := 0, 0
	for _, c := range []struct {
		name  string
		kind  host.EndKind
		fault bool
		do    func(*testing.T)
	}{
		{"reboot", "reboot", false, func(t *testing.T) { root(t, "reboot -f") }},
		{"the VMM is killed", "vmm-killed", true, killAll("vmm")},
		{"kernel panic", "panic", true, func(t *testing.T) { root(t, "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger") }},
		{"a virtiofsd is killed", "share-lost", true, func(t *testing.T) {
			killAll("virtiofsd")(t)
			// An up that comes before the supervisor has made up its mind waits for that.
			if out := w.must(t, "up", "ends"); !strings.Contains(out, "ends is ready after") {
				t.Errorf("up at once says\n%s", out)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := w.entry(t, "ends")
			c.do(t)
			var s host.Entry
			eventually(t, "the VM is ready again", commandLimit, func() bool {
				s = w.entry(t, "ends")
				return s.State == "ready" && s.VMRestarts+s.Reboots > before.VMRestarts+before.Reboots
			})
			if c.fault {
				restarts, faults = restarts+1, faults+1
			} else if s.Reboots != before.Reboots+1 {
				t.Errorf("%d reboots, want %d", s.Reboots, before.Reboots+1)
			}
			if s.Previous == nil || s.Previous.Kind != c.kind {
				t.Errorf("the life before ended by %+v, want %s", s.Previous, c.kind)
			}
			if s.VMRestarts != restarts || len(s.Faults) != faults || s.PID != before.PID {
				t.Errorf("%d restarts and faults %+v under supervisor %d, want %d and %d under %d", s.VMRestarts, s.Faults, s.PID, restarts, faults, before.PID)
			}
			if loop := s.Health == "crash-loop"; loop != (faults >= 3) || loop && !strings.Contains(s.Why, "failures within 10 min") {
				t.Errorf("after %d faults: health %q, %q", faults, s.Health, s.Why)
			}
		})
	}
	var s host.Entry
	waits := func(t *testing.T) {
		t.Helper()
		killAll("vmm")(t)
		eventually(t, "the supervisor waits", 30*time.Second, func() bool {
			s = w.entry(t, "ends")
			return s.State == "restarting"
		})
	}
	t.Run("up during the pause", func(t *testing.T) {
		waits(t) // for 8 s at least
		w.must(t, "up", "ends")
		if log := w.must(t, "logs", "--supervisor", "ends"); !strings.Contains(log, "its owner starts it now") {
			t.Errorf("up has waited for the end of the pause:\n%s", log)
		}
	})
	t.Run("down during the pause", func(t *testing.T) {
		waits(t)
		if s.Again.IsZero() || s.Health != "crash-loop" {
			t.Errorf("while it waits: %+v", s)
		}
		if out := w.must(t, "ls"); !strings.Contains(out, "restarting") || !strings.Contains(out, "crash-loop") {
			t.Errorf("ls prints\n%s", out)
		}
		began := time.Now()
		w.must(t, "down", "ends")
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("down took %s, want at once", took)
		}
		s = w.entry(t, "ends")
		if s.State != "stopped" || s.End == nil || s.End.Kind != "owner" {
			t.Errorf("then: %+v", s)
		}
		if out := w.must(t, "ls", "-q"); strings.Contains(out, "ends") {
			t.Errorf("ls lists what is down: %q", out)
		}
		if out := w.must(t, "ls", "-q", "--all"); !strings.Contains(out, "ends") {
			t.Errorf("ls --all does not list what is down: %q", out)
		}
	})
	t.Run("poweroff", func(t *testing.T) {
		w.must(t, "up", "ends")
		root(t, "poweroff -f")
		var s host.Entry
		eventually(t, "the VM is down", time.Minute, func() bool {
			s = w.entry(t, "ends")
			return s.State == "stopped"
		})
		if s.End == nil || s.End.Kind != "poweroff" || s.End.Code != 0 {
			t.Errorf("it ended by %+v", s.End)
		}
	})
}

// entry is all that status knows of a VM.
func (w *world) entry(t *testing.T, name string) host.Entry {
	t.Helper()
	r := w.clawvm(t, "status", "--json", name)
	var e host.Entry
	if err := json.Unmarshal([]byte(r.stdout), &e); err != nil {
		t.Fatalf("clawvm status --json: %v\n%s%s", err, r.stdout, r.stderr)
	}
	return e
}

// workloadVM's workload does what is asked of it by files.
const workloadVM = `
image: small
vmm: %s
vcpus: 1
memory: 256MiB
overlay: {tmpfs: 16MiB}
health: {exec: [sh, -c, test ! -e /tmp/sick], interval: 1s, timeout: 30s, retries: 2}
run:
  argv:
    - sh
    - -c
    - |
      while :; do
        if [ -e /tmp/eat ]; then rm /tmp/eat; exec tail /dev/zero; fi
        if [ -e /tmp/crash ]; then exit 3; fi
        sleep 0.2
      done
  user: app
  stop: {timeout: 1s}
`

// TestWorkloadEnds makes a workload sick, lets it eat the guest's memory, and crash
// again and again, while the VM stays.
func TestWorkloadEnds(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	w.declare(t, "work", fmt.Sprintf(workloadVM, vmmName()))
	t.Cleanup(func() {
		w.clawvm(t, "down", "--timeout", "1s", "work")
		if t.Failed() {
			t.Logf("the supervisor says:\n%s", w.LastWords([]string{"work"}))
		}
	})
	w.must(t, "up", "work")
	do := func(script string) { w.must(t, "exec", "work", "--", "sh", "-c", script) }
	var e host.Entry
	becomes := func(what string, ok func() bool) {
		t.Helper()
		eventually(t, what, commandLimit, func() bool {
			e = w.entry(t, "work")
			return ok()
		})
	}
	health := func(want string) {
		t.Helper()
		becomes("the health is "+want, func() bool { return e.Health == want })
	}

	health(host.HealthHealthy)
	do("touch /tmp/sick")
	health(host.HealthUnhealthy)
	if !strings.Contains(e.Why, "checks failed, the last answer: ") || e.State != host.Running {
		t.Errorf("unhealthy: %s, %q", e.State, e.Why)
	}
	if r := w.clawvm(t, "ls"); !strings.Contains(r.stdout, host.HealthUnhealthy) || !strings.Contains(r.stderr, "work: "+e.Why[:2]) {
		t.Errorf("ls prints\n%s%s", r.stdout, r.stderr)
	}
	do("rm /tmp/sick")
	health(host.HealthHealthy)

	do("touch /tmp/eat")
	becomes("the workload is started again", func() bool { return e.Restarts == 1 && !e.Since.IsZero() })
	if len(e.Faults) != 1 || e.Faults[0].Kind != host.EndOutOfMemory || !strings.Contains(e.Workload, "for want of memory") {
		t.Errorf("faults %+v, the workload ended by %q", e.Faults, e.Workload)
	}

	do("touch /tmp/crash")
	health(host.HealthCrashLoop)
	if last := e.Faults[len(e.Faults)-1]; last.Kind != host.EndWorkload || !strings.Contains(last.Reason, "exit code 3") || e.VMRestarts != 0 {
		t.Errorf("faults %+v, the VM was started again %d times", e.Faults, e.VMRestarts)
	}
	if out := w.clawvm(t, "status", "work").stdout; !strings.Contains(out, "crash-loop") || !strings.Contains(out, "workload: the workload ended: exit code 3") {
		t.Errorf("status prints\n%s", out)
	}
	do("rm /tmp/crash")
	becomes("the workload is up again", func() bool { return !e.Since.IsZero() })
}
