package policy

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/config"
)

func rule(name string, ports ...uint16) config.Allow {
	if len(ports) == 0 {
		ports = []uint16{443}
	}
	r := config.Allow{Name: name, Protocol: config.ProtocolTCP, Ports: ports}
	if p, err := netip.ParsePrefix(name); err == nil {
		r.Name, r.Prefix = "", p
	}
	return r
}

func udp(r config.Allow) config.Allow { r.Protocol = config.ProtocolUDP; return r }

var listed = Spec{VM: "claw", Mode: Allowlist, Own: []netip.Prefix{netip.MustParsePrefix("192.168.83.0/24")}, Rules: []config.Allow{
	rule("api.telegram.org"), rule("openrouter.ai"), rule("*.githubusercontent.com"), rule("deb.debian.org", 80, 443), udp(rule("quic.test")),
	rule("*.deep.githubusercontent.com", 8443), rule("203.0.113.0/24", 5432), udp(rule("203.0.113.7/32", 123)), rule("10.1.0.0/16", 22), rule("dot.test", 853),
}}

func TestName(t *testing.T) {
	p := New(listed)
	for name, want := range map[string]string{
		"api.telegram.org": "api.telegram.org", "api.telegram.org.": "api.telegram.org",
		"raw.githubusercontent.com": "*.githubusercontent.com", "a.b.c.githubusercontent.com.": "*.githubusercontent.com",
		"x.deep.githubusercontent.com": "*.deep.githubusercontent.com:8443", "deb.debian.org": "deb.debian.org:80,443", "quic.test": "quic.test:443/udp",
		// Not these.
		"githubusercontent.com": "", "xgithubusercontent.com": "", "telegram.org": "", "x.api.telegram.org": "", "api.telegram.org.evil.test": "",
		"": "", ".": "", "..": "", ".githubusercontent.com": "", "a..githubusercontent.com": "", "org": "", "203.0.113.7": "", "*.githubusercontent.com": "", `x\.githubusercontent.com`: "", "X.githubusercontent.com": "", "api.telegram.org..": "",
	} {
		v := p.Name(name)
		if v.Allowed != (want != "") || v.Rule != want || (want == "" && v.Reason != "not in egress.allow") {
			t.Errorf("%q: %+v, want %q", name, v, want)
		}
	}
	if v := New(Spec{Mode: None}).Name("api.telegram.org"); v.Allowed || v.Reason != "egress mode is none" {
		t.Error(v)
	}
	if v := New(Spec{Mode: Open}).Name("x."); !v.Allowed {
		t.Error(v)
	}
	if v := New(Spec{Rules: listed.Rules}).Name("openrouter.ai"); v.Allowed {
		t.Error("a policy without a mode allows")
	}
}

func TestDecide(t *testing.T) {
	p := New(listed)
	public := netip.MustParseAddr("198.51.100.7")
	for _, c := range []struct {
		name, addr string
		port       Port
		rule, why  string
	}{
		{"api.telegram.org", "198.51.100.7", Port{config.ProtocolTCP, 443}, "api.telegram.org", ""},
		{"api.telegram.org.", "", Port{config.ProtocolTCP, 443}, "api.telegram.org", ""},
		{"api.telegram.org", "198.51.100.7", Port{config.ProtocolTCP, 80}, "", "tcp 80 is not among its ports in egress.allow: api.telegram.org"},
		{"api.telegram.org", "198.51.100.7", Port{config.ProtocolUDP, 443}, "", "udp 443 is not among its ports"},
		{"deb.debian.org", "", Port{config.ProtocolTCP, 80}, "deb.debian.org:80,443", ""},
		{"quic.test", "", Port{config.ProtocolUDP, 443}, "quic.test:443/udp", ""},
		{"x.deep.githubusercontent.com", "", Port{config.ProtocolTCP, 443}, "*.githubusercontent.com", ""},
		{"x.deep.githubusercontent.com", "", Port{config.ProtocolTCP, 8443}, "*.deep.githubusercontent.com:8443", ""},
		{"example.com", "", Port{config.ProtocolTCP, 443}, "", "not in egress.allow"},
		{"example.com", "", Port{config.ProtocolTCP, 853}, "", "DNS over TLS"},
		{"dot.test", "", Port{config.ProtocolTCP, 853}, "dot.test:853", ""},
		// Rebinding: an allowed name, and a special address.
		{"api.telegram.org", "10.0.0.1", Port{config.ProtocolTCP, 443}, "", "10.0.0.1 is private, and egress.allowPrivate isn't set"},
		{"api.telegram.org", "100.64.0.1", Port{config.ProtocolTCP, 443}, "", "CGNAT"},
		{"api.telegram.org", "127.0.0.1", Port{config.ProtocolTCP, 443}, "", "loopback"},
		{"api.telegram.org", "169.254.169.254", Port{config.ProtocolTCP, 443}, "", "metadata"},
		{"api.telegram.org", "::ffff:169.254.169.254", Port{config.ProtocolTCP, 443}, "", "metadata"},
		{"api.telegram.org", "0.0.0.0", Port{config.ProtocolTCP, 443}, "", "no host's"},
		{"api.telegram.org", "255.255.255.255", Port{config.ProtocolTCP, 443}, "", "reserved"},
		{"api.telegram.org", "224.0.0.1", Port{config.ProtocolTCP, 443}, "", "multicast"},
		{"api.telegram.org", "2001:db8::1", Port{config.ProtocolTCP, 443}, "", "no IPv6"},
		{"api.telegram.org", "::1", Port{config.ProtocolTCP, 443}, "", "no IPv6"},
		{"api.telegram.org", "192.168.83.1", Port{config.ProtocolTCP, 443}, "", "of the host and its VMs"},
		// Addresses by themselves; a name's address isn't one.
		{"", "203.0.113.9", Port{config.ProtocolTCP, 5432}, "203.0.113.0/24:5432", ""},
		{"", "203.0.113.7", Port{config.ProtocolUDP, 123}, "203.0.113.7/32:123/udp", ""},
		{"", "203.0.113.9", Port{config.ProtocolUDP, 123}, "", "udp 123 is not among its ports in egress.allow: 203.0.113.0/24:5432"},
		{"", "::ffff:203.0.113.9", Port{config.ProtocolTCP, 5432}, "203.0.113.0/24:5432", ""},
		{"", "198.51.100.7", Port{config.ProtocolTCP, 443}, "", "not in egress.allow"},
		{"", "10.1.2.3", Port{config.ProtocolTCP, 22}, "", "private"},
		{"", "", Port{config.ProtocolTCP, 443}, "", "not in egress.allow"},
		{"example.com", "203.0.113.9", Port{config.ProtocolTCP, 5432}, "", "not in egress.allow"},
	} {
		var a netip.Addr
		if c.addr != "" {
			a = netip.MustParseAddr(c.addr)
		}
		v := p.Decide(c.name, a, c.port)
		if v.Allowed != (c.rule != "") || v.Rule != c.rule || !strings.Contains(v.Reason, c.why) || (c.rule != "") != (v.Reason == "") {
			t.Errorf("%q %s %s: %+v, want rule %q, reason %q", c.name, c.addr, c.port, v, c.rule, c.why)
		}
	}
	private := listed
	private.AllowPrivate = true
	p = New(private)
	if v := p.Decide("", netip.MustParseAddr("10.1.2.3"), Port{config.ProtocolTCP, 22}); !v.Allowed {
		t.Error(v)
	}
	for _, never := range []string{"169.254.169.254", "127.0.0.1", "192.168.83.7", "224.0.0.1"} {
		if v := p.Address(netip.MustParseAddr(never)); v.Allowed {
			t.Errorf("%s is allowed with allowPrivate", never)
		}
	}
	open := New(Spec{Mode: Open})
	if v := open.Decide("", public, Port{config.ProtocolTCP, 25}); !v.Allowed {
		t.Error(v)
	}
	if v := open.Decide("", netip.MustParseAddr("192.168.1.1"), Port{config.ProtocolTCP, 80}); v.Allowed {
		t.Error(v)
	}
	if v := New(Spec{Mode: None, Rules: listed.Rules}).Decide("openrouter.ai", public, Port{config.ProtocolTCP, 443}); v.Allowed || v.Reason != "egress mode is none" {
		t.Error(v)
	}
	if v := New(Spec{Rules: listed.Rules}).Decide("openrouter.ai", public, Port{config.ProtocolTCP, 443}); v.Allowed {
		t.Error("a policy without a mode allows")
	}
}

func TestPorts(t *testing.T) {
	p := New(listed)
	if got := fmt.Sprint(p.Ports("x.deep.githubusercontent.com.")); got != "[tcp 443 tcp 8443]" {
		t.Error(got)
	}
	if got := p.Ports("example.com"); got != nil {
		t.Error(got)
	}
	if got := fmt.Sprint(p.Addresses()); got != "[{203.0.113.0/24 tcp 5432} {203.0.113.7/32 udp 123} {10.1.0.0/16 tcp 22}]" {
		t.Error(got)
	}
}

func TestSentence(t *testing.T) {
	p := New(listed)
	v := p.Decide("example.com", netip.Addr{}, Port{config.ProtocolTCP, 443})
	if got := p.Sentence("example.com:443", v); got != "clawvm: VM claw may not reach example.com:443 (not in egress.allow); the owner can run: clawvm allow claw example.com" {
		t.Error(got)
	}
	v = p.Decide("openrouter.ai", netip.Addr{}, Port{config.ProtocolTCP, 80})
	if got := p.Sentence("openrouter.ai:80", v); got != "clawvm: VM claw may not reach openrouter.ai:80 (tcp 80 is not among its ports in egress.allow: openrouter.ai); the owner can run: clawvm allow claw openrouter.ai:80" {
		t.Error(got)
	}
	// What would do something else in a shell, or for the command, is not to be copied.
	for _, name := range []string{"$(reboot).test", "a;b.test", "--for", "a b", "`x`.test", ""} {
		if got := p.Sentence(name, p.Name(name)); strings.Contains(got, "can run") {
			t.Error(got)
		}
	}
	if got := p.Sentence("10.0.0.1:443", p.Decide("", netip.MustParseAddr("10.0.0.1"), Port{config.ProtocolTCP, 443})); strings.Contains(got, "can run") {
		t.Error(got)
	}
}

// What is told from process to process decides alike.
func TestSpecTravels(t *testing.T) {
	raw, err := json.Marshal(listed)
	if err != nil {
		t.Fatal(err)
	}
	var s Spec
	if err := json.Unmarshal(raw, &s); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(s) != fmt.Sprint(listed) {
		t.Errorf("%s reads as\n%v, not\n%v", raw, s, listed)
	}
}

// Two policies with the same name in them know nothing of each other.
func TestNoLeak(t *testing.T) {
	one := New(Spec{VM: "one", Mode: Allowlist, Rules: []config.Allow{rule("a.test")}})
	two := New(Spec{VM: "two", Mode: Allowlist, Rules: []config.Allow{rule("a.test", 80), rule("b.test")}})
	if one.Name("b.test").Allowed || one.Decide("a.test", netip.Addr{}, Port{config.ProtocolTCP, 80}).Allowed || two.Decide("a.test", netip.Addr{}, Port{config.ProtocolTCP, 443}).Allowed {
		t.Error("one policy's rule is the other's")
	}
}

// many has n rules, names, suffixes and networks among them.
func many(n int) Spec {
	s := Spec{VM: "claw", Mode: Allowlist}
	for i := range n {
		switch i % 3 {
		case 0:
			s.Rules = append(s.Rules, rule(fmt.Sprintf("host%d.example.test", i)))
		case 1:
			s.Rules = append(s.Rules, rule(fmt.Sprintf("*.zone%d.test", i)))
		case 2:
			s.Rules = append(s.Rules, rule(fmt.Sprintf("100.%d.%d.%d/32", 128+i>>16, i>>8&255, i&255)))
		}
	}
	return s
}

func TestTenThousandRules(t *testing.T) {
	begun := time.Now()
	p := New(many(10_000))
	for range 1000 {
		if !p.Name("host9999.example.test").Allowed || !p.Name("x.zone9997.test").Allowed || p.Name("x.example.test").Allowed {
			t.Fatal("decided otherwise")
		}
		if !p.Decide("", netip.MustParseAddr("100.128.39.14"), Port{config.ProtocolTCP, 443}).Allowed {
			t.Fatal("the address 9998 is refused")
		}
	}
	// 15 ms; with a look at each rule it would be half a minute.
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("took %s", took)
	}
}

func BenchmarkName(b *testing.B) {
	p := New(many(10_000))
	for b.Loop() {
		if p.Name("a.b.example.test").Allowed {
			b.Fatal("allowed")
		}
	}
}

// FuzzDecide looks that nothing is allowed but by a rule that the question is like, and never a special address.
func FuzzDecide(f *testing.F) {
	f.Add("api.telegram.org", "198.51.100.7", uint16(443), true)
	f.Add("a.githubusercontent.com.", "", uint16(443), true)
	f.Add("", "203.0.113.7", uint16(123), false)
	f.Add("", "::ffff:10.0.0.1", uint16(22), true)
	p := New(listed)
	f.Fuzz(func(t *testing.T, name, addr string, number uint16, tcp bool) {
		a, err := netip.ParseAddr(addr)
		if err != nil {
			a = netip.Addr{}
		}
		port := Port{config.ProtocolUDP, number}
		if tcp {
			port.Protocol = config.ProtocolTCP
		}
		v := p.Decide(name, a, port)
		if v.Allowed == (v.Reason != "") || v.Allowed != (v.Rule != "") {
			t.Fatalf("%+v", v)
		}
		if !v.Allowed {
			return
		}
		if u := a.Unmap(); a.IsValid() && (!u.Is4() || u.IsPrivate() || u.IsLoopback() || u.IsLinkLocalUnicast() || u.IsMulticast() || u.IsUnspecified()) {
			t.Errorf("%q at %s is allowed by %s", name, addr, v.Rule)
		}
		like := func(r config.Allow) bool {
			n := strings.TrimSuffix(name, ".")
			match := r.Name != "" && (n == r.Name || strings.HasPrefix(r.Name, "*.") && strings.HasSuffix(n, r.Name[1:])) ||
				n == "" && r.Prefix.IsValid() && r.Prefix.Contains(a.Unmap())
			return match && r.Protocol == port.Protocol && slices.Contains(r.Ports, number) && r.String() == v.Rule
		}
		if !slices.ContainsFunc(listed.Rules, like) {
			t.Errorf("%q at %s %s is allowed by %s, which is no rule for it", name, addr, port, v.Rule)
		}
	})
}
