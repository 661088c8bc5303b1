package gate

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"
)

// lockedBuffer is a buffer that a timer may write to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestLinesAreStamped(t *testing.T) {
	var out lockedBuffer
	s := newStamper(&out)
	at := time.Date(2026, 11, 22, 15, 50, 6, 10_000_000, time.FixedZone("CET", 3600))
	s.now = func() time.Time { at = at.Add(time.Second); return at }
	s.add(Stdout, []byte("one\ntw"))
	s.add(Stderr, []byte("between\n\n"))
	s.add(Stdout, []byte("o\n"))
	s.add(Stdout, []byte("a prompt: "))
	s.flush()
	s.add(Stdout, []byte("answer\n"))
	want := `2026-11-22T14:50:07.010000Z stdout F one
2026-11-22T14:50:09.010000Z stderr F between
2026-11-22T14:50:10.010000Z stderr F 
2026-11-22T14:50:08.010000Z stdout F two
2026-11-22T14:50:11.010000Z stdout P a prompt: 
2026-11-22T14:50:12.010000Z stdout F answer
`
	if got := out.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestALineWithoutEndIsBounded writes endless text, and the beginning of a line
// that shows by itself.
func TestALineWithoutEndIsBounded(t *testing.T) {
	var out lockedBuffer
	s := newStamper(&out)
	for range 10 {
		s.add(Stdout, bytes.Repeat([]byte("x"), 10_000))
	}
	s.add(Stdout, []byte("\nshort"))
	for line := range strings.Lines(out.String()) {
		if len(line) > stampMax+100 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
	if n := strings.Count(out.String(), "x"); n != 100_000 {
		t.Errorf("%d of 100000 bytes are kept", n)
	}
	for deadline := time.Now().Add(10 * stampWait); !strings.HasSuffix(out.String(), " stdout P short\n"); {
		if time.Now().After(deadline) {
			t.Fatalf("the beginning of a line does not show: %q", out.String()[len(out.String())-100:])
		}
		<-time.After(10 * time.Millisecond)
	}
}
