package gate

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Answers come to who asked, in whatever order.
func TestPinning(t *testing.T) {
	supervisor, end, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := Open(end)
	if err != nil {
		t.Fatal(err)
	}
	p := newPinning(conn)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.run(ctx) }()
	addrs := []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")}
	var all sync.WaitGroup
	names := []string{"a.test", "b.test", "c.test"}
	errs := make([]error, len(names))
	for i, name := range names {
		all.Go(func() { errs[i] = p.pin(name, addrs, 1500*time.Millisecond) })
	}
	var requests []Message
	for range names {
		m, err := supervisor.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if m.Kind != Pin || m.Pin == nil || m.Pin.Seconds != 2 || !slices.Equal(m.Pin.Addresses, addrs) {
			t.Fatalf("asked %+v, %+v", m, m.Pin)
		}
		requests = append(requests, m)
	}
	slices.Reverse(requests)
	for _, m := range requests {
		detail := ""
		if m.Pin.Name == "b.test" {
			detail = "not this one"
		}
		for _, id := range []uint64{m.Pin.ID + 1000, m.Pin.ID} { // to nobody, and to who asked
			if err := supervisor.Send(Message{Kind: Pinned, Pin: &PinRequest{ID: id}, Detail: detail}); err != nil {
				t.Fatal(err)
			}
		}
	}
	all.Wait()
	if errs[0] != nil || errs[2] != nil || errs[1] == nil || errs[1].Error() != "not this one" {
		t.Error(errs)
	}
	if len(p.waiting) != 0 {
		t.Errorf("%d wait", len(p.waiting))
	}
	// A long list fits into a message.
	long := strings.Repeat(strings.Repeat("a", 61)+".", 4)
	many := slices.Repeat([]netip.Addr{netip.MustParseAddr("255.255.255.255")}, 32)
	go func() { errs[0] = p.pin(long, many, time.Hour); cancel() }()
	m, err := supervisor.Receive()
	if err != nil || m.Pin.Name != long || len(m.Pin.Addresses) != 32 {
		t.Fatalf("%+v, %v", m, err)
	}
	if err := supervisor.Send(Message{Kind: Pinned, Pin: &PinRequest{ID: m.Pin.ID}}); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestPinningTakesNoNonsense(t *testing.T) {
	supervisor, end, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := Open(end)
	if err != nil {
		t.Fatal(err)
	}
	if err := supervisor.Send(Message{Kind: Shutdown}); err != nil {
		t.Fatal(err)
	}
	if err := newPinning(conn).run(t.Context()); err == nil || !strings.Contains(err.Error(), `"shutdown"`) {
		t.Error(err)
	}
}
