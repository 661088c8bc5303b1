package egress

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/network/egress/policy"
)

func allowing(t testing.TB, entries ...string) *policy.Policy {
	t.Helper()
	s := policy.Spec{VM: "claw", Mode: policy.Allowlist}
	for _, e := range entries {
		all, err := config.ParseAllow(e)
		if err != nil {
			t.Fatal(err)
		}
		s.Rules = append(s.Rules, all...)
	}
	return policy.New(s)
}

// pinned notes what a resolver wants to be reached.
type pinned struct {
	mu  sync.Mutex
	all []string
	err error
}

func (p *pinned) pin(name string, addrs []netip.Addr, keep time.Duration) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = append(p.all, fmt.Sprintf("%s %v %s", name, addrs, keep))
	return p.err
}

func (p *pinned) got() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.all)
}

// zone answers with the records that a text has, whatever is asked.
func zone(t testing.TB, records string) *nameServer {
	t.Helper()
	return newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		for line := range strings.Lines(records) {
			reply.Answer = append(reply.Answer, record(t, strings.TrimSpace(line)))
		}
		send(t, w, reply)
	})
}

func answersOf(m *dns.Msg) string {
	var all []string
	for _, rr := range m.Answer {
		all = append(all, strings.Join(strings.Fields(rr.String()), " "))
	}
	return strings.Join(all, "; ")
}

func TestCheckedAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		records string
		rcode   int
		answer  string
		pinned  string
		reason  string
	}{
		"an address":         {"a.test. 300 A 192.0.2.1", 0, "a.test. 300 IN A 192.0.2.1", "a.test [192.0.2.1] 6m0s", ""},
		"a short life":       {"a.test. 5 A 192.0.2.1", 0, "a.test. 5 IN A 192.0.2.1", "a.test [192.0.2.1] 2m0s", ""},
		"no life":            {"a.test. 0 A 192.0.2.1", 0, "a.test. 0 IN A 192.0.2.1", "a.test [192.0.2.1] 2m0s", ""},
		"a life without end": {"a.test. 2000000000 A 192.0.2.1", 0, "a.test. 2000000000 IN A 192.0.2.1", "a.test [192.0.2.1] 1h1m0s", ""},
		"two, one twice": {"a.test. 60 A 192.0.2.1\na.test. 60 A 192.0.2.2\nA.test. 60 A 192.0.2.1", 0,
			"a.test. 60 IN A 192.0.2.1; a.test. 60 IN A 192.0.2.2", "a.test [192.0.2.1 192.0.2.2] 2m0s", ""},
		"the chain of owners": {"b.test. 60 CNAME c.other.\na.test. 60 CNAME B.test.\nc.other. 60 A 192.0.2.3", 0,
			"a.test. 60 IN CNAME B.test.; b.test. 60 IN CNAME c.other.; c.other. 60 IN A 192.0.2.3", "a.test [192.0.2.3] 2m0s", ""},
		"what belongs to others": {"a.test. 60 CNAME b.test.\nb.test. 60 A 192.0.2.1\nevil.test. 60 A 192.0.2.66\nb.test. 60 TXT x\nb.test. 60 AAAA 2001:db8::1", 0,
			"a.test. 60 IN CNAME b.test.; b.test. 60 IN A 192.0.2.1", "a.test [192.0.2.1] 2m0s", ""},
		"only others'":           {"evil.test. 60 A 192.0.2.66", 0, "", "", ""},
		"a chain in a circle":    {"a.test. 60 CNAME b.test.\nb.test. 60 CNAME a.test.", 0, "", "", ""},
		"a chain to nowhere":     {"a.test. 60 CNAME b.test.", 0, "a.test. 60 IN CNAME b.test.", "", ""},
		"a private address":      {"a.test. 60 A 10.0.0.1", dns.RcodeNameError, "", "", "10.0.0.1 is private, and egress.allowPrivate isn't set"},
		"at the chain's end":     {"a.test. 60 CNAME b.test.\nb.test. 60 A 127.0.0.1", dns.RcodeNameError, "", "", "127.0.0.1 is loopback"},
		"metadata":               {"a.test. 60 A 169.254.169.254", dns.RcodeNameError, "", "", "169.254.169.254 is link-local, as metadata services are"},
		"a private one and more": {"a.test. 60 A 10.0.0.1\na.test. 60 A 192.0.2.1", 0, "a.test. 60 IN A 192.0.2.1", "a.test [192.0.2.1] 2m0s", ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := new(pinned)
			r := serve(t, &Resolver{Upstreams: []netip.AddrPort{zone(t, c.records).addr}, Policy: allowing(t, "a.test"), Pin: p.pin})
			m := new(dns.Msg).SetQuestion("a.test.", dns.TypeA)
			m.SetEdns0(1232, true)
			reply, _ := r.exchange(t, "udp", m)
			if reply.Rcode != c.rcode || answersOf(reply) != c.answer || len(reply.Ns) != 0 {
				t.Errorf("answered %s\nwant %s", reply, c.answer)
			}
			if got := strings.Join(p.got(), "; "); got != c.pinned {
				t.Errorf("pinned %q, want %q", got, c.pinned)
			}
			if c.reason == "" {
				return
			}
			if e := ede(reply); e == nil || !strings.HasPrefix(e.ExtraText, "clawvm: VM claw may not reach a.test ("+c.reason) {
				t.Errorf("extended error %v", e)
			}
			// From the cache as from the name server.
			r.ask(t, "a.test.", dns.TypeA)
			r.wait(t, "two refusals in the log", func(Event) bool {
				n := 0
				for _, e := range r.all() {
					if e.Verdict == Refused && e.Reason == c.reason {
						n++
					}
				}
				return n == 2
			})
		})
	}
}

// An answer is given when its addresses can be reached, and not without.
func TestPinnedBeforeAnswered(t *testing.T) {
	ns := zone(t, "a.test. 60 A 192.0.2.1")
	asked, go_ := make(chan struct{}), make(chan error)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}, Policy: allowing(t, "a.test"), Pin: func(string, []netip.Addr, time.Duration) error {
		close(asked)
		return <-go_
	}})
	answered := make(chan *dns.Msg, 1)
	go func() { answered <- r.ask(t, "a.test.", dns.TypeA) }()
	<-asked
	select {
	case m := <-answered:
		t.Errorf("answered before it could be reached: %v", m)
	case <-time.After(100 * time.Millisecond):
	}
	go_ <- nil
	if m := <-answered; answersOf(m) != "a.test. 60 IN A 192.0.2.1" {
		t.Errorf("answered %v", m)
	}
}

func TestUnpinnedIsNoAnswer(t *testing.T) {
	ns := zone(t, "a.test. 60 A 192.0.2.1")
	p := &pinned{err: errors.New("no room")}
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}, Policy: allowing(t, "a.test"), Pin: p.pin})
	if m := r.ask(t, "a.test.", dns.TypeA); m.Rcode != dns.RcodeServerFailure || len(m.Answer) != 0 {
		t.Errorf("answered %v", m)
	}
	r.wait(t, "the reason", func(e Event) bool { return strings.HasSuffix(e.Reason, "no room") })
	p.mu.Lock()
	p.err = nil
	p.mu.Unlock()
	if m := r.ask(t, "a.test.", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("the failure is kept: %v", m)
	}
	before := len(p.got())
	if m := r.ask(t, "a.test.", dns.TypeA); len(m.Answer) != 1 || len(p.got()) != before {
		t.Errorf("from the cache: %v, pinned %v", m, p.got())
	}
}

func TestAllowlistAnswersAddressesOnly(t *testing.T) {
	ns := newNameServer(t, nil)
	p := new(pinned)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}, Policy: allowing(t, "a.test", "*.b.test"), Pin: p.pin})
	ask := func(name string, qtype uint16) *dns.Msg {
		m := new(dns.Msg).SetQuestion(name, qtype)
		m.SetEdns0(1232, false)
		reply, _ := r.exchange(t, "udp", m)
		return reply
	}
	for _, qtype := range []uint16{dns.TypeTXT, dns.TypeMX, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeNULL, dns.TypeNS, dns.TypeSRV, dns.TypeCNAME} {
		if m := ask("a.test.", qtype); m.Rcode != dns.RcodeSuccess || len(m.Answer) != 0 || ede(m) == nil {
			t.Errorf("%s: %v", typeName(qtype), m)
		}
	}
	if m := ask("a.test.", dns.TypeAAAA); m.Rcode != dns.RcodeSuccess || len(m.Answer) != 0 {
		t.Errorf("AAAA: %v", m)
	}
	for _, name := range []string{"b.test.", "x.a.test.", "test.", ".", "a.test.evil.", `a\.test.`, `x\.b.test.`} {
		m := ask(name, dns.TypeA)
		if m.Rcode != dns.RcodeNameError || ede(m) == nil || !strings.Contains(ede(m).ExtraText, "(not in egress.allow)") {
			t.Errorf("%s: %v", name, m)
		}
	}
	if n := ns.udp.Load(); n != 0 {
		t.Errorf("the name server was asked %d times", n)
	}
	if m := ask("X.y.B.TEST.", dns.TypeA); len(m.Answer) != 1 || m.Question[0].Name != "X.y.B.TEST." {
		t.Errorf("an allowed name: %v", m)
	}
	r.wait(t, "the rule", func(e Event) bool { return e.Name == "x.y.b.test" && e.Rule == "*.b.test" })
	if got := fmt.Sprint(p.got()); got != "[x.y.b.test [192.0.2.1] 2m0s]" {
		t.Errorf("pinned %s", got)
	}
}

// FuzzChecked looks that whatever a name server says, the guest gets no address that it may not reach, and none that isn't pinned.
func FuzzChecked(f *testing.F) {
	m := new(dns.Msg).SetQuestion("a.test.", dns.TypeA)
	m.Response = true
	m.Answer = []dns.RR{record(f, "a.test. 60 CNAME b.test."), record(f, "b.test. 60 A 192.0.2.1"), record(f, "b.test. 60 A 10.0.0.1")}
	wire, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	q := question{name: "a.test.", qtype: dns.TypeA}
	f.Fuzz(func(t *testing.T, b []byte) {
		var got []netip.Addr
		s := newServer(&Resolver{VM: "claw", Policy: allowing(t, "a.test"), Pin: func(_ string, addrs []netip.Addr, _ time.Duration) error {
			got = addrs
			return nil
		}}, time.Now)
		a, err := newAnswer(q, slices.Clone(b), "x")
		if err != nil {
			return
		}
		if a, err = s.checked(q, a); err != nil || a.refused != nil {
			return
		}
		reply := new(dns.Msg)
		if err := reply.Unpack(a.reply(m, nil, dns.MaxMsgSize, 0)); err != nil {
			t.Fatalf("%x: the answer can't be read: %v", b, err)
		}
		for _, rr := range append(append(reply.Answer, reply.Ns...), reply.Extra...) {
			switch rr := rr.(type) {
			case *dns.CNAME:
			case *dns.A:
				addr, _ := netip.AddrFromSlice(rr.A.To4())
				if !slices.Contains(got, addr) || !s.policy.Address(addr).Allowed {
					t.Errorf("%x: answered %v, pinned %v", b, rr, got)
				}
			default:
				t.Errorf("%x: answered %v", b, rr)
			}
		}
	})
}
