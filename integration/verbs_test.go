package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	shared "github.com/clawvm/clawvm/integration/world"
)

// verbsVM has what the owner's verbs change.
const verbsVM = `
image: verbs
vmm: %s
vcpus: 1
memory: 512MiB
nameservers: [203.0.113.1]
overlay: {size: 64MiB}
volumes:
  - {name: state, mount: /var/lib/state, size: 64MiB}
secrets:
  made: {generate: 32}
ports: ["127.0.0.1:18090:8080"]
run: {argv: [httpd, -f, -p, "8080", -h, /srv/www], user: app, ready: {tcp: 8080}, stop: {timeout: 5s}}
`

// TestVerbs takes a VM through what its owner can do to one that is up.
func TestVerbs(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	image := shared.SmallImage(t)
	w.must(t, "image", "import", image, "verbs")
	useOwnPrograms(t, w)
	w.declare(t, "verbs", fmt.Sprintf(verbsVM, vmmName()))
	t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "verbs") })
	w.must(t, "up", "verbs")
	v := verbs{w, image}
	t.Run("reload", v.reload)
	t.Run("memory given back", v.memoryGivenBack)
	t.Run("pause", v.pause)
	t.Run("upgrade", v.upgrade)
	t.Run("kill of a paused VM", v.killPaused)
}

// verbs are the parts of TestVerbs; each leaves the VM verbs up.
type verbs struct {
	*world
	image string // the directory that the image verbs was made of
}

// ownPrograms is where the test's programs are installed, to be replaced.
const ownPrograms = "/run/verbs-bin"

// useOwnPrograms installs the programs where only this test uses them.
func useOwnPrograms(t *testing.T, w *world) {
	t.Helper()
	was := w.Bin
	t.Cleanup(func() { w.Bin = was })
	install(t, was)
	w.Bin = ownPrograms
}

// install copies the programs, as install(1) does: into new files.
func install(t *testing.T, from string) {
	t.Helper()
	if err := os.MkdirAll(ownPrograms, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"clawvm", "clawvm-init"} {
		raw, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(ownPrograms, name)
		if err := os.WriteFile(file+".new", raw, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
}

const published = "http://127.0.0.1:18090/index.html"

// pauseLength is how long a VM is paused for the test of its clock, and clockOff
// how far it may be from the host's after: less than the pause would leave it.
const (
	pauseLength = 6 * time.Second
	clockOff    = 3 * time.Second
)

// answers says whether the published port answers within limit.
func answers(t *testing.T, limit time.Duration) bool {
	t.Helper()
	return answersAt(t, published, limit)
}

func answersAt(t *testing.T, url string, limit time.Duration) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// clock is the guest's time, and how long it took to ask for it.
func (v verbs) clock(t *testing.T) (guest time.Time, took time.Duration) {
	t.Helper()
	began := time.Now()
	seconds, err := strconv.ParseInt(strings.TrimSpace(v.must(t, "exec", "verbs", "date", "+%s")), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return time.Unix(seconds, 0), time.Since(began)
}

func (v verbs) pause(t *testing.T) {
	if !answers(t, time.Minute) {
		t.Fatal("the published port does not answer")
	}
	if out := v.must(t, "pause", "verbs"); out != "verbs is paused\n" {
		t.Errorf("pause says %q", out)
	}
	if out := v.must(t, "pause", "verbs"); out != "verbs is paused already\n" {
		t.Errorf("a second pause says %q", out)
	}
	if s := v.status(t, "verbs"); s.State != "paused" {
		t.Errorf("status is %+v", s)
	}
	if out := v.must(t, "ls"); !strings.Contains(out, "paused") {
		t.Errorf("ls prints\n%s", out)
	}
	for _, pid := range v.processes(t, "verbs")["vmm"] {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || !strings.Contains(string(stat), ") T ") {
			t.Errorf("the VMM's process is not stopped: %.60q, %v", stat, err)
		}
	}
	for _, args := range [][]string{{"exec", "verbs", "true"}, {"up", "verbs"}} {
		if r := v.clawvm(t, args...); r.code == 0 || !strings.Contains(r.stderr, "VM verbs is paused") || !strings.Contains(r.stderr, "resume verbs lets it go on") {
			t.Errorf("clawvm %s on a paused VM: exit code %d, %q", args, r.code, r.stderr)
		}
	}
	if answers(t, pauseLength) {
		t.Error("the guest answers while it is paused")
	}
	if out := v.must(t, "resume", "verbs"); out != "verbs is resumed\n" {
		t.Errorf("resume says %q", out)
	}
	guest, took := v.clock(t)
	if off := time.Since(guest); off > clockOff+took || off < -clockOff {
		t.Errorf("after the pause the guest's clock is %s behind the host's", off.Round(time.Millisecond))
	}
	if out := v.must(t, "resume", "verbs"); out != "verbs is not paused\n" {
		t.Errorf("a second resume says %q", out)
	}
	if !answers(t, time.Minute) {
		t.Error("the published port does not answer after the pause")
	}
	if s := v.status(t, "verbs"); s.State != "ready" || s.Health != "ready" {
		t.Errorf("status is %+v", s)
	}
}

// declared writes the declaration with other words: old, new, old, new, …
func (v verbs) declared(t *testing.T, words ...string) {
	t.Helper()
	text := fmt.Sprintf(verbsVM, vmmName())
	for i := 0; i < len(words); i += 2 {
		if !strings.Contains(text, words[i]) {
			t.Fatalf("the declaration has no %q", words[i])
		}
	}
	v.declare(t, "verbs", strings.NewReplacer(words...).Replace(text))
}

// says runs a script in the guest.
func (v verbs) says(t *testing.T, script string) string {
	t.Helper()
	r := v.clawvm(t, "exec", "verbs", "sh", "-c", script)
	return strings.TrimSpace(r.stdout)
}

func (v verbs) reload(t *testing.T) {
	pid := v.status(t, "verbs").PID
	t.Cleanup(func() { v.declared(t) })
	if out := v.must(t, "reload", "verbs"); out != "verbs: nothing has changed\n" {
		t.Errorf("a reload without a change says %q", out)
	}
	made := v.says(t, "cat /run/secrets/made")

	t.Run("secrets and ports", func(t *testing.T) {
		given := filepath.Join(t.TempDir(), "given")
		writeSecret(t, given, "a new secret")
		v.declared(t, "made: {generate: 32}", "made: {generate: 32}\n  given: {file: "+given+", mode: \"0440\"}",
			`["127.0.0.1:18090:8080"]`, `["127.0.0.1:18091:8080"]`, "memory: 512MiB", "memory: 640MiB")
		out := v.must(t, "reload", "verbs")
		for _, want := range []string{
			"verbs: secrets.given.file added: " + given, `verbs: ports ["127.0.0.1:18090:8080"] → ["127.0.0.1:18091:8080"]` + "\n",
			"verbs: memory 512MiB → 640MiB: needs ", "restart verbs\n",
		} {
			if !strings.Contains(out, want) {
				t.Errorf("reload does not say %q:\n%s", want, out)
			}
		}
		if got := v.says(t, "cat /run/secrets/given; echo; stat -c %a /run/secrets/given"); got != "a new secret\n440" {
			t.Errorf("the new secret: %q", got)
		}
		if got := v.says(t, "cat /run/secrets/made"); got != made {
			t.Error("the generated secret is another")
		}
		if !answersAt(t, "http://127.0.0.1:18091/index.html", time.Minute) {
			t.Error("the new port does not answer")
		}
		if answers(t, time.Minute) {
			t.Error("the old port answers")
		}
		if out := v.must(t, "ls"); !strings.Contains(out, "18091->8080") {
			t.Errorf("ls prints\n%s", out)
		}
		writeSecret(t, given, "the next one")
		eventually(t, "a change of the new secret's source is noticed", 20*time.Second, func() bool {
			return v.says(t, "cat /run/secrets/given") == "the next one"
		})
		v.declared(t)
		v.must(t, "reload", "verbs")
		if got := v.says(t, "ls /run/secrets"); got != "made" {
			t.Errorf("after it was removed from the declaration, the guest has the secrets %q", got)
		}
		if !answers(t, time.Minute) {
			t.Error("the port does not answer again")
		}
	})
	t.Run("nameservers and egress", func(t *testing.T) {
		const lookup = "nslookup example.test | grep -c 'Address.*203.0.113.1'"
		const reach = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 20 203.0.113.1 80 | tail -n 1"
		if got := v.says(t, lookup) + v.says(t, reach); got != "1hello from the internet" {
			t.Fatalf("before: %q", got)
		}
		v.declared(t, "nameservers: [203.0.113.1]", "nameservers: [203.0.113.99]\negress: {mode: none}")
		v.must(t, "reload", "verbs")
		if got := v.says(t, lookup) + v.says(t, reach); got != "0" {
			t.Errorf("with egress none the guest reaches %q", got)
		}
		if !answers(t, time.Minute) {
			t.Error("the published port does not answer any more")
		}
		v.declared(t, "nameservers: [203.0.113.1]", "nameservers: [203.0.113.99, 203.0.113.1]")
		v.must(t, "reload", "verbs")
		if got := v.says(t, lookup) + v.says(t, reach); got != "1hello from the internet" {
			t.Errorf("open again: %q", got)
		}
	})
	t.Run("mistakes change nothing", func(t *testing.T) {
		busy, err := net.Listen("tcp", "127.0.0.1:18092")
		if err != nil {
			t.Fatal(err)
		}
		defer busy.Close()
		for what, c := range map[string]struct{ old, new, want string }{
			"a typo":           {"vcpus: 1", "vcpu: 1", "vcpus"},
			"a missing secret": {"made: {generate: 32}", "made: {file: /no/such/file}", "/no/such/file"},
			"a busy port":      {`["127.0.0.1:18090:8080"]`, `["127.0.0.1:18090:8080", "127.0.0.1:18092:8080"]`, "18092"},
		} {
			v.declared(t, c.old, c.new, "generate: 32", "generate: 32", "nameservers: [203.0.113.1]", "nameservers: [203.0.113.1]\negress: {mode: none}")
			r := v.clawvm(t, "reload", "verbs")
			if r.code == 0 || !strings.Contains(r.stderr, "cannot reload VM verbs, which goes on as it was") || !strings.Contains(r.stderr, c.want) {
				t.Errorf("%s: exit code %d, %q", what, r.code, r.stderr)
			}
			if got := v.says(t, "nslookup example.test | grep -c 'Address.*203.0.113.1'"); got != "1" || v.says(t, "cat /run/secrets/made") != made {
				t.Errorf("%s: something has changed: %q", what, got)
			}
		}
		v.declared(t, "vcpus: 1", "vcpu: 1")
		if r := v.clawvm(t, "reload", "verbs"); r.code != 78 {
			t.Errorf("a typo: exit code %d, want 78", r.code)
		}
	})
	t.Run("by signal, and as JSON", func(t *testing.T) {
		v.declared(t, `["127.0.0.1:18090:8080"]`, `["127.0.0.1:18090:8080", "127.0.0.1:18093:8080"]`)
		if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		eventually(t, "SIGHUP has published the port", 20*time.Second, func() bool {
			return answersAt(t, "http://127.0.0.1:18093/index.html", 5*time.Second)
		})
		v.declared(t, "vcpus: 1", "vcpus: 2")
		var list []struct {
			Name             string
			Applied, Pending []struct{ Field, Was, Is string }
		}
		out := v.must(t, "reload", "--json", "verbs")
		if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 {
			t.Fatalf("%v: %s", err, out)
		}
		if l := list[0]; l.Name != "verbs" || len(l.Applied) != 1 || l.Applied[0].Field != "ports" || len(l.Pending) != 1 || l.Pending[0].Is != "2" {
			t.Errorf("%+v", l)
		}
	})
	if now := v.status(t, "verbs").PID; now != pid {
		t.Errorf("another supervisor runs the VM: %d, not %d", now, pid)
	}
}

// killPaused ends a paused VM without letting it go on; it stays down.
func (v verbs) killPaused(t *testing.T) {
	v.must(t, "pause", "verbs")
	began := time.Now()
	v.must(t, "down", "-t", "0", "verbs")
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("down -t 0 of a paused VM took %s", took)
	}
	if said := v.supervisorLog(t); !strings.Contains(said, "gets no time to end: it is killed") {
		t.Errorf("it was not killed as it was:\n%s", said)
	}
	for _, verb := range []string{"pause", "resume", "reload"} {
		if r := v.clawvm(t, verb, "verbs"); r.code != 3 {
			t.Errorf("%s of a VM that is down: exit code %d, %q", verb, r.code, r.stderr)
		}
	}
}

func (w *world) supervisorLog(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(w.root, "var/log/clawvm/verbs/supervisor.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// pending is what status says that the next start would change: what → text.
func (v verbs) pending(t *testing.T) map[string]string {
	t.Helper()
	var s struct {
		Pending []struct{ What, Needs, Field, Was, Is string }
	}
	out := v.clawvm(t, "status", "--json", "verbs").stdout
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	all := map[string]string{}
	for _, p := range s.Pending {
		all[p.What+" "+p.Field] = p.Needs + ": " + p.Is
	}
	return all
}

// upgrade replaces all that a VM was started from, and looks that it goes on with
// what it has until it is started again.
func (v verbs) upgrade(t *testing.T) {
	if p := v.pending(t); len(p) > 0 {
		t.Fatalf("pending before the upgrade: %v", p)
	}
	built := v.must(t, "image", "ls", "--json")
	old := v.imageOf(t)
	if err := os.WriteFile(filepath.Join(v.image, "usr/bin/marker"), []byte("of the new image\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	v.must(t, "image", "import", v.image, "verbs")
	v.declared(t, "memory: 512MiB", "memory: 640MiB", `["127.0.0.1:18090:8080"]`, `["127.0.0.1:18094:8080"]`)
	programs := v.bin // where all other tests' are
	install(t, programs)

	t.Run("is pending", func(t *testing.T) {
		p := v.pending(t)
		image := p["image verbs"]
		delete(p, "image verbs")
		want := map[string]string{
			"declaration memory": "restart: 640MiB", "declaration ports": `reload: ["127.0.0.1:18094:8080"]`, "clawvm clawvm": "restart: another build",
		}
		if fmt.Sprint(p) != fmt.Sprint(want) || !strings.HasPrefix(image, "restart: sha256:") || strings.Contains(image, old) {
			t.Errorf("pending: %v and %q, want %v and another image than %s", p, image, want, old)
		}
		ls := v.clawvm(t, "ls")
		for _, want := range []string{"verbs: a restart is pending: ", "memory 512MiB → 640MiB", "image verbs is now sha256:", "clawvm devel → another build"} {
			if !strings.Contains(ls.stderr, want) {
				t.Errorf("ls does not say %q: %s", want, ls.stderr)
			}
		}
		if out := v.clawvm(t, "status", "verbs").stdout; !strings.Contains(out, "restart pending") || !strings.Contains(out, "reload pending") {
			t.Errorf("status says\n%s", out)
		}
	})
	t.Run("neither image can be removed", func(t *testing.T) {
		for _, digest := range []string{old, strings.TrimPrefix(v.pending(t)["image verbs"], "restart: ")} {
			if r := v.clawvm(t, "image", "rm", digest); r.code == 0 || !strings.Contains(r.stderr, "verbs") {
				t.Errorf("image rm %s: exit code %d, %q; the store had %s", digest, r.code, r.stderr, built)
			}
		}
	})
	t.Run("without its program, a guest's reboot starts what it was", func(t *testing.T) {
		// As if it was uninstalled: the commands are another copy's.
		if err := os.RemoveAll(ownPrograms); err != nil {
			t.Fatal(err)
		}
		v.Bin = programs
		v.must(t, "secret", "rotate", "verbs")
		v.must(t, "reload", "verbs")
		if !answersAt(t, "http://127.0.0.1:18094/index.html", time.Minute) {
			t.Error("the reloaded port does not answer")
		}
		v.clawvm(t, "exec", "--root", "verbs", "reboot", "-f")
		eventually(t, "the guest is up again", commandLimit, func() bool {
			s := v.status(t, "verbs")
			return s.Reboots == 1 && s.State == "ready"
		})
		if got := v.says(t, "cat /usr/bin/marker"); got != "part of the image" {
			t.Errorf("after its own reboot the guest has another image: %q", got)
		}
		if total := v.memory(t); total > 512 {
			t.Errorf("after its own reboot the guest has %d MiB", total)
		}
		if !answersAt(t, "http://127.0.0.1:18094/index.html", time.Minute) {
			t.Error("after a reboot the reloaded port does not answer")
		}
		if p := v.pending(t); p["declaration memory"] == "" || p["image verbs"] == "" || p["declaration ports"] != "" {
			t.Errorf("pending after the reboot: %v", p)
		}
	})
	t.Run("recreated while it is paused, it takes all, and ends in order before", func(t *testing.T) {
		install(t, programs)
		v.Bin = ownPrograms
		v.must(t, "exec", "verbs", "sh", "-c", "echo kept > /var/lib/state/kept")
		v.must(t, "exec", "--root", "verbs", "sh", "-c", "echo lost > /srv/lost")
		v.must(t, "pause", "verbs")
		resumed := strings.Count(v.supervisorLog(t), "resumed")
		v.must(t, "up", "--recreate", "verbs")
		if said := v.supervisorLog(t); strings.Count(said, "resumed") != resumed+1 || strings.Contains(said, "pressing the power button") {
			t.Errorf("the guest of a paused VM did not end by itself:\n%s", said)
		}
		if got := v.says(t, "cat /var/lib/state/kept; ls /srv"); got != "kept\nwww" {
			t.Errorf("of volume and overlay there is %q", got)
		}
		if got := v.says(t, "cat /usr/bin/marker"); got != "of the new image" {
			t.Errorf("the marker is %q", got)
		}
		if total := v.memory(t); total <= 512 {
			t.Errorf("the guest has %d MiB", total)
		}
		if p := v.pending(t); len(p) > 0 {
			t.Errorf("still pending: %v", p)
		}
		v.must(t, "image", "rm", old)
	})
}

// What the guest takes and frees again, in MiB, and what may stay of it with the
// host: the guest reports whole free blocks of 2 MiB, two seconds after they were
// freed, and keeps what it has read of its disks.
const (
	memoryTaken = 300
	memoryStays = 60
)

// memoryGivenBack has the guest fill memory and free it, and looks that the host has
// it again: the VMM's guest memory is a file in memory, shared with virtiofsd, and
// a hole must be punched into it.
func (v verbs) memoryGivenBack(t *testing.T) {
	before := v.resident(t)
	v.must(t, "exec", "--root", "verbs", "sh", "-c", fmt.Sprintf(
		"mkdir -p /tmp/fill && mount -t tmpfs -o size=%[1]dM fill /tmp/fill && dd if=/dev/zero of=/tmp/fill/x bs=1M count=%[1]d", memoryTaken))
	full := v.resident(t)
	if full < before+memoryTaken*9/10 {
		t.Errorf("the VMM has %d MiB after %d MiB were filled, and had %d before: what is measured here?", full, memoryTaken, before)
	}
	v.must(t, "exec", "--root", "verbs", "sh", "-c", "rm /tmp/fill/x && umount /tmp/fill")
	began := time.Now()
	after := full
	eventually(t, "the host has the memory back", time.Minute, func() bool {
		after = v.resident(t)
		return after <= before+memoryStays
	})
	t.Logf("guest memory with the host: %d MiB before, %d MiB full, %d MiB %s after it was freed", before, full, after, time.Since(began).Round(100*time.Millisecond))
}

// resident is how much of the guest's memory the VMM holds, in MiB.
func (v verbs) resident(t *testing.T) int {
	t.Helper()
	pids := v.processes(t, "verbs")["vmm"]
	if len(pids) != 1 {
		t.Fatalf("the VMM's processes: %v", pids)
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pids[0]))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "RssShmem:"); ok {
			var kib int
			if _, err := fmt.Sscan(rest, &kib); err != nil {
				t.Fatal(err)
			}
			return kib >> 10
		}
	}
	t.Fatalf("no RssShmem in\n%s", raw)
	return 0
}

// imageOf is the digest of the image that the VM runs from.
func (v verbs) imageOf(t *testing.T) string {
	t.Helper()
	var s struct{ Image string }
	if err := json.Unmarshal([]byte(v.clawvm(t, "status", "--json", "verbs").stdout), &s); err != nil {
		t.Fatal(err)
	}
	return s.Image
}

// memory is the guest's, in MiB.
func (v verbs) memory(t *testing.T) int {
	t.Helper()
	kib, err := strconv.Atoi(v.says(t, "awk '/MemTotal/ {print $2}' /proc/meminfo"))
	if err != nil {
		t.Fatal(err)
	}
	return kib >> 10
}
