package network

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile(file, []byte(got), 0o644))
	}
	want := get(os.ReadFile(file))(t)
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it anew):\n%s", file, got)
	}
}

var (
	openGuest = Guest{VM: "openclaw", Address: netip.MustParseAddr("192.168.83.10"), Egress: EgressOpen, Resolver: 5310, LogGroup: 10}
	noneGuest = Guest{VM: "tight-one", Address: netip.MustParseAddr("192.168.83.11"), Egress: EgressNone, Resolver: 5311, LogGroup: 11}
	listGuest = Guest{VM: "listed", Address: netip.MustParseAddr("192.168.83.13"), Egress: EgressAllowlist, Resolver: 5313, LogGroup: 13, Allowed: []Destination{
		{netip.MustParsePrefix("203.0.113.0/24"), unix.IPPROTO_TCP, 443}, {netip.MustParsePrefix("203.0.113.7/32"), unix.IPPROTO_UDP, 123},
		{netip.MustParsePrefix("198.51.100.7/32"), unix.IPPROTO_TCP, 22},
		// Within the first, and the same again: the kernel wouldn't take them.
		{netip.MustParsePrefix("203.0.113.128/25"), unix.IPPROTO_TCP, 443}, {netip.MustParsePrefix("203.0.113.0/24"), unix.IPPROTO_TCP, 443},
	}}
	cutGuest = Guest{VM: "cut", TAP: "tap-cut", Address: netip.MustParseAddr("192.168.83.12"), Egress: EgressOpen, NoGateway: true, LogGroup: 12}
)

func TestDescribe(t *testing.T) {
	golden(t, "empty.nft", get(Describe(testBridge))(t))
	golden(t, "guests.nft", get(Describe(testBridge, openGuest, noneGuest, cutGuest, listGuest))(t))
}

func TestDescribeRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(*Bridge, *Guest)
		want string
	}{
		{"egress", func(_ *Bridge, g *Guest) { g.Egress = "" }, `egress "" is none of`},
		{"destination", func(_ *Bridge, g *Guest) {
			g.Allowed = []Destination{{netip.MustParsePrefix("203.0.113.7/24"), 6, 443}}
		}, "is no destination"},
		{"protocol", func(_ *Bridge, g *Guest) {
			g.Allowed = []Destination{{netip.MustParsePrefix("203.0.113.0/24"), 1, 443}}
		}, "is no destination"},
		{"IPv6 destination", func(_ *Bridge, g *Guest) { g.Allowed = []Destination{{netip.MustParsePrefix("2001:db8::/32"), 6, 443}} }, "is no destination"},
		{"name", func(_ *Bridge, g *Guest) { g.VM = "a;drop" }, "is not the name of a VM"},
		{"tap", func(_ *Bridge, g *Guest) { g.TAP = "much-too-long-name" }, "is not the name of a link"},
		{"outside", func(_ *Bridge, g *Guest) { g.Address = netip.MustParseAddr("192.168.84.10") }, "is not one that VMs of 192.168.83.0/24 can hold"},
		{"gateway", func(_ *Bridge, g *Guest) { g.Address = testBridge.Address.Addr() }, "is not one that VMs of 192.168.83.0/24 can hold"},
		{"mac", func(_ *Bridge, g *Guest) { g.MAC = []byte{1, 2} }, "is not the MAC"},
		{"owner", func(b *Bridge, _ *Guest) { b.Owner = "x" }, "is not an owner's id"},
		{"subnet", func(b *Bridge, _ *Guest) { b.Address = netip.MustParsePrefix("10.0.0.1/31") }, "has no place for VMs"},
		{"ipv6", func(b *Bridge, _ *Guest) { b.Address = netip.MustParsePrefix("fd00::1/64") }, "is not an IPv4 address"},
		{"network", func(b *Bridge, _ *Guest) { b.Address = netip.MustParsePrefix("192.168.83.0/24") }, "the subnet's own"},
	} {
		b, g := testBridge, openGuest
		c.make(&b, &g)
		if _, err := Describe(b, g); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", c.name, err, c.want)
		}
	}
}

// The fingerprint tells a rule from another with the same comment.
func TestFingerprint(t *testing.T) {
	seen := map[string]string{}
	parts := [][]table{guestTables(testBridge, get(openGuest.filled(testBridge))(t)), guestTables(testBridge, get(noneGuest.filled(testBridge))(t))}
	for _, tab := range merged(sharedTables(testBridge), parts...) {
		for _, c := range tab.chains {
			for _, r := range c.rules {
				data := string(get(r.userData(tab.family))(t))
				if len(data) > 256 {
					t.Errorf("%q: %d bytes of user data; the kernel takes 256", r.text, len(data))
				}
				if text, ok := seen[data]; ok && text != r.text {
					t.Errorf("%q and %q have the same user data", r.text, text)
				}
				seen[data] = r.text
			}
		}
	}
}

func TestNames(t *testing.T) {
	a := netip.MustParseAddr("192.168.83.10")
	if got := MAC(a).String(); got != "02:63:c0:a8:53:0a" {
		t.Error(got)
	}
	if got := TAPName(a); got != "clawc0a8530a" {
		t.Error(got)
	}
	if MAC(netip.MustParseAddr("::1")) != nil || TAPName(netip.Addr{}) != "" {
		t.Error("a name for what is no IPv4 address")
	}
	for _, s := range []string{"", "clawvm", "clawvm:0a1b2c3d", "clawvm:xyz:vm", "clawvm:0a1b2c3d:a b", "other:0a1b2c3d:vm"} {
		if owner, vm, ok := parseAlias(s); ok {
			t.Errorf("%q: %s %s", s, owner, vm)
		}
	}
	if owner, vm, ok := parseAlias(alias("0a1b2c3d", "openclaw")); !ok || owner != "0a1b2c3d" || vm != "openclaw" {
		t.Error(owner, vm, ok)
	}
	for p, want := range map[string]string{"192.168.83.1/24": "192.168.83.255", "10.1.2.3/30": "10.1.2.3", "10.0.0.1/12": "10.15.255.255"} {
		if got := broadcast(netip.MustParsePrefix(p)).String(); got != want {
			t.Errorf("%s: %s", p, got)
		}
	}
}
