package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	nflog "github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"
)

// listenFlows collects "PREFIX PROTO DESTINATION" of what is logged through a group.
func listenFlows(t *testing.T, group uint16) (has func(string) bool, all func() []string) {
	t.Helper()
	n := get(nflog.Open(&nflog.Config{Group: group, Copymode: nflog.CopyPacket, Flags: 0}))(t)
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); n.Close() })
	var mu sync.Mutex
	var seen []string
	must(t, n.RegisterWithErrorFunc(ctx, func(a nflog.Attribute) int {
		if p := *a.Payload; len(p) >= 24 && a.Prefix != nil {
			to := netip.AddrPortFrom(netip.AddrFrom4([4]byte(p[16:20])), binary.BigEndian.Uint16(p[22:24]))
			mu.Lock()
			seen = append(seen, fmt.Sprintf("%s%d %v", *a.Prefix, p[9], to))
			mu.Unlock()
		}
		return 0
	}, func(error) int { return 0 }))
	all = func() []string { mu.Lock(); defer mu.Unlock(); return append([]string(nil), seen...) }
	return func(want string) bool {
		for _, s := range all() {
			if s == want {
				return true
			}
		}
		return false
	}, all
}

// What a VM with open egress reaches, and what it doesn't.
func TestTraffic(t *testing.T) {
	if !isolated(t) {
		return
	}
	up := newUplink(t)
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	v, other, tight := newVM(t, r, openGuest), (*vm)(nil), newVM(t, r, noneGuest)
	g := Guest{VM: "other", Address: netip.MustParseAddr("192.168.83.20"), Egress: EgressOpen, LogGroup: 20} // no resolver
	other = newVM(t, r, g)
	hostSpace := (*space)(nil)
	logged, flows := listenFlows(t, openGuest.LogGroup)
	loggedTight, _ := listenFlows(t, noneGuest.LogGroup)
	hostSpace.serve(t, "gate", "192.168.83.1:5310")
	hostSpace.serve(t, "gate2", "192.168.83.1:5311")
	hostSpace.serve(t, "sshd", "0.0.0.0:22")
	other.serve(t, "other", "0.0.0.0:80")
	v.serve(t, "guest", "0.0.0.0:18789")
	up.serve(t, "lan", router+":80")

	// No redirect leaves the host for a guest, whatever the host's parameters say; other ICMP does.
	raw := get(unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP))(t)
	defer unix.Close(raw)
	icmp := func(typ byte) error {
		return unix.Sendto(raw, []byte{typ, 0, ^typ, 0xff, 0, 0, 0, 0}, 0, &unix.SockaddrInet4{Addr: openGuest.Address.As4()})
	}
	must(t, icmp(0)) // an answer to a ping
	if err := icmp(icmpTypeRedirect); !errors.Is(err, unix.EPERM) {
		t.Errorf("a redirect was sent: %v", err)
	}
	// Out: behind the uplink's address, logged.
	v.answers(t, "tcp", server+":80", "server "+hostUplink)
	v.answers(t, "udp", server+":80", "server "+hostUplink)
	soon(t, "the connections are logged", func() bool {
		return logged("microvm-egress: 6 "+server+":80") && logged("microvm-egress: 17 "+server+":80")
	})
	// DNS to any address: the VM's own gate.
	for _, network := range []string{"udp", "tcp"} {
		v.answers(t, network, public+":53", "gate 192.168.83.10")
		v.answers(t, network, "192.168.83.1:53", "gate 192.168.83.10")
		v.answers(t, network, "192.168.83.1:5310", "gate 192.168.83.10")
		v.answers(t, network, "192.168.83.20:53", "gate 192.168.83.10")
		tight.answers(t, network, public+":53", "gate2 192.168.83.11")
		v.refuses(t, network, "192.168.83.1:5311") // another's gate
		up.answers(t, network, public+":53", "public "+public)
	}
	// The VM without a resolver has no map entry: its DNS is like anything else.
	other.refuses(t, "tcp", "192.168.83.1:53")
	other.answers(t, "tcp", public+":53", "public "+hostUplink)
	// Another VM: there it is, but not for a VM.
	hostSpace.answers(t, "tcp", "192.168.83.20:80", "other 192.168.83.1")
	for _, network := range []string{"tcp", "udp"} {
		v.refuses(t, network, "192.168.83.20:80")
		v.refuses(t, network, "192.168.83.99:80") // there is none
	}
	// The metadata service: there for the host.
	hostSpace.answers(t, "tcp", metadata+":80", "metadata "+hostUplink)
	v.refuses(t, "tcp", metadata+":80")
	v.refuses(t, "udp", metadata+":80")
	// The host's own ports, at any of its addresses: there for the uplink.
	up.answers(t, "tcp", hostUplink+":22", "sshd "+router)
	for _, a := range []string{"192.168.83.1", hostUplink} {
		v.refuses(t, "tcp", a+":22")
		v.refuses(t, "udp", a+":22")
		v.refuses(t, "tcp", a+":23")
	}
	soon(t, "refusals are logged", func() bool {
		return logged("microvm-refused: 6 192.168.83.20:80") && logged("microvm-refused: 6 "+metadata+":80") &&
			logged("microvm-refused: 6 192.168.83.1:22") && logged("microvm-refused: 17 "+hostUplink+":22")
	})
	for _, f := range flows() {
		if strings.HasPrefix(f, LogAllowed) && !strings.HasSuffix(f, " "+server+":80") {
			t.Errorf("logged as allowed: %s", f)
		}
	}
	// A published port: the gate dials the guest.
	hostSpace.answers(t, "tcp", "192.168.83.10:18789", "guest 192.168.83.1")
	// From outside, the same is dropped; an answer arrives on the same way.
	if a, _, err := up.ask("udp", "192.168.83.10:18789"); err == nil {
		t.Errorf("from outside: %q", a)
	}
	v.answers(t, "udp", router+":80", "lan "+hostUplink)
	// No egress: nothing but DNS.
	tight.refuses(t, "tcp", server+":80")
	tight.refuses(t, "udp", server+":80")
	soon(t, "its refusals are logged", func() bool { return loggedTight("microvm-refused: 6 " + server + ":80") })
	tight.refuses(t, "tcp", "192.168.83.10:18789")
	// A VM without a gateway: not even to who answers the others.
	g.NoGateway = true
	must(t, r.Ensure(g))
	other.refuses(t, "tcp", server+":80")
}

// Others' forwarding of the host's ports (Docker's published ones) isn't a way around.
func TestForwardedPortsOfOthers(t *testing.T) {
	if !isolated(t) {
		return
	}
	newUplink(t)
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	v := newVM(t, r, openGuest)
	nft(t, "add table ip others; add chain ip others pre { type nat hook prerouting priority dstnat; };"+
		"add rule ip others pre tcp dport 8080 counter dnat to "+server+":80")
	v.refuses(t, "tcp", hostUplink+":8080")
	// Of an address that isn't the host's: nothing passes, though the answer can't reach the guest.
	if a, _, err := v.ask("tcp", public+":8080"); err == nil {
		t.Errorf("a redirected connection is answered: %q", a)
	}
	if now := nft(t, "list", "table", "ip", "others"); strings.Contains(now, "packets 0 ") {
		t.Errorf("the other's rule was not met:\n%s", now)
	}
	v.answers(t, "tcp", server+":80", "server "+hostUplink)
	// The host's address is redirected for others still.
	nft(t, "add table ip others2; add chain ip others2 out { type nat hook output priority -100; };"+
		"add rule ip others2 out ip daddr "+hostUplink+" tcp dport 8080 dnat to "+server+":80")
	(*space)(nil).answers(t, "tcp", hostUplink+":8080", "server "+hostUplink)
}

// A connection that lives goes on while rules are changed around it.
func TestConnectionSurvivesChanges(t *testing.T) {
	if !isolated(t) {
		return
	}
	up := newUplink(t)
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	v := newVM(t, r, openGuest)
	var l net.Listener
	up.do(func() (err error) { l, err = net.Listen("tcp4", server+":7"); return err })
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 1)
		for {
			if _, err := c.Read(b); err != nil {
				return
			}
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}()
	c, _, err := v.dial("tcp", server+":7")
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	echo := func(what string) {
		t.Helper()
		if _, err := c.Write([]byte{1}); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	echo("before")
	for i := range 20 {
		must(t, r.Ensure(noneGuest))
		echo(fmt.Sprint("after adding another ", i))
		must(t, r.Remove(noneGuest.VM, noneGuest.Address))
		echo(fmt.Sprint("after removing it ", i))
	}
	nft(t, "delete", "table", "bridge", "clawvm_v1_0a1b2c3d")
	must(t, r.Ensure(openGuest))
	echo("after a lost table")
	// Closed egress ends it: the guest is told by a reset.
	closed := openGuest
	closed.Egress = EgressNone
	must(t, r.Ensure(closed))
	_, err = c.Write([]byte{1}) // an acknowledgement may have brought the reset already
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("after egress was closed: %v", err)
	}
}

// Raw frames: what isn't in the VM's own name doesn't arrive. After each comes
// one that does, by the same way, so that nothing has to be waited for.
func TestSpoofing(t *testing.T) {
	if !isolated(t) {
		return
	}
	up := newUplink(t)
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	v := newVM(t, r, openGuest)
	neighbour := newVM(t, r, noneGuest)
	must(t, r.Bridge.EnsurePort(Port{VM: "cut", TAP: "tap-cut", Address: cutGuest.Address, UID: 1, GID: 1}))
	mine, my := MAC(openGuest.Address), openGuest.Address
	to := netip.MustParseAddr(server)

	var p net.PacketConn
	up.do(func() (err error) { p, err = net.ListenPacket("udp4", server+":99"); return err })
	defer p.Close()
	receive := func() string {
		b := make([]byte, 100)
		must(t, p.SetReadDeadline(time.Now().Add(5*time.Second)))
		n, from, err := p.ReadFrom(b)
		must(t, err)
		return string(b[:n]) + " " + host(from)
	}
	ip := func(from netip.Addr, text string) []byte { return udpPacket(from, to, 1000, 99, text) }
	frame := func(text string) []byte { return etherFrame(mine, gatewayMAC, unix.ETH_P_IP, ip(my, text)) }
	good := frame("good")
	// The first may come before the carrier.
	must(t, v.inject(good))
	if got := receive(); got != "good "+hostUplink {
		t.Fatal(got)
	}
	vlan := append([]byte{0, 5, 8, 0}, ip(my, "vlan")...)
	for name, bad := range map[string][]byte{
		"source address of a neighbour": etherFrame(mine, gatewayMAC, unix.ETH_P_IP, ip(noneGuest.Address, "bad")),
		"source address of the bridge":  etherFrame(mine, gatewayMAC, unix.ETH_P_IP, ip(testBridge.Address.Addr(), "bad")),
		"source address from elsewhere": etherFrame(mine, gatewayMAC, unix.ETH_P_IP, ip(netip.MustParseAddr("10.1.1.1"), "bad")),
		"no source address":             etherFrame(mine, gatewayMAC, unix.ETH_P_IP, ip(netip.IPv4Unspecified(), "bad")),
		"MAC of a neighbour":            etherFrame(MAC(noneGuest.Address), gatewayMAC, unix.ETH_P_IP, ip(my, "bad")),
		"MAC of nobody":                 etherFrame([]byte{2, 0, 0, 0, 0, 9}, gatewayMAC, unix.ETH_P_IP, ip(my, "bad")),
		"VLAN tag":                      etherFrame(mine, gatewayMAC, unix.ETH_P_8021Q, vlan),
		"two VLAN tags":                 etherFrame(mine, gatewayMAC, unix.ETH_P_8021AD, append([]byte{0, 5, 0x81, 0}, vlan...)),
		"IPv6":                          etherFrame(mine, gatewayMAC, unix.ETH_P_IPV6, append([]byte{0x60, 0, 0, 0, 0, 0, 59, 64}, make([]byte, 32)...)),
		"IPv6 to all nodes":             etherFrame(mine, []byte{0x33, 0x33, 0, 0, 0, 1}, unix.ETH_P_IPV6, append([]byte{0x60, 0, 0, 0, 0, 0, 59, 255}, make([]byte, 32)...)),
		"RARP":                          etherFrame(mine, []byte{255, 255, 255, 255, 255, 255}, 0x8035, make([]byte, 46)),
		"spanning tree":                 etherFrame(mine, []byte{1, 0x80, 0xc2, 0, 0, 0}, 38, append([]byte{0x42, 0x42, 3}, make([]byte, 43)...)),
	} {
		before := droppedFrames(t)
		must(t, v.inject(bad))
		must(t, v.inject(good))
		if got := receive(); got != "good "+hostUplink {
			t.Errorf("%s arrived: %q", name, got)
		}
		// The bridge hands link-local frames to nobody before any hook; the guard takes spanning tree.
		if name != "spanning tree" && droppedFrames(t) != before+1 {
			t.Errorf("%s: not counted among the dropped", name)
		}
	}

	// ARP: the host answers the VM, and nobody in the VM's place.
	replies := make(chan []byte, 100)
	isReply := func(f []byte) bool { return len(f) >= 42 && f[12] == 8 && f[13] == 6 && f[21] == 2 }
	v.watch(t, func(f []byte) {
		if isReply(f) {
			replies <- f
		}
	})
	neighbour.watch(t, func(f []byte) {
		if isReply(f) {
			t.Error("an answer went to the neighbour")
		}
	})
	everybody := net.HardwareAddr{255, 255, 255, 255, 255, 255}
	gateway := testBridge.Address.Addr()
	for name, bad := range map[string][]byte{
		"sender is the neighbour":          etherFrame(mine, everybody, unix.ETH_P_ARP, arpRequest(mine, noneGuest.Address, gateway)),
		"sender is the gateway":            etherFrame(mine, everybody, unix.ETH_P_ARP, arpRequest(mine, gateway, gateway)),
		"another MAC in the message":       etherFrame(mine, everybody, unix.ETH_P_ARP, arpRequest(MAC(noneGuest.Address), my, gateway)),
		"another MAC in the frame":         etherFrame(MAC(noneGuest.Address), everybody, unix.ETH_P_ARP, arpRequest(mine, my, gateway)),
		"neighbour in frame and message":   etherFrame(MAC(noneGuest.Address), everybody, unix.ETH_P_ARP, arpRequest(MAC(noneGuest.Address), noneGuest.Address, gateway)),
		"a probe, which has no sender yet": etherFrame(mine, everybody, unix.ETH_P_ARP, arpRequest(mine, netip.IPv4Unspecified(), gateway)),
	} {
		must(t, v.inject(bad))
		must(t, v.inject(etherFrame(mine, everybody, unix.ETH_P_ARP, arpRequest(mine, my, gateway))))
		select {
		case f := <-replies:
			if !bytes.Equal(f[32:38], mine) || !bytes.Equal(f[38:42], word(my)) || len(replies) != 0 {
				t.Errorf("%s: answered %x", name, f)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("%s: the VM's own request isn't answered", name)
		}
	}
	// A frame for the neighbour's MAC isn't bridged to it.
	neighbour.watch(t, func(f []byte) {
		if bytes.Contains(f, []byte("sideways")) {
			t.Error("a frame went from port to port")
		}
	})
	must(t, v.inject(etherFrame(mine, MAC(noneGuest.Address), unix.ETH_P_IP, udpPacket(my, noneGuest.Address, 1, 2, "sideways"))))
	must(t, v.inject(good))
	if got := receive(); got != "good "+hostUplink {
		t.Error(got)
	}

	// A TAP that is on the bridge but in no set: dropped by the inet table, which misses the mark.
	nft(t, "delete", "element", "bridge", "clawvm_v1_0a1b2c3d", "taps", `{ "clawc0a8530a" }`)
	must(t, v.inject(frame("unpinned")))
	must(t, r.Ensure(openGuest))
	must(t, v.inject(good))
	if got := receive(); got != "good "+hostUplink {
		t.Errorf("without rules: %q", got)
	}
}

// droppedFrames reads the counter of the bridge table's last rule.
func droppedFrames(t *testing.T) (packets int) {
	t.Helper()
	listed := nft(t, "list", "chain", "bridge", "clawvm_v1_0a1b2c3d", "prerouting")
	_, after, ok := strings.Cut(listed, "counter packets ")
	if !ok {
		t.Fatal(listed)
	}
	get(fmt.Sscan(after, &packets))(t)
	return packets
}
