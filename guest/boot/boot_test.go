package boot

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/clawvm/clawvm/guest"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 1 && os.Args[0] == stageName {
		os.Exit(runStage()) // the tests' programs start as a guest's do
	}
	os.Exit(m.Run())
}

// maxInit is the most that the static init may have, in bytes: it is unpacked into each guest's memory.
const maxInit = 8_000_000

func TestTheInitIsSmallAndStatic(t *testing.T) {
	path := buildInit(t, t.TempDir())
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes", info.Size())
	if info.Size() > maxInit {
		t.Errorf("the init has %d bytes, at most %d are wanted", info.Size(), maxInit)
	}
	out, err := exec.Command(path).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), "does nothing else") {
		t.Errorf("started by hand: %v, %s", err, out)
	}
}

func TestChildrenReapsOrphansAndStealsNothing(t *testing.T) {
	c := newChildren()
	var ends sync.WaitGroup
	for i := range 40 {
		ends.Go(func() {
			cmd := exec.Command("sh", "-c", "exit 7")
			err := c.Run(cmd)
			if outcomeOf(err).Code != 7 {
				t.Errorf("run %d: %v", i, err)
			}
		})
		for range 3 {
			c.reapOne()
		}
	}
	ends.Wait()
	// A child that nobody waits for.
	orphan := exec.Command("true")
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	if err := waitFor(5*time.Second, func() error {
		for c.reapOne() {
		}
		if c.some() {
			return errors.New("there is still a child")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := orphan.Wait(); err == nil {
		t.Error("the orphan was not reaped")
	}
}

func TestLookupAccount(t *testing.T) {
	etc := t.TempDir()
	for name, text := range map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/bash\nbroken line\nbad:x:many:0::/:\nwork:x:20001:20001:Work,,,:/home/work:\nwork:x:5:5::/:\n",
		"group":  "root:x:0:\nwork:x:20001:\nextra:x:20002:other,work\nlast:x:20003:network\n",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for spec, want := range map[string]account{
		"":           {Name: "root", Home: "/root", Shell: "/bin/bash"},
		"root":       {Name: "root", Home: "/root", Shell: "/bin/bash"},
		"work":       {Name: "work", UID: 20001, GID: 20001, Groups: []int{20002}, Home: "/home/work", Shell: "/bin/sh"},
		"20001":      {Name: "work", UID: 20001, GID: 20001, Groups: []int{20002}, Home: "/home/work", Shell: "/bin/sh"},
		"work:extra": {Name: "work", UID: 20001, GID: 20002, Home: "/home/work", Shell: "/bin/sh"},
		"777:888":    {Name: "777", UID: 777, GID: 888, Home: "/", Shell: "/bin/sh"},
	} {
		got, err := lookupAccount(etc, spec)
		if err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%q: %+v, %v", spec, got, err)
		}
	}
	for _, spec := range []string{"nobody", "work:nogroup", "99999999999"} {
		if got, err := lookupAccount(etc, spec); err == nil {
			t.Errorf("%q: %+v", spec, got)
		}
	}
	if got, err := lookupAccount(t.TempDir(), ""); err != nil || got.UID != 0 {
		t.Errorf("an image without passwd: %+v, %v", got, err)
	}
}

func TestRestartPolicy(t *testing.T) {
	for _, c := range []struct {
		policy string
		code   int
		want   bool
	}{
		{guest.RestartNo, 1, false}, {guest.RestartOnFailure, 0, false}, {guest.RestartOnFailure, 1, true}, {guest.RestartOnFailure, 78, false},
		{guest.RestartAlways, 0, true}, {guest.RestartAlways, 78, false}, {guest.RestartOnFailure, 143, true},
	} {
		w := &guest.Workload{Restart: c.policy, NoRestart: []int{78}}
		if got := startsAgain(w, outcome{Code: c.code}); got != c.want {
			t.Errorf("%s, %d: %v", c.policy, c.code, got)
		}
	}
}

func TestPauses(t *testing.T) {
	var got []time.Duration
	for _, n := range []int{1, 2, 3, 6, 7, 1000} {
		got = append(got, pauseAfter(n)/time.Second)
	}
	if want := []time.Duration{1, 2, 4, 32, 60, 60}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v", got)
	}
}

func TestWriteFilesReplacesLinks(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/nowhere", root+"/etc/resolv.conf"); err != nil {
		t.Fatal(err)
	}
	files := []guest.File{
		{Path: "/etc/resolv.conf", Content: []byte("a")},
		{Path: "/a/b/c", Mode: 0o4750, Content: []byte("b"), UID: os.Getuid(), GID: os.Getgid()},
	}
	for range 2 {
		if err := writeFiles(root, files); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Lstat(root + "/etc/resolv.conf")
	if err != nil || info.Mode() != 0o644 {
		t.Errorf("%v, %v", info, err)
	}
	if info, err = os.Lstat(root + "/a/b/c"); err != nil || info.Mode() != 0o750|os.ModeSetuid {
		t.Errorf("%v, %v", info, err)
	}
	entries, err := os.ReadDir(root + "/etc")
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}

func TestOwnFiles(t *testing.T) {
	d := testDocument()
	d.Network.Search = []string{"example.org"}
	var got bytes.Buffer
	for _, f := range ownFiles(d) {
		got.WriteString("== " + f.Path + "\n" + string(f.Content))
	}
	const want = "== /etc/hostname\ndemo\n== /etc/hosts\n127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n192.168.83.10 demo\n" +
		"== /etc/resolv.conf\nsearch example.org\nnameserver 192.168.83.1\n"
	if got.String() != want {
		t.Errorf("%s", got.String())
	}
}

func TestFindDisk(t *testing.T) {
	sys := t.TempDir()
	for dev, serial := range map[string]string{"vda": "overlay", "vdb": "state\n"} {
		if err := os.MkdirAll(filepath.Join(sys, dev), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sys, dev, "serial"), []byte(serial), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if dev, err := findDisk(sys, "state"); err != nil || dev != "/dev/vdb" {
		t.Errorf("%s, %v", dev, err)
	}
	if _, err := findDisk(sys, "stat"); err == nil {
		t.Error("found what isn't there")
	}
}

func TestPowerButton(t *testing.T) {
	event := func(kind, code uint16, value uint32) []byte {
		e := make([]byte, inputEventSize)
		e[16], e[18], e[20] = byte(kind), byte(code), byte(value)
		return e
	}
	var in bytes.Buffer
	in.Write(event(eventKey, keyPower, 1))
	in.Write(event(eventKey, keyPower, 0)) // released
	in.Write(event(0, 0, 1))
	in.Write(event(eventKey, 30, 1)) // another key
	presses := 0
	if err := readButton(&in, func() { presses++ }); err == nil || presses != 1 {
		t.Errorf("%d presses, %v", presses, err)
	}
}

func TestProbes(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
		case "/moved":
			http.Redirect(w, r, "/ok", http.StatusFound)
		default:
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer srv.Close()
	port := srv.Listener.Addr().(*net.TCPAddr).Port
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closedPort := closed.Addr().(*net.TCPAddr).Port
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	// Nothing listens on the first address: the loopback is asked, too.
	addresses := []netip.Addr{netip.MustParseAddr("127.0.0.99"), netip.MustParseAddr("127.0.0.1")}
	run := func(_ context.Context, argv []string) error {
		if argv[0] == "good" {
			return nil
		}
		return errors.New("exit status 1")
	}
	for name, c := range map[string]struct {
		ready guest.Ready
		want  string
	}{
		"tcp":           {guest.Ready{TCP: port}, ""},
		"tcp closed":    {guest.Ready{TCP: closedPort}, "refused"},
		"http":          {guest.Ready{HTTP: &guest.HTTPReady{Port: port, Path: "/ok"}}, ""},
		"http redirect": {guest.Ready{HTTP: &guest.HTTPReady{Port: port, Path: "/moved"}}, "answered 302 instead of 200"},
		"http 503":      {guest.Ready{HTTP: &guest.HTTPReady{Port: port, Path: "/busy", Status: 503}}, ""},
		"http other":    {guest.Ready{HTTP: &guest.HTTPReady{Port: port, Path: "/busy"}}, "answered 503"},
		"exec":          {guest.Ready{Exec: []string{"good"}}, ""},
		"exec bad":      {guest.Ready{Exec: []string{"bad"}}, "bad: exit status 1"},
	} {
		err := newProbe(c.ready, addresses, run)(context.Background())
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if newProbe(guest.Ready{}, addresses, run) != nil {
		t.Error("a look for nothing")
	}
}
