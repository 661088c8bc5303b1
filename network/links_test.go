package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// linksNow shows all links, neighbours, forwarding entries, addresses and routing
// rules of the namespace, without what counts on.
func linksNow(t *testing.T) string {
	t.Helper()
	var w strings.Builder
	for _, l := range get(links())(t) {
		a := l.Attrs()
		fmt.Fprintf(&w, "link %s %s %v mtu %d master %d %q\n", a.Name, l.Type(), a.HardwareAddr, a.MTU, a.MasterIndex, a.Alias)
		for _, addr := range get(netlink.AddrList(l, netlink.FAMILY_V4))(t) {
			fmt.Fprintf(&w, "address %v on %s\n", addr.IPNet, a.Name)
		}
		for _, n := range get(netlink.NeighList(a.Index, netlink.FAMILY_V4))(t) {
			if n.State&netlink.NUD_PERMANENT != 0 {
				fmt.Fprintf(&w, "neighbour %v %v on %s\n", n.IP, n.HardwareAddr, a.Name)
			}
		}
	}
	for _, e := range get(forwarding())(t) {
		fmt.Fprintf(&w, "forwarding %v link %d\n", e.HardwareAddr, e.LinkIndex)
	}
	return w.String()
}

func rulesNow(t *testing.T) string { return nft(t, "list", "ruleset") }

func TestBridge(t *testing.T) {
	if !isolated(t) {
		return
	}
	newUplink(t)
	must(t, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0))
	notes := get(EnsureBridge(testBridge))(t)
	want := []string{"made bridge microbr with 192.168.83.1/24, MTU 1400 (as eth0)", "net.ipv4.ip_forward was 0, is 1"}
	if strings.Join(notes, "\n") != strings.Join(want, "\n") {
		t.Errorf("notes %q", notes)
	}
	br := get(netlink.LinkByName("microbr"))(t).(*netlink.Bridge)
	if br.HardwareAddr.String() != "02:63:c0:a8:53:01" || br.MTU != uplinkMTU || br.Alias != "clawvm:0a1b2c3d:" || *br.MulticastSnooping {
		t.Errorf("%+v", br)
	}
	for file, want := range map[string]string{
		"/proc/sys/net/ipv6/conf/microbr/disable_ipv6":   "1",
		"/proc/sys/net/ipv4/conf/microbr/send_redirects": "0",
		"/proc/sys/net/ipv4/ip_forward":                  "1",
	} {
		if b := get(os.ReadFile(file))(t); strings.TrimSpace(string(b)) != want {
			t.Errorf("%s is %s", file, b)
		}
	}
	if out, err := exec.Command("ip", "-d", "link", "show", "microbr").Output(); err == nil {
		for _, want := range []string{"forward_delay 0 ", "stp_state 0 ", "mcast_snooping 0 "} {
			if !strings.Contains(string(out), want) {
				t.Errorf("no %q in %s", want, out)
			}
		}
	}
	if mtu := get(testBridge.LinkMTU())(t); mtu != uplinkMTU {
		t.Error(mtu)
	}
	before := linksNow(t)
	if notes := get(EnsureBridge(testBridge))(t); len(notes) != 0 {
		t.Errorf("the second time: %q", notes)
	}
	if after := linksNow(t); after != before {
		t.Errorf("the second time changed\n%sto\n%s", before, after)
	}
	// Another address replaces the one there.
	moved := testBridge
	moved.Address = netip.MustParsePrefix("192.168.99.1/24")
	get(EnsureBridge(moved))(t)
	if now := linksNow(t); strings.Contains(now, "192.168.83.1/24") || !strings.Contains(now, "192.168.99.1/24") {
		t.Error(now)
	}
	must(t, RemoveBridge(moved))
	must(t, RemoveBridge(moved))
	if l, err := findLink("microbr"); l != nil || err != nil {
		t.Error(l, err)
	}
}

func TestBridgeRefuses(t *testing.T) {
	if !isolated(t) {
		return
	}
	newUplink(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "vpn0"
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "vpn1"}))
	must(t, setUpLink("vpn0", "192.168.80.1/20"))
	_, err := EnsureBridge(testBridge)
	var route *RouteError
	if !errors.As(err, &route) || route.Link != "vpn0" || !strings.Contains(err.Error(), "the route to 192.168.80.0/20 over vpn0") {
		t.Errorf("%v", err)
	}
	vpn := get(netlink.LinkByName("vpn0"))(t)
	must(t, netlink.LinkDel(vpn))
	// An address without a subnet is in the table of local ones only.
	must(t, setUpLink("eth0", "192.168.83.200/32"))
	if _, err := EnsureBridge(testBridge); !errors.As(err, &route) || route.Link != "eth0" {
		t.Errorf("%v", err)
	}
	must(t, netlink.AddrDel(get(netlink.LinkByName("eth0"))(t), get(netlink.ParseAddr("192.168.83.200/32"))(t)))
	// A route of another table.
	must(t, netlink.RouteAdd(&netlink.Route{Type: unix.RTN_BLACKHOLE, Dst: get(netlink.ParseIPNet("192.168.83.128/25"))(t), Table: 77}))
	if _, err := EnsureBridge(testBridge); !errors.As(err, &route) || !strings.Contains(err.Error(), "192.168.83.128/25 without a link") {
		t.Errorf("%v", err)
	}
	must(t, netlink.RouteDel(&netlink.Route{Type: unix.RTN_BLACKHOLE, Dst: get(netlink.ParseIPNet("192.168.83.128/25"))(t), Table: 77}))
	// The halves of a default route, as OpenVPN sets them, are none.
	must(t, addRoute("128.0.0.0/1", router, "eth0"))
	if l, err := findLink("microbr"); l != nil || err != nil {
		t.Error("a refused bridge was made:", l, err)
	}
	// A bridge of somebody else.
	attrs = netlink.NewLinkAttrs()
	attrs.Name = "microbr"
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
	if _, err := EnsureBridge(testBridge); !errors.Is(err, ErrNotOurs) {
		t.Errorf("%v", err)
	}
	if err := RemoveBridge(testBridge); !errors.Is(err, ErrNotOurs) {
		t.Errorf("%v", err)
	}
	must(t, netlink.LinkDel(get(netlink.LinkByName("microbr"))(t)))
	// One of ours whose maker was killed before it marked it is taken over.
	attrs.HardwareAddr = MAC(testBridge.Address.Addr())
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
	get(EnsureBridge(testBridge))(t)
	other := testBridge
	other.Owner = "ffffffff"
	if _, err := EnsureBridge(other); !errors.Is(err, ErrNotOurs) || !strings.Contains(err.Error(), "0a1b2c3d") {
		t.Errorf("%v", err)
	}
	must(t, RemoveBridge(testBridge))
}

func TestUplinkMTU(t *testing.T) {
	if !isolated(t) {
		return
	}
	get(EnsureBridge(testBridge))(t)
	if mtu := get(testBridge.LinkMTU())(t); mtu != 1500 {
		t.Error(mtu)
	}
	newUplink(t)
	get(EnsureBridge(testBridge))(t)
	if mtu := get(testBridge.LinkMTU())(t); mtu != uplinkMTU {
		t.Error(mtu)
	}
	declared := testBridge
	declared.MTU = 1280
	get(EnsureBridge(declared))(t)
	if mtu := get(testBridge.LinkMTU())(t); mtu != 1280 {
		t.Error(mtu)
	}
}

func TestPort(t *testing.T) {
	if !isolated(t) {
		return
	}
	newUplink(t)
	p := Port{VM: "openclaw", Address: openGuest.Address, UID: 4711, GID: 4712}
	if err := testBridge.EnsurePort(p); err == nil {
		t.Error("a port without a bridge")
	}
	must(t, testBridge.RemovePort(p))
	get(EnsureBridge(testBridge))(t)
	empty := linksNow(t)
	must(t, testBridge.RemovePort(p))
	must(t, testBridge.EnsurePort(p))
	tap := get(netlink.LinkByName("clawc0a8530a"))(t).(*netlink.Tuntap)
	if tap.Owner != 4711 || tap.Group != 4712 || tap.NonPersist || tap.MTU != uplinkMTU || tap.Alias != "clawvm:0a1b2c3d:openclaw" ||
		tap.MasterIndex != get(netlink.LinkByName("microbr"))(t).Attrs().Index {
		t.Errorf("%+v", tap)
	}
	if info := get(netlink.LinkGetProtinfo(tap))(t); !info.Isolated || info.Learning || info.Flood || !info.Guard {
		t.Errorf("%+v", info)
	}
	if out, err := exec.Command("bridge", "-d", "link", "show", "dev", "clawc0a8530a").Output(); err == nil {
		for _, want := range []string{"mcast_flood off", "bcast_flood off", "isolated on"} {
			if !strings.Contains(string(out), want) {
				t.Errorf("no %q in %s", want, out)
			}
		}
	}
	if b := get(os.ReadFile("/proc/sys/net/ipv6/conf/clawc0a8530a/disable_ipv6"))(t); string(b) != "1\n" {
		t.Errorf("disable_ipv6 %s", b)
	}
	made := linksNow(t)
	for _, want := range []string{"neighbour 192.168.83.10 02:63:c0:a8:53:0a on microbr", "forwarding 02:63:c0:a8:53:0a"} {
		if !strings.Contains(made, want) {
			t.Errorf("no %q in\n%s", want, made)
		}
	}
	must(t, testBridge.EnsurePort(p))
	if again := linksNow(t); again != made {
		t.Errorf("the second time changed\n%sto\n%s", made, again)
	}
	status := get(testBridge.Ports())(t)
	if len(status) != 1 || status[0] != (PortStatus{TAP: "clawc0a8530a", VM: "openclaw", Address: openGuest.Address, Up: true}) {
		t.Errorf("%+v", status)
	}
	// The VMM's user opens it, and only one does.
	f := get(OpenTAP("clawc0a8530a"))(t)
	if _, err := OpenTAP("clawc0a8530a"); !errors.Is(err, unix.EBUSY) {
		t.Error(err)
	}
	if status := get(testBridge.Ports())(t); !status[0].Running {
		t.Errorf("%+v", status)
	}
	must(t, testBridge.EnsurePort(p)) // while it is in use
	must(t, f.Close())
	if _, err := OpenTAP("clawnone"); err == nil || !strings.Contains(err.Error(), "there is no such TAP") {
		t.Error(err)
	}
	if l, err := findLink("clawnone"); l != nil || err != nil {
		t.Error("opening made one:", l, err)
	}
	// Another user, MAC and address: what was before is gone.
	p.UID, p.TAP, p.Address, p.MAC = 5000, "clawc0a8530a", netip.MustParseAddr("192.168.83.20"), []byte{2, 0, 0, 0, 0, 1}
	must(t, testBridge.EnsurePort(p))
	if now := linksNow(t); strings.Contains(now, "02:63:c0:a8:53:0a") || !strings.Contains(now, "neighbour 192.168.83.20 02:00:00:00:00:01") {
		t.Error(now)
	}
	p.MAC = []byte{2, 0, 0, 0, 0, 2}
	must(t, testBridge.EnsurePort(p))
	if now := linksNow(t); strings.Contains(now, "02:00:00:00:00:01") || !strings.Contains(now, "neighbour 192.168.83.20 02:00:00:00:00:02") {
		t.Error(now)
	}
	if err := testBridge.EnsurePort(Port{VM: "two", Address: netip.MustParseAddr("192.168.83.21"), MAC: p.MAC, UID: 1, GID: 1}); err == nil ||
		!strings.Contains(err.Error(), "is that of clawc0a8530a already") {
		t.Error(err)
	}
	if l, err := findLink("clawc0a85315"); l != nil || err != nil {
		t.Error("a port that failed is there:", l, err)
	}
	// Without the address, by the TAP's name.
	must(t, testBridge.RemovePort(Port{VM: "openclaw", TAP: "clawc0a8530a"}))
	if now := linksNow(t); now != empty {
		t.Errorf("left over:\n%snot\n%s", now, empty)
	}
	must(t, testBridge.RemovePort(p))
}

func TestPortRefuses(t *testing.T) {
	if !isolated(t) {
		return
	}
	get(EnsureBridge(testBridge))(t)
	other := Bridge{Name: "otherbr", Address: netip.MustParsePrefix("192.168.84.1/24"), Owner: "ffffffff"}
	get(EnsureBridge(other))(t)
	p := Port{VM: "one", TAP: "tap-one", Address: openGuest.Address, UID: 1, GID: 1}
	for _, c := range []struct {
		name string
		port Port
		want string
	}{
		{"outside", Port{VM: "one", Address: netip.MustParseAddr("192.168.84.10"), UID: 1, GID: 1}, "is not in the subnet"},
		{"no group", Port{VM: "one", Address: p.Address, UID: 1, GID: -1}, "both must be given"},
		{"multicast", Port{VM: "one", Address: p.Address, MAC: []byte{1, 0, 0, 0, 0, 0}, UID: 1, GID: 1}, "is not the MAC of one machine"},
		{"name", Port{VM: "one", TAP: "a-name-of-16-char", Address: p.Address}, "is not the name of a link"},
	} {
		if err := testBridge.EnsurePort(c.port); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// A TAP of somebody else, another root's and another VM's are left alone.
	must(t, netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap-one"}, Mode: netlink.TUNTAP_MODE_TAP}))
	must(t, other.EnsurePort(Port{VM: "one", TAP: "tap-two", Address: netip.MustParseAddr("192.168.84.10"), UID: 1, GID: 1}))
	must(t, testBridge.EnsurePort(Port{VM: "three", TAP: "tap-three", Address: netip.MustParseAddr("192.168.83.30"), UID: 1, GID: 1}))
	before := linksNow(t)
	for _, tap := range []string{"tap-one", "tap-two", "tap-three", "lo"} {
		p.TAP = tap
		if err := testBridge.EnsurePort(p); !errors.Is(err, ErrNotOurs) {
			t.Errorf("%s: %v", tap, err)
		}
		if err := testBridge.RemovePort(p); !errors.Is(err, ErrNotOurs) {
			t.Errorf("%s: %v", tap, err)
		}
	}
	if after := linksNow(t); after != before {
		t.Errorf("changed\n%sto\n%s", before, after)
	}
	if ports := get(testBridge.Ports())(t); len(ports) != 1 || ports[0].VM != "three" {
		t.Errorf("%+v", ports)
	}
	if err := RemoveBridge(testBridge); !errors.Is(err, ErrPortsLeft) || !strings.Contains(err.Error(), "tap-three") {
		t.Error(err)
	}
	if _, _, err := testBridge.Counters("tap-two"); !errors.Is(err, ErrNotOurs) {
		t.Error(err)
	}
}

// A TAP whose maker is killed before it is done leaves nothing.
func TestPortHalfMade(t *testing.T) {
	if !isolated(t) {
		return
	}
	get(EnsureBridge(testBridge))(t)
	before := linksNow(t)
	broken := errors.New("killed here")
	err := makeTAP("tap-half", 1, 1, func() error {
		br := get(netlink.LinkByName("microbr"))(t)
		must(t, testBridge.setPort(br, Port{VM: "half", TAP: "tap-half", Address: openGuest.Address, MAC: MAC(openGuest.Address)}, true))
		return broken
	})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
	if l, err := findLink("tap-half"); l != nil || err != nil {
		t.Error("the TAP is there still:", l, err)
	}
	must(t, testBridge.RemovePort(Port{VM: "half", TAP: "tap-half", Address: openGuest.Address}))
	if after := linksNow(t); after != before {
		t.Errorf("left over:\n%snot\n%s", after, before)
	}
}

func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock := get(lockFile(path, lockWait))(t)
	if _, err := lockFile(path, 1); err == nil || !strings.Contains(err.Error(), "has held it for") {
		t.Error(err)
	}
	must(t, unlock())
	must(t, get(lockFile(path, lockWait))(t)())
	if _, err := lockFile("", 1); err == nil {
		t.Error("locked nothing")
	}
}
