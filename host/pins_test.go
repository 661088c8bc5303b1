package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/network/egress/policy"
)

// noted is a packet filter that notes what it is told. (The real one is tested in package network, and with a guest.)
type noted struct {
	said []string
	err  error
}

func (n *noted) note(what string, all []network.Destination, keep time.Duration) error {
	texts := make([]string, len(all))
	for i, d := range all {
		texts[i] = d.String()
	}
	slices.Sort(texts)
	n.said = append(n.said, strings.TrimSpace(fmt.Sprintf("%s %s %s", what, strings.Join(texts, ", "), keep)))
	return n.err
}

func (n *noted) Pin(all []network.Destination, keep time.Duration) error {
	return n.note("pin", all, keep)
}
func (n *noted) Unpin(all []network.Destination) error { return n.note("unpin", all, 0) }
func (n *noted) Close() error                          { return nil }

func (n *noted) take() string {
	s := strings.Join(n.said, "; ")
	n.said = nil
	return s
}

func listOf(t *testing.T, entries ...string) *policy.Policy {
	t.Helper()
	s := policy.Spec{VM: "claw", Mode: policy.Allowlist, Own: []netip.Prefix{netip.MustParsePrefix("192.168.83.0/24")}}
	for _, e := range entries {
		all, err := config.ParseAllow(e)
		if err != nil {
			t.Fatal(err)
		}
		s.Rules = append(s.Rules, all...)
	}
	return policy.New(s)
}

func asking(name string, seconds int, addresses ...string) *gate.PinRequest {
	r := &gate.PinRequest{Name: name, Seconds: seconds}
	for _, a := range addresses {
		r.Addresses = append(r.Addresses, netip.MustParseAddr(a))
	}
	return r
}

// What a gate asks for is checked against the declaration, whatever the gate has become.
func TestPinsAreChecked(t *testing.T) {
	kernel := &noted{}
	p := newPins(listOf(t, "a.test", "b.test:80,443/udp", "*.c.test"), kernel)
	for _, c := range []struct {
		ask  *gate.PinRequest
		want string
	}{
		{asking("d.test", 60, "203.0.113.1"), "not in egress.allow"},
		{asking("", 60, "203.0.113.1"), "not in egress.allow"},
		{asking("c.test", 60, "203.0.113.1"), "not in egress.allow"},
		{asking("a.test", 60), "0 addresses"},
		{asking("a.test", 60, slices.Repeat([]string{"203.0.113.1"}, 65)...), "65 addresses"},
		{asking("a.test", 60, "203.0.113.1", "10.0.0.1"), "10.0.0.1 is private"},
		{asking("a.test", 60, "169.254.169.254"), "link-local"},
		{asking("a.test", 60, "192.168.83.7"), "of the host and its VMs"},
		{asking("a.test", 60, "2001:db8::1"), "no IPv6"},
		{asking("a.test", 60, "::ffff:127.0.0.1"), "loopback"},
	} {
		if err := p.pin(c.ask); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.ask, err, c.want)
		}
	}
	if said := kernel.take(); said != "" {
		t.Errorf("the packet filter was told: %s", said)
	}
	for _, c := range []struct {
		ask  *gate.PinRequest
		want string
	}{
		{asking("a.test", 90, "203.0.113.1", "203.0.113.2"), "pin 203.0.113.1 . tcp . 443, 203.0.113.2 . tcp . 443 1m30s"},
		{asking("b.test", 60, "203.0.113.1"), "pin 203.0.113.1 . udp . 443, 203.0.113.1 . udp . 80 1m0s"},
		{asking("x.c.test", 1, "::ffff:203.0.113.3"), "pin 203.0.113.3 . tcp . 443 1m0s"},
		{asking("x.c.test", 1e9, "203.0.113.4"), "pin 203.0.113.4 . tcp . 443 2h0m0s"},
	} {
		if err := p.pin(c.ask); err != nil {
			t.Error(err)
		}
		if said := kernel.take(); said != c.want {
			t.Errorf("told %q, want %q", said, c.want)
		}
	}
	for _, mode := range []policy.Mode{policy.Open, policy.None} {
		p := newPins(policy.New(policy.Spec{Mode: mode}), kernel)
		if err := p.pin(asking("a.test", 60, "203.0.113.1")); err == nil || kernel.take() != "" {
			t.Errorf("mode %s: pinned, %v", mode, err)
		}
	}
}

func TestPinsChange(t *testing.T) {
	kernel := &noted{}
	now := time.Unix(1_700_000_000, 0)
	p := newPins(listOf(t, "a.test", "b.test", "c.test"), kernel)
	p.now = func() time.Time { return now }
	pin := func(name string, seconds int, address, want string) {
		t.Helper()
		if err := p.pin(asking(name, seconds, address)); err != nil {
			t.Fatal(err)
		}
		if said := kernel.take(); said != want {
			t.Errorf("told %q, want %q", said, want)
		}
	}
	pin("a.test", 600, "203.0.113.1", "pin 203.0.113.1 . tcp . 443 10m0s")
	now = now.Add(time.Minute)
	// Another name of the same address doesn't shorten its time.
	pin("b.test", 60, "203.0.113.1", "pin 203.0.113.1 . tcp . 443 9m0s")
	pin("b.test", 60, "203.0.113.2", "pin 203.0.113.2 . tcp . 443 1m0s")
	pin("c.test", 120, "203.0.113.3", "pin 203.0.113.3 . tcp . 443 2m0s")
	// The rules were gone: all for the time that is left.
	now = now.Add(30 * time.Second)
	if err := p.restore(); err != nil {
		t.Fatal(err)
	}
	slices.Sort(kernel.said)
	if said := kernel.take(); said != "pin 203.0.113.1 . tcp . 443 8m30s; pin 203.0.113.2 . tcp . 443 30s; pin 203.0.113.3 . tcp . 443 1m30s" {
		t.Errorf("restored %q", said)
	}
	// b goes: its address goes, but not the one that is a's as well.
	if err := p.govern(listOf(t, "a.test", "c.test:80")); err != nil {
		t.Fatal(err)
	}
	if said := kernel.take(); said != "unpin 203.0.113.2 . tcp . 443, 203.0.113.3 . tcp . 443 0s" {
		t.Errorf("taken back: %q", said)
	}
	keeps := p.keeps(netip.MustParseAddr("192.168.83.1"))
	for to, want := range map[string]bool{
		"203.0.113.1:443": true, "203.0.113.2:443": false, "203.0.113.3:443": false, "203.0.113.1:80": false,
		"192.168.83.1:40000": true, "8.8.8.8:53": true, "8.8.8.8:443": false,
	} {
		if keeps("tcp", netip.MustParseAddrPort(to)) != want {
			t.Errorf("a connection to %s goes on: %v", to, !want)
		}
	}
	if keeps("icmp", netip.MustParseAddrPort("203.0.113.1:0")) {
		t.Error("ICMP goes on")
	}
	// What has ended by itself makes room.
	now = now.Add(time.Hour)
	pin("a.test", 60, "203.0.113.9", "pin 203.0.113.9 . tcp . 443 1m0s")
	if len(p.held) != 1 {
		t.Errorf("%d are held", len(p.held))
	}
	kernel.err = errors.New("no")
	if err := p.pin(asking("a.test", 60, "203.0.113.10")); err == nil || len(p.held) != 1 {
		t.Errorf("a failure: %v, %d are held", err, len(p.held))
	}
	// No list, no pins.
	kernel.err = nil
	if err := p.govern(policy.New(policy.Spec{Mode: policy.Open})); err != nil || len(p.held) != 0 {
		t.Error(err, p.held)
	}
	if keeps := p.keeps(netip.MustParseAddr("192.168.83.1")); !keeps("tcp", netip.MustParseAddrPort("203.0.113.2:443")) || keeps("tcp", netip.MustParseAddrPort("10.0.0.1:443")) {
		t.Error("open keeps what it shouldn't, or not what it should")
	}
}

func TestPinsAreBounded(t *testing.T) {
	p := newPins(listOf(t, "*.a.test"), &noted{})
	var err error
	n := 0
	for ; n <= network.MaxPins && err == nil; n++ {
		err = p.pin(asking(fmt.Sprintf("n%d.a.test", n), 60, fmt.Sprintf("203.0.%d.%d", n>>8, n&255)))
	}
	if !errors.Is(err, network.ErrManyPins) || n != network.MaxPins+1 {
		t.Errorf("after %d: %v", n, err)
	}
}
