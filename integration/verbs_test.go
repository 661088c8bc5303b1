package integration

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// verbsVM has what the owner's verbs change.
const verbsVM = `
image: small
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
	w.declare(t, "verbs", fmt.Sprintf(verbsVM, vmmName()))
	t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "verbs") })
	w.must(t, "up", "verbs")
	v := verbs{w}
	t.Run("pause", v.pause)
	t.Run("down of a paused VM", v.downPaused)
}

// verbs are the parts of TestVerbs; each leaves the VM verbs up.
type verbs struct{ *world }

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
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", published, nil)
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

func (v verbs) downPaused(t *testing.T) {
	v.must(t, "exec", "verbs", "sh", "-c", "echo kept > /var/lib/state/kept")
	v.must(t, "pause", "verbs")
	v.must(t, "down", "verbs")
	said := v.supervisorLog(t)
	if !strings.Contains(said, "resumed") || strings.Contains(said, "pressing the power button") {
		t.Errorf("down of a paused VM did not let its guest end by itself:\n%s", said)
	}
	v.must(t, "up", "verbs")
	if got := v.must(t, "exec", "verbs", "cat", "/var/lib/state/kept"); got != "kept\n" {
		t.Errorf("the volume holds %q", got)
	}
	v.must(t, "pause", "verbs")
	began := time.Now()
	v.must(t, "down", "--timeout", "0", "verbs")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("down --timeout 0 of a paused VM took %s", took)
	}
	if said := v.supervisorLog(t); !strings.Contains(said, "gets no time to end: it is killed") {
		t.Errorf("it was not killed as it was:\n%s", said)
	}
	if r := v.clawvm(t, "pause", "verbs"); r.code != 3 {
		t.Errorf("pause of a VM that is down: exit code %d, %q", r.code, r.stderr)
	}
	v.must(t, "up", "verbs")
}

func (w *world) supervisorLog(t *testing.T) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(w.root, "var/log/clawvm/verbs/supervisor.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
