package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func tcpTo(a string, port uint16) Destination {
	return Destination{netip.PrefixFrom(netip.MustParseAddr(a), 32), unix.IPPROTO_TCP, port}
}

func udpTo(a string, port uint16) Destination {
	d := tcpTo(a, port)
	d.Protocol = unix.IPPROTO_UDP
	return d
}

// A VM with an allowlist reaches what is pinned, as long as it is, and the networks that are allowed without a name.
func TestAllowlist(t *testing.T) {
	if !isolated(t) {
		return
	}
	up := newUplink(t)
	up.serve(t, "lan", router+":80")
	up.serve(t, "lan443", router+":443")
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	g := Guest{VM: "listed", Address: netip.MustParseAddr("192.168.83.13"), Egress: EgressAllowlist, LogGroup: 13,
		Allowed: []Destination{{netip.MustParsePrefix("203.0.113.0/24"), unix.IPPROTO_TCP, 80}}}
	v, other := newVM(t, r, g), newVM(t, r, Guest{VM: "other", Address: netip.MustParseAddr("192.168.83.14"), Egress: EgressAllowlist, LogGroup: 14})
	logged, _ := listenFlows(t, g.LogGroup)
	pins := r.Pinner(g.VM)
	defer pins.Close()

	v.answers(t, "tcp", router+":80", "lan "+hostUplink)
	for _, refused := range []string{router + ":443", server + ":80", public + ":53"} {
		v.refuses(t, "tcp", refused)
		v.refuses(t, "udp", refused)
	}
	v.refuses(t, "udp", router+":80")
	other.refuses(t, "tcp", router+":80")
	soon(t, "they are logged", func() bool {
		return logged("microvm-egress: 6 "+router+":80") && logged("microvm-refused: 6 "+server+":80") && logged("microvm-refused: 17 "+router+":80")
	})

	// One address, one port, one protocol, one VM.
	must(t, pins.Pin([]Destination{tcpTo(server, 80)}, time.Minute))
	v.answers(t, "tcp", server+":80", "server "+hostUplink)
	v.refuses(t, "udp", server+":80")
	v.refuses(t, "tcp", server+":81")
	v.refuses(t, "tcp", router+":443")
	other.refuses(t, "tcp", server+":80")
	soon(t, "it is logged", func() bool { return logged("microvm-egress: 6 " + server + ":80") })
	// Ensure leaves what is pinned, and sees nothing to do.
	if !get(r.Present(g))(t) {
		t.Error("with a pin, the rules count as changed")
	}
	must(t, r.Ensure(g))
	v.answers(t, "tcp", server+":80", "server "+hostUplink)

	// A connection outlives its pin, a new one doesn't begin.
	must(t, pins.Unpin([]Destination{tcpTo(server, 80), udpTo(server, 7)}))
	v.refuses(t, "tcp", server+":80")
	must(t, pins.Pin([]Destination{udpTo(server, 80), tcpTo(server, 80)}, 300*time.Millisecond))
	v.answers(t, "udp", server+":80", "server "+hostUplink)
	soon(t, "the pin ends by itself", func() bool {
		_, _, err := v.ask("tcp", server+":80")
		return errors.Is(err, unix.ECONNREFUSED)
	})
	// Pinned again, it has the whole time again, and no more than the last.
	must(t, pins.Pin([]Destination{tcpTo(server, 80)}, 200*time.Millisecond))
	must(t, pins.Pin([]Destination{tcpTo(server, 80)}, time.Hour))
	must(t, pins.Pin([]Destination{tcpTo(server, 80)}, 2*time.Minute))
	if now := nft(t, "list", "set", "inet", "clawvm_v1_0a1b2c3d", "pins_listed"); !strings.Contains(now, "timeout 2m") || strings.Contains(now, "1h") {
		t.Error(now)
	}
	v.answers(t, "tcp", server+":80", "server "+hostUplink)

	// After a flush nothing is pinned, and nothing opens.
	nft(t, "flush", "ruleset")
	if err := pins.Pin([]Destination{tcpTo(server, 80)}, time.Minute); !errors.Is(err, ErrNoPins) {
		t.Errorf("without rules: %v", err)
	}
	must(t, r.Ensure(g))
	must(t, r.Ensure(other.guest))
	v.refuses(t, "tcp", server+":80")
	v.answers(t, "tcp", router+":80", "lan "+hostUplink)
	must(t, pins.Pin([]Destination{tcpTo(server, 80)}, time.Minute))
	v.answers(t, "tcp", server+":80", "server "+hostUplink)

	// More than there is room for.
	var many []Destination
	for i := range MaxPins {
		many = append(many, tcpTo(fmt.Sprintf("198.51.%d.%d", i>>8, i&255), 443))
	}
	if err := pins.Pin(many, time.Minute); !errors.Is(err, ErrManyPins) {
		t.Errorf("%d and one: %v", MaxPins, err)
	}
	must(t, pins.Pin(many[:MaxPins-1], time.Minute))
	v.answers(t, "tcp", server+":80", "server "+hostUplink)
	must(t, pins.Unpin(many[:MaxPins-1]))

	// Another list: what it has more is open, what it has less is closed.
	g.Allowed = []Destination{{netip.MustParsePrefix("203.0.113.254/32"), unix.IPPROTO_TCP, 443}}
	must(t, r.Ensure(g))
	v.answers(t, "tcp", router+":443", "lan443 "+hostUplink)
	v.refuses(t, "tcp", router+":80")
	v.answers(t, "tcp", server+":80", "server "+hostUplink)
	// Other modes have no sets.
	g.Egress = EgressOpen
	must(t, r.Ensure(g))
	v.answers(t, "tcp", router+":80", "lan "+hostUplink)
	if now := rulesNow(t); strings.Contains(now, "pins_listed") || strings.Contains(now, "allowed_listed") {
		t.Error(now)
	}
	g.Egress = EgressAllowlist
	must(t, r.Ensure(g))
	v.refuses(t, "tcp", server+":80")
	must(t, r.Remove(g.VM, g.Address))
	if now := rulesNow(t); strings.Contains(now, "listed") {
		t.Errorf("left over:\n%s", now)
	}
}

// Ten thousand networks are set, found and changed in a reasonable time.
func TestManyAllowed(t *testing.T) {
	if !isolated(t) {
		return
	}
	r := testRules(t, testBridge)
	g := listGuest
	g.Allowed = nil
	for i := range 10_000 {
		g.Allowed = append(g.Allowed, tcpTo(fmt.Sprintf("203.%d.%d.1", i>>8, i&255), 443))
	}
	begun := time.Now()
	must(t, r.Ensure(g))
	t.Logf("10,000 set in %s", time.Since(begun))
	if !get(r.Present(g))(t) {
		t.Error("not all of them are there")
	}
	begun = time.Now()
	g.Allowed = g.Allowed[1:]
	must(t, r.Ensure(g))
	if !get(r.Present(g))(t) {
		t.Error("one is still there")
	}
	t.Logf("one removed in %s", time.Since(begun))
}

// Private networks are closed unless they are asked for, in every mode.
func TestPrivateNetworks(t *testing.T) {
	if !isolated(t) {
		return
	}
	up := newUplink(t)
	private := []string{"10.9.9.9", "172.20.0.1", "192.168.200.1", "100.64.7.7"}
	for _, a := range private {
		up.do(func() error { return setUpLink("lo", a+"/32") })
		up.serve(t, "private", a+":80")
	}
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	g := Guest{VM: "openclaw", Address: netip.MustParseAddr("192.168.83.10"), Egress: EgressOpen, LogGroup: 10}
	v := newVM(t, r, g)
	for _, mode := range []string{EgressOpen, EgressAllowlist} {
		g.Egress, g.AllowPrivate = mode, false
		g.Allowed = []Destination{{netip.MustParsePrefix("0.0.0.0/0"), unix.IPPROTO_TCP, 80}}
		must(t, r.Ensure(g))
		v.answers(t, "tcp", server+":80", "server "+hostUplink)
		for _, a := range private {
			v.refuses(t, "tcp", net.JoinHostPort(a, "80"))
			v.refuses(t, "udp", net.JoinHostPort(a, "80"))
		}
		g.AllowPrivate = true
		must(t, r.Ensure(g))
		for _, a := range private {
			v.answers(t, "tcp", net.JoinHostPort(a, "80"), "private "+hostUplink)
		}
		v.refuses(t, "tcp", metadata+":80")
		v.refuses(t, "tcp", "192.168.83.99:80")
		v.refuses(t, "tcp", "192.168.83.1:80")
	}
}
