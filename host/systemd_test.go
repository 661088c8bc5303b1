package host

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestPulse(t *testing.T) {
	well := func() error { return nil }
	hangs := func() error { return errors.New("nobody answers") }
	const more = "EXTEND_TIMEOUT_USEC=30000000\nWATCHDOG=1"
	for _, c := range []struct {
		name    string
		state   State
		overdue bool
		alive   func() error
		want    string
	}{
		{"a start asks for more time", Starting, false, hangs, more},
		{"an end asks for more time", Stopping, false, hangs, more},
		{"an end that takes too long does not", Stopping, true, well, ""},
		{"a VM that is well feeds the watchdog", Running, false, well, "WATCHDOG=1"},
		{"one that hangs does not", Running, false, hangs, ""},
		{"one that is paused can answer nothing", Paused, false, hangs, "WATCHDOG=1"},
		{"one between two lives neither", "restarting", false, hangs, "WATCHDOG=1"},
	} {
		if got := pulse(Status{State: c.state}, c.overdue, c.alive); got != c.want {
			t.Errorf("%s: it says %q, want %q", c.name, got, c.want)
		}
	}
}

// A guest has a say in why its agent is lost. It must not reach systemd as a
// message of its own.
func TestStatusText(t *testing.T) {
	for want, st := range map[string]Status{
		"starting: guest": {State: Starting, Step: "guest"},
		"ready at 192.168.83.2 (qemu); the guest's agent does not answer: gone": {State: Running, Address: "192.168.83.2", VMM: "qemu", Lost: "gone\nWATCHDOG=1"},
		"paused at 192.168.83.2 (qemu)":                                         {State: Paused, Address: "192.168.83.2", VMM: "qemu"},
		"stopping":                                                              {State: Stopping},
	} {
		if got := statusText(st); got != want {
			t.Errorf("the status is %q, want %q", got, want)
		}
	}
	if got := oneLine("a\x1b[2J" + strings.Repeat("ü", statusMax)); len(got) > statusMax+len("…") || strings.ContainsRune(got, '\x1b') {
		t.Errorf("the line is %q", got)
	}
}

func TestUnitExit(t *testing.T) {
	failed := errors.New("it failed")
	declaration := coded(ExitDeclaration, failed)
	for _, c := range []struct {
		name    string
		managed bool
		err     error
		want    int
	}{
		{"as asked", true, nil, 0},
		{"a start that failed is tried again", true, &LoggedError{Err: failed}, ExitFailed},
		{"what the policy decided is not", true, &LoggedError{Err: coded(3, failed), Decided: true}, ExitForGood},
		{"a declaration that is wrong keeps its code", true, &LoggedError{Err: declaration, Decided: true}, ExitDeclaration},
		{"at a terminal the workload's code counts", false, &LoggedError{Err: coded(3, failed), Decided: true}, 3},
	} {
		t.Setenv("NOTIFY_SOCKET", "")
		if c.managed {
			t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
		}
		if got := UnitExit(c.err); got != c.want {
			t.Errorf("%s: exit code %d, want %d", c.name, got, c.want)
		}
	}
}

func TestEnabledIn(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"clawvm@web.service", "clawvm@a-b.service", "ssh.service", "clawvm@.service.d"} {
		if err := os.Symlink("/nowhere", filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	got := enabledIn([]string{filepath.Join(dir, "absent"), dir})
	if want := map[string]bool{"web": true, "a-b": true}; !reflect.DeepEqual(got, want) {
		t.Errorf("enabled are %v, want %v", got, want)
	}
}

func TestJournalWriter(t *testing.T) {
	var b strings.Builder
	for _, line := range []string{"2026/11/22 18:00:00 ready\n", "no time here, and long enough to have one\n", "short\n"} {
		if n, err := (journalWriter{&b}).Write([]byte(line)); n != len(line) || err != nil {
			t.Errorf("%d bytes are written, %v", n, err)
		}
	}
	if got, want := b.String(), "ready\nno time here, and long enough to have one\nshort\n"; got != want {
		t.Errorf("the journal has %q, want %q", got, want)
	}
}

func TestMatches(t *testing.T) {
	loads := []string{"api-key", "vm.*"}
	for id, want := range map[string]bool{"api-key": true, "vm.token": true, "api": false, "": false} {
		if got := matches(loads, id); got != want {
			t.Errorf("%q is loaded: %t, want %t", id, got, want)
		}
	}
}
