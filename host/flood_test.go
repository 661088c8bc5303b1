package host

import (
	"bytes"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/host/gate"
)

func TestBucket(t *testing.T) {
	b, now := newBucket(3, 2), time.Unix(1000, 0)
	for i := range 3 {
		if wait := b.take(now); wait != 0 {
			t.Errorf("token %d: wait %s", i, wait)
		}
	}
	if wait := b.take(now); wait != 500*time.Millisecond {
		t.Errorf("an empty bucket says %s", wait)
	}
	if wait := b.take(now.Add(500 * time.Millisecond)); wait != 0 {
		t.Errorf("after that time: %s", wait)
	}
	now = now.Add(time.Hour)
	for i := range 3 {
		if wait := b.take(now); wait != 0 {
			t.Errorf("an hour later, token %d: wait %s", i, wait)
		}
	}
	if b.take(now) == 0 {
		t.Error("it holds more than its size")
	}
}

// TestFloodOfMessagesFillsNoLog lets a guest say a million things: the log holds
// the first ones, says how many are missing, and tells of the end.
func TestFloodOfMessagesFillsNoLog(t *testing.T) {
	var out bytes.Buffer
	s := &Supervisor{log: log.New(&out, "", 0), journal: newJournal()}
	l := &life{Supervisor: s}
	for i := range 1_000_000 {
		l.heed(gate.Message{Kind: gate.Progress, Detail: fmt.Sprint("number ", i)})
	}
	if n := strings.Count(out.String(), "\n"); n != lineBurst || !strings.HasPrefix(out.String(), "guest: number 0\n") {
		t.Errorf("%d lines, want the first %d", n, lineBurst)
	}
	l.lines.bucket.last = l.lines.bucket.last.Add(-time.Hour)
	l.heed(gate.Message{Kind: gate.Progress, Detail: "later"})
	if want := fmt.Sprintf("%d lines about the guest were left out: it says too much\nguest: later\n", 1_000_000-lineBurst); !strings.HasSuffix(out.String(), want) {
		t.Errorf("an hour later it says %q", out.String()[max(0, out.Len()-200):])
	}
}

// TestSupervisorsLogIsBounded writes a supervisor's log for long: two files of
// hostLogMax at most, and nothing of the newest lost.
func TestSupervisorsLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "supervisor.log")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := &boundedLog{out: f, path: path}
	line := bytes.Repeat([]byte("x"), 1<<10)
	for range 3 * hostLogMax / len(line) {
		if _, err := w.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write([]byte("the last line\n")); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(path + "*")
	if err != nil || len(files) != 2 {
		t.Fatalf("%v, %v; want two files", files, err)
	}
	for _, file := range files {
		if info, err := os.Stat(file); err != nil || info.Size() > hostLogMax+2<<10 {
			t.Errorf("%s: %d bytes, %v", file, info.Size(), err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil || !bytes.HasSuffix(text, []byte("the last line\n")) {
		t.Errorf("the newest file ends with %q, %v", text[max(0, len(text)-20):], err)
	}
	// A file that isn't the log is left alone.
	other := &boundedLog{out: f, path: path + ".other"}
	if _, err := other.Write(make([]byte, hostLogMax+1)); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Write(line); err != nil {
		t.Fatal(err)
	}
	if again, err := filepath.Glob(path + "*"); err != nil || len(again) != 2 {
		t.Errorf("%v, %v", again, err)
	}
}

// TestSupervisorsLogIsMadeAnew removes the log while it is written, as an rm does
// for which a start had to wait.
func TestSupervisorsLogIsMadeAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm", "supervisor.log")
	f, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := &boundedLog{out: f, path: path}
	for _, line := range []string{"before\n", "after\n", "more\n"} {
		if _, err := w.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
		if line == "before\n" {
			if err := os.RemoveAll(filepath.Dir(path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "after\nmore\n" {
		t.Errorf("the log holds %q, %v", text, err)
	}
}
