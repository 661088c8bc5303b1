package integration

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// screen is a terminal that someone sits at: a window of tmux.
type screen struct {
	t    *testing.T
	sock string
}

// screenLimit bounds one reaction: a program's start in an emulated guest on a
// busy machine.
const screenLimit = 90 * time.Second

// newScreen opens a window of 100 by 30 with a shell of the host in it.
func newScreen(t *testing.T) *screen {
	t.Helper()
	if _, err := exec.LookPath("tmux"); err != nil {
		t.Skip("tmux is not installed: the terminal's tests type into it (scripts/setup test)")
	}
	s := &screen{t, filepath.Join(t.TempDir(), "tmux")}
	s.tmux("-u", "-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", "env", "PS1=host> ", "ENV=", "TERM=screen", "LC_ALL=C.UTF-8", "sh")
	t.Cleanup(func() { s.tmux("kill-server") })
	s.sees(`^host> *$`)
	return s
}

func (s *screen) tmux(args ...string) string {
	s.t.Helper()
	out, err := exec.Command("tmux", append([]string{"-S", s.sock}, args...)...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("tmux %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// types types text and then the named keys.
func (s *screen) types(text string, keys ...string) {
	s.t.Helper()
	if text != "" {
		s.tmux("send-keys", "-l", text)
	}
	if len(keys) > 0 {
		s.tmux(append([]string{"send-keys"}, keys...)...)
	}
}

func (s *screen) text() string { return s.tmux("capture-pane", "-p", "-J", "-S", "-200") }

// until waits for something that the screen shows.
func (s *screen) until(what string, ok func(text string) bool) {
	s.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(screenLimit); ; <-tick.C {
		text := s.text()
		if ok(text) {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("not within %s: %s; the screen shows\n%s", screenLimit, what, text)
		}
	}
}

// sees waits until the screen shows a match of the expression, and returns its
// last group.
func (s *screen) sees(expression string) (group string) {
	s.t.Helper()
	re := regexp.MustCompile(`(?m)` + expression)
	s.until(expression, func(text string) bool {
		m := re.FindStringSubmatch(text)
		if m == nil {
			return false
		}
		group = m[len(m)-1]
		return true
	})
	return group
}

// clean empties the screen before a new question, so that no old answer counts.
func (s *screen) clean() {
	s.t.Helper()
	looks := 0
	s.until("an empty screen", func(text string) bool {
		if text = strings.TrimSpace(text); looks > 0 && text != "" && len(text) < len("guest>  ") {
			return true
		}
		if looks%100 == 0 { // again: a shell may have told of a job in between
			s.types("clear", "Enter")
		}
		looks++
		s.tmux("clear-history")
		return false
	})
}

// children are the processes that the window's shell has started.
func (s *screen) children() (pids []int) {
	s.t.Helper()
	shell := strings.TrimSpace(s.tmux("list-panes", "-F", "#{pane_pid}"))
	raw, err := os.ReadFile("/proc/" + shell + "/task/" + shell + "/children")
	if err != nil {
		s.t.Fatal(err)
	}
	for field := range strings.FieldsSeq(string(raw)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			s.t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// The bytes that the terminal's test carries.
const (
	pipedBytes   = 10 << 20 // through a pipe, each way
	printedBytes = 10 << 20 // by a program to its terminal, and from there to the owner's
)

// TestTerminal sits at a terminal and works in a VM, as a person does.
func TestTerminal(t *testing.T) {
	w := newWorld(t)
	s := newScreen(t)
	w.prepareStore(t)
	w.declare(t, "term", fmt.Sprintf(copied, vmmName()))
	t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "term") })
	w.must(t, "up", "term")
	sit := func(name string, do func(*testing.T)) {
		t.Run(name, func(sub *testing.T) {
			s.t = sub
			do(sub)
		})
		s.t = t
	}
	command := filepath.Join(w.bin, "clawvm") + " --root " + w.root
	// runs waits until the guest runs, or no longer runs, what ps shows so.
	runs := func(t *testing.T, what string, want bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("%s runs: %t", what, want), screenLimit, func() bool {
			return strings.Contains(w.must(t, "exec", "--root", "term", "ps"), what) == want
		})
	}
	// modes asks the host's shell for the terminal's modes.
	modes := func() string {
		t.Helper()
		s.clean()
		s.types(`echo "modes $(stty -g)"`, "Enter")
		return s.sees(`^modes ([0-9a-f:]+) *$`)
	}
	before := modes()
	// back waits for the host's shell, and looks that it has its terminal again.
	back := func(t *testing.T) {
		t.Helper()
		s.sees(`^host> *$`)
		if now := modes(); now != before {
			t.Errorf("the terminal's modes are %s, and were %s", now, before)
		}
	}
	enter := func() {
		t.Helper()
		s.clean()
		s.types(command+" exec -it -e 'PS1=guest> ' term sh; echo ended with $?", "Enter")
		s.sees(`^guest> *$`)
	}

	enter()
	sit("size", func(t *testing.T) {
		s.types(`echo "size $(stty size)"`, "Enter")
		s.sees(`^size 30 100 *$`)
		s.tmux("resize-window", "-x", "120", "-y", "40")
		for deadline := time.Now().Add(screenLimit); ; {
			s.clean()
			s.types(`echo "size $(stty size)."`, "Enter")
			if s.sees(`^size ([0-9 ]+)\. *$`) == "40 120" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the guest's terminal does not follow the window")
			}
		}
	})
	sit("an editor that draws the whole screen", func(t *testing.T) {
		s.clean()
		s.types("vi /tmp/note", "Enter")
		s.sees(`^~ *$`)
		s.types("i")
		s.types("written in vi, ünïcode")
		s.sees(`^written in vi, ünïcode`)
		s.types("", "Escape") // alone: with what comes at once it would be another key
		s.sees(`^- /tmp/note`)
		s.types(":wq", "Enter")
		s.sees(`^guest> *$`)
		if got := strings.TrimSpace(w.must(t, "exec", "term", "cat", "/tmp/note")); got != "written in vi, ünïcode" {
			t.Errorf("vi wrote %q", got)
		}
	})
	sit("^C and ^Z are the guest's", func(t *testing.T) {
		s.clean()
		s.types("sleep 1111", "Enter")
		runs(t, "sleep 1111", true)
		s.types("", "C-c")
		s.sees(`^guest> *$`)
		s.types("echo code $?", "Enter")
		s.sees(`^code 130 *$`)
		s.types("sleep 1112", "Enter")
		runs(t, "sleep 1112", true)
		s.types("", "C-z")
		s.sees(`Stopped +sleep 1112`)
		s.types("kill -9 %1", "Enter")
		runs(t, "sleep 1112", false)
	})
	sit("exit code", func(t *testing.T) {
		s.clean()
		s.types("exit 7", "Enter")
		s.sees(`ended with 7 *$`)
		back(t)
	})
	sit("^C on a command without a shell", func(t *testing.T) {
		for _, flags := range []string{"-it", "-t", "-i", ""} { // without -i or -t the keys are this side's
			s.clean()
			s.types(command+" exec "+flags+" term sleep 1113; echo ended with $?", "Enter")
			runs(t, "sleep 1113", true)
			s.types("", "C-c")
			s.sees(`ended with 130 *$`)
			back(t)
			runs(t, "sleep 1113", false)
		}
	})
	sit("10 MB through pipes", func(t *testing.T) {
		data := make([]byte, pipedBytes)
		if _, err := rand.NewChaCha8([32]byte{7}).Read(data); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "data")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		s.clean()
		s.types(command+" exec -i term sh -c 'cat >/tmp/data; cat /tmp/data' <"+file+" | sha256sum", "Enter")
		if got, want := s.sees(`^([0-9a-f]{64})  - *$`), fmt.Sprintf("%x", sha256.Sum256(data)); got != want {
			t.Errorf("they have the checksum %s, want %s", got, want)
		}
		t.Logf("%d MiB in and out in %.1f s", pipedBytes>>20, time.Since(began).Seconds())
	})
	sit("10 MB on the terminal", func(t *testing.T) {
		var text bytes.Buffer
		for i := 0; text.Len() < printedBytes; i++ {
			fmt.Fprintf(&text, "line %d of what is printed, in 60 columns or less\n", i)
		}
		dir := t.TempDir()
		file, printed := filepath.Join(dir, "text"), filepath.Join(dir, "printed")
		if err := os.WriteFile(file, text.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		w.must(t, "cp", file, "term:/tmp/text")
		s.clean()
		s.tmux("pipe-pane", "-O", "cat >'"+printed+"'")
		began := time.Now()
		s.types(command+" exec -it term cat /tmp/text; echo ended with $?", "Enter")
		s.sees(`ended with 0 *$`)
		took := time.Since(began)
		s.tmux("pipe-pane") // ends it
		want := bytes.ReplaceAll(text.Bytes(), []byte("\n"), []byte("\r\n"))
		var got []byte
		eventually(t, "what was printed is in the file", screenLimit, func() bool {
			var err error
			if got, err = os.ReadFile(printed); err != nil {
				t.Fatal(err)
			}
			return bytes.Contains(got, []byte("ended with 0"))
		})
		if !bytes.Contains(got, want) {
			t.Errorf("%d bytes were printed, and the %d of the file are not all among them", len(got), len(want))
		}
		t.Logf("%d MiB in %.1f s", printedBytes>>20, took.Seconds())
	})
	sit("a shell by its own verb", func(t *testing.T) {
		s.clean()
		s.types(command+" shell term; echo ended with $?", "Enter")
		s.sees(`\$ *$`)
		s.types("id -un; exit 3", "Enter")
		s.sees(`^app *$`)
		s.sees(`ended with 3 *$`)
		back(t)
	})
	sit("a signal to clawvm gives the terminal back", func(t *testing.T) {
		enter()
		s.types("sleep 1115", "Enter")
		runs(t, "sleep 1115", true)
		for _, pid := range s.children() {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		s.sees(`ended with 143 *$`)
		back(t)
		runs(t, "sleep 1115", false)
	})
	sit("clawvm is killed", func(t *testing.T) {
		s.clean()
		s.types(command+" exec -it -e 'PS1=guest> ' term sh; stty sane; echo ended with $?", "Enter")
		s.sees(`^guest> *$`)
		s.types("sleep 1116", "Enter")
		runs(t, "sleep 1116", true)
		for _, pid := range s.children() {
			kill(t, pid)
		}
		s.sees(`ended with `)
		runs(t, "sleep 1116", false)
	})
	sit("a window that is closed ends even what ignores it", func(t *testing.T) {
		s.clean()
		s.types(command+` exec -it term sh -c "trap '' HUP; sleep 1117"`, "Enter")
		runs(t, "sleep 1117", true)
		s.tmux("respawn-window", "-k", "env", "PS1=host> ", "ENV=", "TERM=screen", "LC_ALL=C.UTF-8", "sh")
		runs(t, "sleep 1117", false)
		s.sees(`^host> *$`)
	})
	before = modes()
	sit("a VM that goes down gives the terminal back", func(t *testing.T) {
		enter()
		w.must(t, "down", "term")
		s.sees(`ended with [1-9][0-9]* *$`)
		back(t)
	})
}
