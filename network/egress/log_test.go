package egress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func numbered(i int) Event {
	return Event{Time: time.Unix(int64(i), 0), VM: "claw", Kind: KindOpen, Name: fmt.Sprintf("n%d", i), Count: uint64(i)}
}

// readAll returns the counts of the open events, and the other events.
func readAll(t *testing.T, path string) (counts []uint64, others []Event) {
	t.Helper()
	err := Read(t.Context(), path, false, func(e Event) error {
		if e.Kind == KindOpen {
			counts = append(counts, e.Count)
		} else {
			others = append(others, e)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return counts, others
}

func TestLogLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.log")
	l, err := OpenLog(path, LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	zone := time.FixedZone("", 2*3600)
	for _, e := range printed {
		e.Time = e.Time.In(zone)
		l.Write(e)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "events.jsonl", got)
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	l.Write(numbered(1)) // nothing happens
	if err := l.Close(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
}

func TestEncodingIsJSON(t *testing.T) {
	for _, e := range append(printed, Event{}, Event{Name: "a\"b\\c<d>&\u2028\x7f", Answers: []string{"", "\xff"}, Count: 1<<64 - 1, Seconds: 1e6, Millis: 0.001}) {
		want, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if got := e.appendJSON(nil); !bytes.Equal(got, want) {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func TestLogRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.log")
	opts := LogOptions{Size: minLogSize, Files: 3}
	for round := range 3 { // re-opened between
		l, err := OpenLog(path, opts)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 2000 {
			l.Write(numbered(round*2000 + i))
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > minLogSize {
			t.Errorf("%s has %d bytes", f.Name(), info.Size())
		}
		names = append(names, f.Name())
	}
	if got := strings.Join(names, " "); got != "net.log net.log.1 net.log.2" {
		t.Errorf("files %s", got)
	}
	counts, others := readAll(t, path)
	if len(others) != 1 || len(counts) < 1000 || counts[len(counts)-1] != 5999 {
		t.Fatalf("%d events, others %+v", len(counts), others)
	}
	if e := others[0]; e.Kind != KindRemoved || e.VM != "claw" || e.Count != counts[0] {
		t.Errorf("the first event that is kept is number %d, and before it stands %+v", counts[0], e)
	}
	for i := range counts {
		if counts[i] != counts[0]+uint64(i) {
			t.Fatalf("event %d follows %d", counts[i], counts[i-1])
		}
	}
}

func TestLogOptions(t *testing.T) {
	dir := t.TempDir()
	for _, o := range []LogOptions{{Size: 100}, {Files: 1}} {
		if _, err := OpenLog(filepath.Join(dir, "x"), o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
	if err := os.Symlink("/dev/null", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "missing/x"} {
		if _, err := OpenLog(filepath.Join(dir, name), LogOptions{}); err == nil {
			t.Errorf("%s was opened", name)
		}
	}
}

// A disk that hangs holds up nobody; what the queue can't hold is counted.
func TestLogDrops(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.log")
	release, hung := make(chan struct{}), make(chan struct{}, 1)
	l, err := openLog(path, LogOptions{}, func(f *os.File, b []byte) (int, error) {
		select {
		case hung <- struct{}{}:
		default:
		}
		<-release
		return f.Write(b)
	})
	if err != nil {
		t.Fatal(err)
	}
	l.Write(numbered(0))
	<-hung
	written := 1
	for l.Dropped() < 100 {
		if written > logQueue {
			t.Fatal("the queue has no bound")
		}
		l.Write(numbered(written))
		written++
	}
	if written < logQueue/200 {
		t.Errorf("only %d events fit", written)
	}
	close(release)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	counts, others := readAll(t, path)
	if len(counts) != written-100 || len(others) != 1 || others[0].Kind != KindDropped || others[0].Count != 100 || others[0].VM != "claw" {
		t.Errorf("%d of %d events, others %+v", len(counts), written, others)
	}
}

// A full disk loses events, whole ones, and says how many when there is room again.
func TestLogFullDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.log")
	var full atomic.Bool
	var failed atomic.Int64
	l, err := openLog(path, LogOptions{}, func(f *os.File, b []byte) (int, error) {
		if !full.Load() {
			return f.Write(b)
		}
		defer failed.Add(1)
		n, err := f.Write(b[:len(b)/2])
		return n, errors.Join(err, unix.ENOSPC)
	})
	if err != nil {
		t.Fatal(err)
	}
	size := func() int64 {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	l.Write(numbered(1))
	eventually(t, "the first event", func() bool { return size() > 0 })
	full.Store(true)
	l.Write(numbered(2))
	eventually(t, "the failure to be counted", func() bool { return failed.Load() == 1 && l.Dropped() == 1 })
	l.Write(numbered(3))
	eventually(t, "the failure to be counted", func() bool { return failed.Load() == 2 && l.Dropped() == 2 })
	full.Store(false)
	l.Write(numbered(4))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	counts, others := readAll(t, path)
	if fmt.Sprint(counts) != "[1 4]" || len(others) != 1 || others[0].Kind != KindDropped || others[0].Count != 2 {
		t.Errorf("got %v and %+v", counts, others)
	}
}

func TestLogAfterTornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.log")
	if err := os.WriteFile(path, []byte(`{"kind":"open","count":1}`+"\n"+`{"kind":"op`), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := OpenLog(path, LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l.Write(numbered(2))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	counts, others := readAll(t, path)
	if fmt.Sprint(counts) != "[1 2]" || len(others) != 1 || others[0].Kind != KindLost {
		t.Errorf("got %v and %+v", counts, others)
	}
}

func TestReadFollowsRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.log")
	const events = 20000 // about 25 files, of which 20 are kept
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var seen atomic.Int64
	done := make(chan error, 1)
	go func() {
		next := uint64(0)
		done <- Read(ctx, path, true, func(e Event) error {
			if e.Kind != KindOpen || e.Count != next {
				return fmt.Errorf("got %+v, want event %d", e, next)
			}
			next++
			seen.Add(1)
			return nil
		})
	}()
	l, err := OpenLog(path, LogOptions{Size: minLogSize, Files: 20})
	if err != nil {
		t.Fatal(err)
	}
	for i := range events {
		l.Write(numbered(i))
		if i%2000 == 1999 {
			eventually(t, "the reader", func() bool { return seen.Load() == int64(i)+1 || len(done) > 0 })
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil || seen.Load() != events {
		t.Errorf("%d events, %v", seen.Load(), err)
	}
}

func TestReadWhatIsNoLog(t *testing.T) {
	dir := t.TempDir()
	each := func(Event) error { return nil }
	if err := Read(t.Context(), filepath.Join(dir, "none"), false, each); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no log: %v", err)
	}
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("{}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, plant := range map[string]func(string) error{
		"link": func(p string) error { return os.Symlink(secret, p) },
		"fifo": func(p string) error { return unix.Mkfifo(p, 0o600) },
		"dir":  func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		path := filepath.Join(dir, name)
		if err := plant(path); err != nil {
			t.Fatal(err)
		}
		if err := Read(t.Context(), path, false, each); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}

func TestReadBadLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.log")
	var b bytes.Buffer
	line := func(i int) {
		if err := json.NewEncoder(&b).Encode(numbered(i)); err != nil {
			t.Fatal(err)
		}
	}
	line(1)
	b.WriteString("no json\n[]\n{}\n\n")
	line(2)
	b.WriteString(strings.Repeat("x", maxLine-1) + "\n")
	line(3)
	b.WriteString(strings.Repeat("x", 5*maxLine+7) + "\n")
	line(4)
	b.WriteString(`{"kind":"open","count":5}`) // its end isn't written yet
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	counts, others := readAll(t, path)
	if fmt.Sprint(counts) != "[1 2 3 4]" || len(others) != 5 {
		t.Errorf("got %v and %d others", counts, len(others))
	}
	for _, e := range others {
		if e.Kind != KindLost {
			t.Errorf("got %+v", e)
		}
	}
	stop := errors.New("enough")
	if err := Read(t.Context(), path, true, func(Event) error { return stop }); err != stop {
		t.Errorf("got %v", err)
	}
}

func FuzzReadLine(f *testing.F) {
	f.Add([]byte(`{"kind":"query","name":"a"}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "net.log")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		err := Read(t.Context(), path, false, func(e Event) error {
			var out strings.Builder
			if err := Print(&out, e, false); err != nil {
				return err
			}
			line := out.String()
			if strings.Count(line, "\n") != 1 || strings.ContainsAny(strings.NewReplacer("→", "", "←", "").Replace(line[:len(line)-1]), "\x00\x1b\r\u202e\u009b") {
				return fmt.Errorf("printed %q", line)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}
