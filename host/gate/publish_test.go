package gate

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// speaker is a server that says its name to whoever connects.
func speaker(t *testing.T, name string) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, name)
			c.Close()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// listening is a listening socket as a descriptor, and its address.
func listening(t *testing.T) (*os.File, string) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	return f, l.Addr().String()
}

func heard(t *testing.T, at string) string {
	t.Helper()
	c, err := net.DialTimeout("tcp4", at, 5*time.Second)
	if err != nil {
		return "refused"
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Ports come, lead elsewhere and go while the gate runs, by the supervisor's word.
func TestPortsChangeByMessage(t *testing.T) {
	supervisor, end, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	own, err := Open(end)
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{Config: Config{Address: netip.MustParseAddr("127.0.0.1")}, supervisor: own}
	g.publisher = newPublisher(g.Address)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() { done <- g.obey(ctx) }()
	go func() { done <- g.publishAll(ctx) }()

	f, at := listening(t)
	to := Forward{Host: at, Guest: speaker(t, "first")}
	if err := supervisor.SendFile(Message{Kind: Publish, Port: &to}, f); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if got := heard(t, at); got != "first" {
		t.Errorf("published: %q", got)
	}
	to.Guest = speaker(t, "second")
	if err := supervisor.Send(Message{Kind: Publish, Port: &to}); err != nil {
		t.Fatal(err)
	}
	wait(t, "the port leads elsewhere", func() bool { return heard(t, at) == "second" })
	if err := supervisor.Send(Message{Kind: Unpublish, Port: &to}); err != nil {
		t.Fatal(err)
	}
	wait(t, "the port is gone", func() bool { return heard(t, at) == "refused" })
	cancel()
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// A descriptor that the gate sends is not taken.
func TestSupervisorTakesNoDescriptor(t *testing.T) {
	supervisor, end, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer supervisor.Close()
	own, err := Open(end)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := own.SendFile(Message{Kind: Ready}, w); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if m, err := supervisor.Receive(); err != nil || m.Kind != Ready {
		t.Errorf("received %+v, %v", m, err)
	}
	// The pipe ends only when nobody holds the descriptor that was sent.
	if err := r.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the descriptor is still open: %d, %v", n, err)
	}
}
