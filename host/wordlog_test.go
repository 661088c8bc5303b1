package host

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestWhatADaemonSaysIsBounded lets a program say more than a guest may cause: the
// first of it is kept, the rest counted, and the program never waits.
func TestWhatADaemonSaysIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "virtiofsd-share0.log")
	l := &life{}
	log, words, err := l.openWordLog(path)
	if err != nil {
		t.Fatal(err)
	}
	const said = 300_000
	long := bytes.Repeat([]byte("x"), 3*lineMax)
	if _, err := words.Write(append(long, "\n\xff\x1b[2J no text\n"...)); err != nil {
		t.Fatal(err)
	}
	for range said / 100 {
		if _, err := words.Write(bytes.Repeat([]byte("a line of a guest's doing\n"), 100)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := words.Write([]byte("its last words")); err != nil {
		t.Fatal(err)
	}
	if err := words.Close(); err != nil {
		t.Fatal(err)
	}
	log.await()
	if err := l.undo.unwind(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), "\n"); n != lineBurst+1 {
		t.Errorf("%d lines are in the log, want %d and one that counts the rest", n, lineBurst)
	}
	// The long line is three, and an empty one that ends it.
	if want := fmt.Sprintf("clawvm: %d lines were left out: it says too much\n", 3+1+1+said+1-lineBurst); !strings.HasSuffix(string(text), want) {
		t.Errorf("the log ends with %q, want %q", text[max(0, len(text)-100):], want)
	}
	if len(text) > 100<<10 {
		t.Errorf("the log has %d bytes", len(text))
	}
}

// TestADaemonsLogEnds waits for last words, and not for a process that the
// program left behind and that holds the pipe.
func TestADaemonsLogEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l := &life{}
	log, words, err := l.openWordLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer words.Close() // the one that is left behind
	if _, err := words.WriteString("last words\n"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	log.await()
	if err := l.undo.unwind(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 10*wordLogEnd {
		t.Errorf("it took %s", took)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "last words\n" {
		t.Errorf("the log has %q, %v", text, err)
	}
}
