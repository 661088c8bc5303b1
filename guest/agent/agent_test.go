package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

func TestClientAndServer(t *testing.T) {
	for _, resync := range []bool{false, true} {
		s := newTestServer()
		c := connected(t, s, resync)
		if h := c.Hello(); h.Name != "demo" || h.Protocol != ProtocolVersion {
			t.Errorf("hello: %+v", h)
		}
		ctx := deadline(t, 10*time.Second)
		if err := c.Ping(ctx); err != nil {
			t.Error(err)
		}
		at := time.Unix(1e9, 0)
		if err := c.SetClock(ctx, at); err != nil {
			t.Error(err)
		}
		if err := c.Shutdown(ctx, 3*time.Second); err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		if !s.clock.Equal(at) || len(s.grace) != 1 || s.grace[0] != 3*time.Second {
			t.Errorf("clock %v, grace %v", s.clock, s.grace)
		}
		s.mu.Unlock()
		if err := c.Shutdown(ctx, -time.Second); err == nil || !strings.Contains(err.Error(), "grace must be") {
			t.Errorf("a grace below zero: %v", err)
		}
	}
}

func TestResyncWithGarbageBefore(t *testing.T) {
	host, guest := pair(t)
	// What an earlier session left in both directions, an old acknowledgement among it.
	for _, c := range []io.Writer{host, guest} {
		if _, err := c.Write(append(bytes.Repeat([]byte("\xfeclaw rest"), 500), syncMessage(syncAck, syncToken{1})...)); err != nil {
			t.Fatal(err)
		}
	}
	s := newTestServer()
	s.serve(t, guest, true)
	c, err := Connect(deadline(t, 10*time.Second), host, true)
	if err != nil {
		t.Fatal(err)
	}
	closeQuietly(c)
}

func TestResyncWhenTheHostIsLongBeforeTheGuest(t *testing.T) {
	host, guest := pair(t)
	got := make(chan error, 1)
	var c *Client
	go func() {
		var err error
		c, err = Connect(deadline(t, 20*time.Second), host, true)
		got <- err
	}()
	select { // several marks are waiting in the port by then
	case err := <-got:
		t.Fatalf("connected to nobody: %v", err)
	case <-time.After(5 * syncInterval):
	}
	newTestServer().serve(t, guest, true)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	if err := c.Ping(deadline(t, time.Second)); err != nil {
		t.Error(err)
	}
	closeQuietly(c)
}

// TestResyncOnALivingSession is a second host on the port of a guest that still believes in the first one.
func TestResyncOnALivingSession(t *testing.T) {
	host, guest := pair(t)
	s := newTestServer()
	first := make(chan error, 1)
	go func() { first <- s.ServeConn(context.Background(), keepOpen{guest}, true) }()
	c, err := Connect(deadline(t, 10*time.Second), keepOpen{host}, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Ping(deadline(t, time.Second)); err != nil {
		t.Fatal(err)
	}
	// The first host goes without a word, in the middle of a message; the port stays.
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := host.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Write([]byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0x10, 0, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() { got <- syncHost(deadline(t, 10*time.Second), host) }()
	if err := <-first; err == nil {
		t.Error("the first session ended without saying why")
	}
	if err := guest.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := syncGuest(byteReader{guest}, guest); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

// keepOpen is a port that outlives its sessions: its Close only wakes the reader.
type keepOpen struct {
	io.ReadWriteCloser
}

func (k keepOpen) Close() error {
	if d, ok := k.ReadWriteCloser.(interface{ SetReadDeadline(time.Time) error }); ok {
		return d.SetReadDeadline(time.Unix(1, 0))
	}
	return nil
}

func TestConnectEndsWithItsContext(t *testing.T) {
	host, _ := pair(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := Connect(ctx, host, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func TestEventsReplayThePresentStateFirst(t *testing.T) {
	s := newTestServer()
	c := connected(t, s, false)
	s.Board.Post(Event{Kind: WorkloadStarted})
	s.Board.Post(Event{Kind: Ready})
	s.Board.Post(Event{Kind: WorkloadExited, Code: 1, Next: 1})
	s.Board.Post(Event{Kind: WorkloadStarted, Restarts: 1})
	events, failure, err := c.Events(deadline(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if e := <-events; e.Kind != WorkloadStarted || e.Restarts != 1 {
		t.Errorf("first: %+v", e)
	}
	s.Board.Post(Event{Kind: Ready, Detail: "a\x1b[2Jb\nc"})
	if e := <-events; e.Kind != Ready || e.Detail != "a?[2Jb c" {
		t.Errorf("then: %+v", e)
	}
	s.Board.Post(Event{Kind: Ending, Reason: ReasonExit, Code: 3})
	if !s.Board.Delivered(deadline(t, 5*time.Second)) {
		t.Error("the end was not delivered")
	}
	if e := <-events; e.Kind != Ending || e.Code != 3 {
		t.Errorf("last: %+v", e)
	}
	closeQuietly(c)
	if _, open := <-events; open {
		t.Error("an event after the end")
	}
	if failure() == nil {
		t.Error("a torn stream is no error")
	}
	select {
	case <-c.Done():
		if c.Err() == nil {
			t.Error("done without a reason")
		}
	case <-time.After(5 * time.Second):
		t.Error("not done")
	}
}

func TestBoardIsNotDeliveredWithoutAListener(t *testing.T) {
	b := NewBoard()
	b.Post(Event{Kind: Ready})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if b.Delivered(ctx) {
		t.Error("delivered to nobody")
	}
}

func TestBoardGivesALateListenerThePresent(t *testing.T) {
	b := NewBoard()
	for range 3 * recentEvents {
		b.Post(Event{Kind: WorkloadStarted})
		b.Post(Event{Kind: Ready})
	}
	events, seq, err := b.after(context.Background(), 1)
	if err != nil || len(events) != 2 || seq != 6*recentEvents {
		t.Errorf("%d events, seq %d, %v", len(events), seq, err)
	}
	if len(b.recent) != recentEvents {
		t.Errorf("%d events are kept", len(b.recent))
	}
}

func TestLogs(t *testing.T) {
	s := newTestServer()
	c := connected(t, s, false)
	s.Log.Append(Stdout, []byte("one\n"))
	s.Log.Append(Stderr, []byte("two\n"))
	l, err := c.Logs(deadline(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		s Stream
		d string
	}{{Stdout, "one\n"}, {Stderr, "two\n"}, {Stdout, "three\n"}} {
		if i == 2 {
			s.Log.Append(Stdout, []byte("three\n"))
		}
		p, err := l.Next()
		if err != nil || p.Stream != want.s || string(p.Data) != want.d {
			t.Errorf("%d: %+v, %v", i, p, err)
		}
	}
	s.Log.Append(Stdout, []byte("four"))
	s.Log.Close()
	s.Log.Drain(deadline(t, 5*time.Second))
	rest, err := io.ReadAll(l)
	if err != nil || string(rest) != "four" {
		t.Errorf("%q, %v", rest, err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestLogKeepsTheEndAndSaysWhatIsLost(t *testing.T) {
	l := NewLog()
	r := l.follow()
	line := []byte(strings.Repeat("x", 99) + "\n")
	const lines = 10000
	for i := range lines {
		l.Append(Stdout+Stream(i%2), line)
	}
	if l.size > LogSize {
		t.Errorf("%d bytes are kept", l.size)
	}
	_, _, lost, err := r.take(context.Background())
	if err != nil || lost == 0 {
		t.Fatalf("lost %d, %v", lost, err)
	}
	l.Close()
	got := lost
	for {
		_, data, more, err := r.take(context.Background())
		if err == io.EOF {
			break
		}
		if err != nil || more != 0 {
			t.Fatalf("%d more lost, %v", more, err)
		}
		got += uint64(len(data))
	}
	if want := uint64(lines * len(line)); got != want {
		t.Errorf("%d bytes of %d", got, want)
	}
}

func TestLogMemoryDoesNotGrowWithTheNumberOfWrites(t *testing.T) {
	l := NewLog()
	for range 2 * LogSize {
		l.Append(Stdout, []byte{'.'})
	}
	if n := len(l.chunks); n > LogSize/chunkSize+1 {
		t.Errorf("%d chunks", n)
	}
}
