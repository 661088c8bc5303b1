package host

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/clawvm/clawvm/config"
)

// What supervisors of other versions answer: of one before [Made], and of one to
// come, with fields, states and kinds that this program does not know.
const (
	olderStatus = `{"name":"web","state":"ready","started":"2026-11-22T15:00:00Z","ready":"2026-11-22T15:00:08Z","vmm":"qemu","address":"192.168.83.2",` +
		`"vcpus":1,"memory":268435456,"ports":["127.0.0.1:8080->80/tcp"],"image":"sha256:00","kernel":"6.1.0-56-cloud-amd64","pid":4711}`
	newerStatus = `{"name":"web","state":"hibernating","started":"2026-11-22T15:00:00Z","vmm":"firecracker","vmms":["a","b"],"image":"sha256:00",` +
		`"faults":[{"time":"2026-11-22T15:00:00Z","kind":"comet","text":"x","more":{}}],"previous":{"time":"2026-11-22T15:00:00Z","kind":"comet","code":7,"more":[1]},` +
		`"made":{"clawvm":"9.9","declaration":"ff","files":{},"soul":true},"pid":4711}`
)

// answering serves a status where the supervisor of VM web would, and refuses all
// else as an HTTP server does that doesn't know it.
func answering(t *testing.T, status string) Layout {
	t.Helper()
	root, err := os.MkdirTemp("", "r")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	l, err := OpenLayout(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{l.VM("web").Run, l.Declarations()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(l.Declarations(), "web.yaml"), []byte("image: tiny\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	socket, err := net.Listen("unix", l.VM("web").Control())
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, status) })
	server := &http.Server{Handler: mux}
	go server.Serve(socket)
	t.Cleanup(func() { server.Close() })
	return l
}

func TestListsSupervisorsOfOtherVersions(t *testing.T) {
	for name, c := range map[string]struct {
		status string
		state  State
	}{"older": {olderStatus, Running}, "newer": {newerStatus, "hibernating"}} {
		t.Run(name, func(t *testing.T) {
			l := answering(t, c.status)
			list, err := List(t.Context(), l)
			if err != nil || len(list) != 1 || list[0].State != c.state || list[0].PID != 4711 || len(list[0].Pending) > 0 {
				t.Errorf("%+v, %v", list, err)
			}
		})
	}
}

func TestAsksAnOlderSupervisorForTooMuch(t *testing.T) {
	l := answering(t, olderStatus)
	_, err := l.Dial("web").Reload(t.Context())
	const want = `the supervisor of VM web knows no "reload": it is of an older clawvm; clawvm restart web starts it with this one`
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}

// A record that a newer program wrote is read as far as it is understood.
func TestReadsEndsOfOtherVersions(t *testing.T) {
	file := filepath.Join(t.TempDir(), "last-end.json")
	for name, text := range map[string]string{
		"older": `{"time":"2026-11-22T15:00:00Z","reason":"VM web: it broke","code":1}`,
		"newer": `{"time":"2026-11-22T15:00:00Z","reason":"VM web: it broke","code":1,"kind":"comet","faults":[{"kind":"comet","weight":3}],"weather":{"sky":"blue"}}`,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		e, err := readEnd(file)
		if err != nil || !e.Failed() || e.Reason != "VM web: it broke" || !e.Time.Equal(time.Date(2026, 11, 22, 15, 0, 0, 0, time.UTC)) || e.String() == "" {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
}

func TestReasons(t *testing.T) {
	change := func(field, was, is string) config.Change { return config.Change{Field: field, Was: was, Is: is} }
	digest := "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, c := range []struct {
		all   []Pending
		needs string
		want  string
	}{
		{nil, "", "[]"},
		{[]Pending{{PendingDeclaration, NeedsReload, change("ports", "[a]", "[b]")}}, NeedsReload, "[ports [a] → [b]]"},
		{[]Pending{
			{PendingDeclaration, NeedsRestart, change("memory", "1GiB", "2GiB")},
			{PendingDeclaration, NeedsReload, change("secrets.a.file", "", "/a")},
			{PendingImage, NeedsRestart, change("openclaw", digest, digest)},
			{PendingKernel, NeedsRestart, change("kernel", "6.1", "6.12")},
			{PendingVMM, NeedsRestart, change("qemu", "7.2.22", "8.0")},
			{PendingClawvm, NeedsRestart, change("clawvm", "0.3", "0.4")},
		}, NeedsRestart, "[memory 1GiB → 2GiB secrets.a.file added: /a image openclaw is now sha256:0123456789ab kernel 6.1 → 6.12 qemu 7.2.22 → 8.0 clawvm 0.3 → 0.4]"},
	} {
		if needs, got := Reasons(c.all); needs != c.needs || fmt.Sprint(got) != c.want {
			t.Errorf("%s, %v\nwant %s, %s", needs, got, c.needs, c.want)
		}
	}
}
