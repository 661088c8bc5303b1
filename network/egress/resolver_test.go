package egress

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// A nameServer is a fake upstream on the loopback, UDP and TCP on one port.
type nameServer struct {
	addr  netip.AddrPort
	udp   atomic.Int64
	tcp   atomic.Int64
	ports sync.Map // source ports seen
	ids   sync.Map
}

func record(t testing.TB, s string) dns.RR {
	t.Helper()
	rr, err := dns.NewRR(s)
	if err != nil {
		t.Fatal(err)
	}
	return rr
}

// newNameServer answers with what answer puts into the reply; nil: 192.0.2.1 to every A.
func newNameServer(t testing.TB, answer func(w dns.ResponseWriter, reply *dns.Msg)) *nameServer {
	t.Helper()
	needLoopback(t)
	ns := new(nameServer)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ns.addr = udp.LocalAddr().(*net.UDPAddr).AddrPort()
	tcp, err := net.Listen("tcp", ns.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		if a, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			ns.udp.Add(1)
			ns.ports.Store(a.Port, true)
		} else {
			ns.tcp.Add(1)
		}
		ns.ids.Store(m.Id, true)
		reply := new(dns.Msg).SetReply(m)
		if answer != nil {
			answer(w, reply)
			return
		}
		if m.Question[0].Qtype == dns.TypeA {
			reply.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, 1)}}
		}
		send(t, w, reply)
	})
	for _, s := range []*dns.Server{{PacketConn: udp, Handler: handler, UDPSize: 4096}, {Listener: tcp, Handler: handler}} {
		started, ended := make(chan struct{}), make(chan error, 1)
		s.NotifyStartedFunc = func() { close(started) }
		go func() { ended <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			if err := s.Shutdown(); err != nil {
				t.Error(err)
			}
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	return ns
}

func send(t testing.TB, w dns.ResponseWriter, m *dns.Msg) {
	if err := w.WriteMsg(m); err != nil {
		t.Logf("the fake name server could not answer: %v", err)
	}
}

// silent is the address of a name server that never answers.
func silent(t testing.TB) netip.AddrPort {
	t.Helper()
	needLoopback(t)
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// closedPort is the address of a name server that isn't there.
func closedPort(t testing.TB) netip.AddrPort {
	t.Helper()
	needLoopback(t)
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

type running struct {
	*recorder
	server *server
	addr   string
	clock  *clock
}

// serve starts a resolver with a clock that stands still, and checks that it ends as it should.
func serve(t testing.TB, r *Resolver) *running {
	t.Helper()
	needLoopback(t)
	run := &running{recorder: new(recorder), clock: newClock()}
	r.VM = "claw"
	if r.Log == nil {
		r.Log = run.log
	}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	run.addr = udp.LocalAddr().String()
	tcp, err := net.Listen("tcp", run.addr)
	if err != nil {
		t.Fatal(err)
	}
	run.server = newServer(r, run.clock.now)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run.server.serve(ctx, udp, tcp) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Error("the resolver does not end")
		}
	})
	return run
}

func (r *running) exchange(t testing.TB, network string, m *dns.Msg) (*dns.Msg, time.Duration) {
	t.Helper()
	c := dns.Client{Net: network, Timeout: patience, UDPSize: 4096}
	reply, took, err := c.Exchange(m, r.addr)
	if err != nil {
		t.Fatalf("query for %v: %v", m.Question, err)
	}
	return reply, took
}

func (r *running) ask(t testing.TB, name string, qtype uint16) *dns.Msg {
	t.Helper()
	reply, _ := r.exchange(t, "udp", new(dns.Msg).SetQuestion(name, qtype))
	return reply
}

func ede(m *dns.Msg) *dns.EDNS0_EDE {
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if e, ok := o.(*dns.EDNS0_EDE); ok {
				return e
			}
		}
	}
	return nil
}

func TestQueryIsAnsweredAndLogged(t *testing.T) {
	ns := newNameServer(t, nil)
	names := new(Names)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}, Names: names})
	for _, network := range []string{"udp", "tcp"} {
		reply, _ := r.exchange(t, network, new(dns.Msg).SetQuestion("API.telegram.ORG.", dns.TypeA))
		if len(reply.Answer) != 1 || reply.Answer[0].(*dns.A).A.String() != "192.0.2.1" || !reply.RecursionAvailable || reply.IsEdns0() != nil {
			t.Errorf("%s: got %v", network, reply)
		}
		if reply.Question[0].Name != "API.telegram.ORG." {
			t.Errorf("%s: the question's spelling is not kept: %s", network, reply.Question[0].Name)
		}
		e := r.wait(t, "the event", func(e Event) bool { return e.Proto == network })
		if e.VM != "claw" || e.Kind != KindQuery || e.Name != "api.telegram.org" || e.Type != "A" || e.Verdict != Allowed ||
			e.RCode != "NOERROR" || len(e.Answers) != 1 || e.Answers[0] != "192.0.2.1" || e.Cached != (network == "tcp") || e.Millis <= 0 {
			t.Errorf("%s: logged %+v", network, e)
		}
		if want := map[bool]string{false: ns.addr.String(), true: ""}[e.Cached]; e.Upstream != want {
			t.Errorf("%s: upstream %q, want %q", network, e.Upstream, want)
		}
	}
	if got := names.Lookup(netip.MustParseAddr("192.0.2.1")); got != "api.telegram.org" {
		t.Errorf("the address leads back to %q", got)
	}
	if n := ns.udp.Load(); n != 1 {
		t.Errorf("the name server was asked %d times", n)
	}
}

func TestCacheLifetime(t *testing.T) {
	ns := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		q := reply.Question[0]
		switch q.Name {
		case "a.test.":
			reply.Answer = []dns.RR{record(t, "a.test. 300 CNAME b.test."), record(t, "b.test. 60 A 192.0.2.7")}
		case "gone.test.":
			reply.Rcode = dns.RcodeNameError
			reply.Ns = []dns.RR{record(t, "test. 900 SOA ns.test. me.test. 1 2 3 4 30")}
		case "nosoa.test.":
			reply.Rcode = dns.RcodeNameError
		case "now.test.":
			reply.Answer = []dns.RR{record(t, "now.test. 0 A 192.0.2.8")}
		case "week.test.":
			reply.Answer = []dns.RR{record(t, "week.test. 604800 A 192.0.2.9")}
		case "broken.test.":
			reply.Rcode = dns.RcodeServerFailure
		}
		send(t, w, reply)
	})
	for _, tc := range []struct {
		name string
		life time.Duration // how long it is kept
		ttl  uint32        // of the first record, one second before the end; 0: none is expected
	}{
		{"a.test.", time.Minute, 300 - 59},
		{"gone.test.", 30 * time.Second, 0},
		{"nosoa.test.", 0, 0},
		{"now.test.", 0, 0},
		{"week.test.", time.Hour, 604800 - 3599},
		{"broken.test.", time.Second, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
			before := ns.udp.Load()
			asked := func() int64 { return ns.udp.Load() - before }
			first := r.ask(t, tc.name, dns.TypeA)
			if tc.life > 0 {
				r.clock.advance(tc.life - time.Second)
				again := r.ask(t, tc.name, dns.TypeA)
				if asked() != 1 {
					t.Errorf("not kept for its life: asked %d times", asked())
				}
				if again.Rcode != first.Rcode || len(again.Answer) != len(first.Answer) {
					t.Errorf("first %v, then %v", first, again)
				}
				if tc.ttl > 0 && again.Answer[0].Header().Ttl != tc.ttl {
					t.Errorf("ttl %d, want %d", again.Answer[0].Header().Ttl, tc.ttl)
				}
			}
			r.clock.advance(time.Second)
			r.ask(t, tc.name, dns.TypeA)
			if asked() != 2 {
				t.Errorf("after its life: asked %d times, want 2", asked())
			}
		})
	}
}

func TestCacheBounds(t *testing.T) {
	make := func(name string, ttl uint32) (question, *answer) {
		q := question{name: name, qtype: dns.TypeA}
		m := new(dns.Msg)
		m.Answer = []dns.RR{record(t, fmt.Sprintf("%s %d A 192.0.2.1", name, ttl))}
		a, err := newAnswer(q, m, "")
		if err != nil {
			t.Fatal(err)
		}
		return q, a
	}
	now := time.Unix(1000, 0)
	c := newCache(10, 1<<20)
	for i := range 20 {
		q, a := make(fmt.Sprintf("n%d.test.", i), 60)
		c.put(q, a, now)
	}
	if c.lru.Len() != 10 {
		t.Errorf("%d entries, want 10", c.lru.Len())
	}
	c = newCache(1000, 8000)
	for i := range 100 {
		q, a := make(fmt.Sprintf("n%d.test.", i%50), 60)
		c.put(q, a, now)
		if c.bytes > 8000 {
			t.Fatalf("%d bytes", c.bytes)
		}
	}
	for c.lru.Len() > 0 {
		c.lru.RemoveOldest()
	}
	if c.bytes != 0 {
		t.Errorf("%d bytes in an empty cache", c.bytes)
	}
}

func TestFailover(t *testing.T) {
	for name, dead := range map[string]func(testing.TB) netip.AddrPort{"silent": silent, "closed": closedPort} {
		t.Run(name, func(t *testing.T) {
			ns := newNameServer(t, nil)
			first := dead(t)
			r := serve(t, &Resolver{Upstreams: []netip.AddrPort{first, ns.addr}})
			_, took := r.exchange(t, "udp", new(dns.Msg).SetQuestion("one.test.", dns.TypeA))
			if took > 2*time.Second {
				t.Errorf("the first query took %s", took)
			}
			var slow int
			for i := range 50 {
				if _, took := r.exchange(t, "udp", new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.test.", i), dns.TypeA)); took > hedgeDelay/2 {
					slow++
				}
			}
			if slow > 2 {
				t.Errorf("%d of 50 queries waited for the dead name server", slow)
			}
			for _, e := range r.all() {
				if e.Upstream != ns.addr.String() {
					t.Errorf("answered by %q", e.Upstream)
				}
			}
		})
	}
}

func TestFailedNameServerIsProbedAndTakenBack(t *testing.T) {
	var dead atomic.Bool
	dead.Store(true)
	first := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		if !dead.Load() {
			send(t, w, reply)
		}
	})
	second := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) { send(t, w, reply) })
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{first.addr, second.addr}})
	r.ask(t, "a.test.", dns.TypeA)
	up := r.server.forward.upstreams[0]
	if up.healthy() {
		t.Fatal("the silent name server counts as healthy")
	}
	asked := first.udp.Load()
	r.ask(t, "b.test.", dns.TypeA)
	if n := first.udp.Load(); n != asked {
		t.Errorf("asked during its back-off: %d queries, then %d", asked, n)
	}
	dead.Store(false)
	r.clock.advance(maxBackoff)
	if _, took := r.exchange(t, "udp", new(dns.Msg).SetQuestion("c.test.", dns.TypeA)); took > hedgeDelay {
		t.Errorf("a query waited %s for the probe", took)
	}
	eventually(t, "the name server to be healthy", up.healthy)
	r.ask(t, "d.test.", dns.TypeA)
	r.wait(t, "an answer of the first name server", func(e Event) bool { return e.Name == "d.test" && e.Upstream == first.addr.String() })
}

func TestBackoffGrows(t *testing.T) {
	u := &upstream{open: map[*socket]bool{}}
	now := time.Unix(1000, 0)
	for i, want := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second, maxBackoff, maxBackoff} {
		u.failed(now, now)
		u.failed(now.Add(-time.Millisecond), now) // it was under way meanwhile
		if got := u.retry.Sub(now); got != want {
			t.Errorf("failure %d: %s, want %s", i, got, want)
		}
		if u.probeDue(u.retry.Add(-1)) || !u.probeDue(u.retry) || u.probeDue(u.retry) {
			t.Errorf("failure %d: not exactly one probe at the end of the back-off", i)
		}
		now = u.retry
	}
	if u.worked(); !u.healthy() {
		t.Error("an answer doesn't restore it")
	}
}

func TestServerFailureIsAskedElsewhere(t *testing.T) {
	broken := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		reply.Rcode = dns.RcodeServerFailure
		send(t, w, reply)
	})
	ns := newNameServer(t, nil)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{broken.addr, ns.addr}})
	if reply := r.ask(t, "a.test.", dns.TypeA); reply.Rcode != dns.RcodeSuccess || len(reply.Answer) != 1 {
		t.Errorf("got %v", reply)
	}
	if !r.server.forward.upstreams[0].healthy() {
		t.Error("one failing name makes a name server unhealthy")
	}
	r = serve(t, &Resolver{Upstreams: []netip.AddrPort{broken.addr}})
	reply, took := r.exchange(t, "udp", new(dns.Msg).SetQuestion("a.test.", dns.TypeA))
	if reply.Rcode != dns.RcodeServerFailure || took > time.Second {
		t.Errorf("got %v after %s", reply, took)
	}
	e := r.wait(t, "the event", func(e Event) bool { return true })
	if e.RCode != "SERVFAIL" || e.Reason != "the name servers answered SERVFAIL" {
		t.Errorf("logged %+v", e)
	}
}

func TestNobodyAnswers(t *testing.T) {
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{closedPort(t), closedPort(t)}})
	m := new(dns.Msg).SetQuestion("a.test.", dns.TypeA)
	m.SetEdns0(1232, false)
	reply, took := r.exchange(t, "udp", m)
	if reply.Rcode != dns.RcodeServerFailure || took > time.Second {
		t.Errorf("got %v after %s", reply, took)
	}
	if e := ede(reply); e == nil || e.InfoCode != dns.ExtendedErrorCodeNetworkError || e.ExtraText != "clawvm: VM claw: no name server of the VM answered" {
		t.Errorf("extended error %v", e)
	}
	r = serve(t, &Resolver{})
	if reply := r.ask(t, "a.test.", dns.TypeA); reply.Rcode != dns.RcodeServerFailure {
		t.Errorf("without name servers: %v", reply)
	}
}

func TestTruncation(t *testing.T) {
	ns := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		for i := range 120 {
			reply.Answer = append(reply.Answer, record(t, fmt.Sprintf("%s 60 A 192.0.2.%d", reply.Question[0].Name, i)))
		}
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			reply.Truncate(udpSize)
		}
		send(t, w, reply)
	})
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	reply := r.ask(t, "big.test.", dns.TypeA)
	if !reply.Truncated || len(reply.Answer) != 0 || len(reply.Question) != 1 {
		t.Errorf("over UDP: %v", reply.MsgHdr)
	}
	if ns.udp.Load() != 1 || ns.tcp.Load() != 1 {
		t.Errorf("the name server got %d UDP and %d TCP queries", ns.udp.Load(), ns.tcp.Load())
	}
	reply, _ = r.exchange(t, "tcp", new(dns.Msg).SetQuestion("big.test.", dns.TypeA))
	if reply.Truncated || len(reply.Answer) != 120 {
		t.Errorf("over TCP: %d answers", len(reply.Answer))
	}
	e := r.wait(t, "the event", func(e Event) bool { return e.Proto == "tcp" })
	if len(e.Answers) != maxTexts+1 || e.Answers[maxTexts] != "104 more" || !e.Cached {
		t.Errorf("logged %+v", e)
	}
}

func TestEDNS(t *testing.T) {
	ns := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		for i := range 40 { // 40 × 16 bytes: more than 512, less than 1232
			reply.Answer = append(reply.Answer, record(t, fmt.Sprintf("%s 60 A 192.0.2.%d", reply.Question[0].Name, i)))
		}
		send(t, w, reply)
	})
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	if reply := r.ask(t, "a.test.", dns.TypeA); !reply.Truncated {
		t.Error("more than 512 bytes for a client without EDNS")
	}
	m := new(dns.Msg).SetQuestion("a.test.", dns.TypeA)
	m.SetEdns0(4096, true)
	reply, _ := r.exchange(t, "udp", m)
	opt := reply.IsEdns0()
	if reply.Truncated || len(reply.Answer) != 40 || opt == nil || !opt.Do() || opt.UDPSize() != udpSize {
		t.Errorf("got %v", reply)
	}
	m = new(dns.Msg).SetQuestion("a.test.", dns.TypeA)
	m.SetEdns0(4096, false)
	m.IsEdns0().SetVersion(1)
	if reply, _ := r.exchange(t, "udp", m); reply.Rcode != dns.RcodeBadVers {
		t.Errorf("EDNS version 1: %v", reply)
	}
}

func TestRefusals(t *testing.T) {
	ns := newNameServer(t, nil)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	for name, tc := range map[string]struct {
		change  func(*dns.Msg)
		rcode   int
		verdict string
		reason  string
	}{
		"AAAA":          {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA }, dns.RcodeSuccess, Allowed, "the VM has no IPv6"},
		"ANY":           {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeANY }, dns.RcodeRefused, Refused, "queries for all types are not answered"},
		"AXFR":          {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }, dns.RcodeRefused, Refused, "not a type that can be looked up"},
		"chaos":         {func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused, Refused, "only class IN is answered"},
		"notify":        {func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, dns.RcodeNotImplemented, Refused, "not a query"},
		"update":        {func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented, Refused, "not a query"},
		"two questions": {func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError, Refused, "not one question"},
		"no question":   {func(m *dns.Msg) { m.Question = nil }, dns.RcodeFormatError, Refused, "not one question"},
		"with answers":  {func(m *dns.Msg) { m.Answer = []dns.RR{record(t, "a.test. 1 A 192.0.2.1")} }, dns.RcodeFormatError, Refused, "a query with answers"},
	} {
		t.Run(name, func(t *testing.T) {
			m := new(dns.Msg).SetQuestion("a.test.", dns.TypeA)
			tc.change(m)
			reply, _ := r.exchange(t, "udp", m)
			if reply.Rcode != tc.rcode || len(reply.Answer) != 0 {
				t.Errorf("got %v", reply)
			}
			e := r.wait(t, "the event", func(e Event) bool { return e.Reason == tc.reason })
			if e.Verdict != tc.verdict || e.RCode != dns.RcodeToString[tc.rcode] || e.Kind != KindQuery || e.VM != "claw" {
				t.Errorf("logged %+v", e)
			}
		})
	}
	if n := ns.udp.Load(); n != 0 {
		t.Errorf("the name server was asked %d times", n)
	}
}

func TestPolicyNone(t *testing.T) {
	ns := newNameServer(t, nil)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}, Policy: None{}})
	m := new(dns.Msg).SetQuestion("example.com.", dns.TypeA)
	m.SetEdns0(512, false)
	reply, _ := r.exchange(t, "udp", m)
	if reply.Rcode != dns.RcodeNameError || len(reply.Answer) != 0 {
		t.Errorf("got %v", reply)
	}
	if e := ede(reply); e == nil || e.InfoCode != dns.ExtendedErrorCodeBlocked || e.ExtraText != "clawvm: VM claw may not look up this name: egress mode is none" {
		t.Errorf("extended error %v", e)
	}
	if reply := r.ask(t, "example.com.", dns.TypeA); reply.Rcode != dns.RcodeNameError || reply.IsEdns0() != nil {
		t.Errorf("without EDNS: %v", reply)
	}
	e := r.wait(t, "the event", func(e Event) bool { return true })
	if e.Verdict != Refused || e.Reason != "egress mode is none" || e.RCode != "NXDOMAIN" || e.Name != "example.com" {
		t.Errorf("logged %+v", e)
	}
	if n := ns.udp.Load(); n != 0 {
		t.Errorf("the name server was asked %d times", n)
	}
}

func TestStrangerIsRefused(t *testing.T) {
	ns := newNameServer(t, nil)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}, Guest: netip.MustParseAddr("127.0.0.2")})
	if reply := r.ask(t, "a.test.", dns.TypeA); reply.Rcode != dns.RcodeRefused || ns.udp.Load() != 0 {
		t.Errorf("got %v", reply)
	}
	c := dns.Client{Timeout: patience, Dialer: &net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}}}
	reply, _, err := c.Exchange(new(dns.Msg).SetQuestion("a.test.", dns.TypeA), r.addr)
	if err != nil || len(reply.Answer) != 1 {
		t.Errorf("the guest got %v, %v", reply, err)
	}
}

// A spoofed answer must not be taken: a wrong id, another question, no response at all.
func TestForeignAnswersAreIgnored(t *testing.T) {
	ns := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		good := reply.Copy()
		good.Answer = []dns.RR{record(t, "a.test. 60 A 192.0.2.1")}
		bad := []dns.RR{record(t, "a.test. 60 A 198.51.100.66")}
		for _, change := range []func(*dns.Msg){
			func(m *dns.Msg) { m.Id++ },
			func(m *dns.Msg) { m.Question[0].Name = "b.test." },
			func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeMX },
			func(m *dns.Msg) { m.Response = false },
			func(m *dns.Msg) { m.Question = nil },
		} {
			m := reply.Copy()
			m.Answer = bad
			change(m)
			send(t, w, m)
		}
		if _, err := w.Write([]byte{1, 2, 3}); err != nil {
			t.Log(err)
		}
		send(t, w, good)
	})
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	reply := r.ask(t, "a.test.", dns.TypeA)
	if len(reply.Answer) != 1 || reply.Answer[0].(*dns.A).A.String() != "192.0.2.1" {
		t.Errorf("got %v", reply)
	}
}

// Someone who sends many guesses makes the resolver ask over TCP.
func TestGuessingLeadsToTCP(t *testing.T) {
	ns := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			reply.Answer = []dns.RR{record(t, "a.test. 60 A 198.51.100.66")}
			for i := range uint16(maxStray) {
				m := reply.Copy()
				m.Id += 1 + i
				send(t, w, m)
			}
			return
		}
		reply.Answer = []dns.RR{record(t, "a.test. 60 A 192.0.2.1")}
		send(t, w, reply)
	})
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	reply := r.ask(t, "a.test.", dns.TypeA)
	if len(reply.Answer) != 1 || reply.Answer[0].(*dns.A).A.String() != "192.0.2.1" || ns.tcp.Load() != 1 {
		t.Errorf("got %v", reply)
	}
}

func TestPortsAndIDsVary(t *testing.T) {
	ns := newNameServer(t, nil)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	const queries = 200
	for i := range queries {
		r.ask(t, fmt.Sprintf("n%d.test.", i), dns.TypeA)
	}
	count := func(m *sync.Map) (n int) {
		m.Range(func(any, any) bool { n++; return true })
		return n
	}
	if n := count(&ns.ports); n < poolSockets {
		t.Errorf("%d ports, want %d at least", n, poolSockets)
	}
	if n := count(&ns.ids); n < queries*9/10 {
		t.Errorf("%d ids for %d queries", n, queries)
	}
	// After this many on one port each must have been replaced.
	before := count(&ns.ports)
	for i := range poolSockets * socketUses {
		r.ask(t, fmt.Sprintf("m%d.test.", i), dns.TypeA)
	}
	if n := count(&ns.ports); n < before+poolSockets/2 {
		t.Errorf("ports are not rotated: %d, then %d", before, n)
	}
}

func TestEqualQuestionsAreAskedOnce(t *testing.T) {
	release := make(chan struct{})
	ns := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		<-release
		send(t, w, reply)
	})
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	var wg sync.WaitGroup
	for range 20 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			c := dns.Client{Timeout: patience}
			if _, _, err := c.Exchange(new(dns.Msg).SetQuestion("a.test.", dns.TypeA), r.addr); err != nil {
				t.Error(err)
			}
		}()
	}
	eventually(t, "all queries to wait", func() bool { return r.server.waiting.Load() == 20 })
	eventually(t, "the name server to be asked", func() bool { return ns.udp.Load() > 0 })
	asked := ns.udp.Load()
	close(release)
	wg.Wait()
	if asked > rounds {
		t.Errorf("the name server was asked %d times", asked)
	}
}

func TestWaitingQueriesAreBounded(t *testing.T) {
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{silent(t)}})
	c, err := net.Dial("udp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := 0; i < maxWaiting; i += 64 { // in steps that the socket's buffer holds
		for j := range 64 {
			wire, err := new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.test.", i+j), dns.TypeA).Pack()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Write(wire); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the queries to wait", func() bool { return r.server.waiting.Load() >= int64(i+64) })
	}
	reply, took := r.exchange(t, "udp", new(dns.Msg).SetQuestion("more.test.", dns.TypeA))
	if reply.Rcode != dns.RcodeServerFailure || took > time.Second {
		t.Errorf("got %v after %s", reply, took)
	}
	r.wait(t, "the event", func(e Event) bool { return e.Name == "more.test" && e.Reason == errBusy.Error() })
	up := r.server.forward.upstreams[0]
	up.mu.Lock()
	defer up.mu.Unlock()
	if up.busy > maxSockets {
		t.Errorf("%d sockets", up.busy)
	}
}

func TestTCPConnectionsAreBounded(t *testing.T) {
	ns := newNameServer(t, nil)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	var idle []net.Conn
	for range maxTCP {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	// The next one waits until the first ones are given up for silence.
	start := time.Now()
	if reply, _ := r.exchange(t, "tcp", new(dns.Msg).SetQuestion("a.test.", dns.TypeA)); len(reply.Answer) != 1 {
		t.Errorf("got %v", reply)
	}
	if waited := time.Since(start); waited < tcpFirst/2 {
		t.Errorf("connection %d was served after %s", maxTCP+1, waited)
	}
	if err := idle[0].SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := idle[0].Read(make([]byte, 1)); err == nil {
		t.Error("an idle connection was not closed")
	}
}

func TestNamesInTheLogAreEscaped(t *testing.T) {
	ns := newNameServer(t, func(w dns.ResponseWriter, reply *dns.Msg) {
		reply.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: reply.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 60}, Txt: []string{"\x1b[2J\n{\"kind\":\"open\"}"}}}
		send(t, w, reply)
	})
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	// The label's bytes as a hostile guest puts them on the wire.
	label := "x\n{\"kind\":\"open\",\"vm\":\"other\"}\x1b[31m\u202e"
	q := []byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, byte(len(label))}
	q = append(append(q, label...), 4, 't', 'e', 's', 't', 0, 0, byte(dns.TypeTXT), 0, 1)
	c, err := net.Dial("udp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(q); err != nil {
		t.Fatal(err)
	}
	e := r.wait(t, "the event", func(e Event) bool { return true })
	var line strings.Builder
	if err := Print(&line, e, true); err != nil {
		t.Fatal(err)
	}
	for _, s := range append(e.Answers, e.Name) {
		for i := range len(s) {
			if s[i] < ' ' || s[i] > '~' {
				t.Errorf("byte %#x in %q", s[i], s)
			}
		}
	}
	if got := line.String(); strings.Count(got, "\n") != 1 || strings.ContainsRune(got, '\x1b') {
		t.Errorf("printed %q", got)
	}
}

func TestServeEnds(t *testing.T) {
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	needLoopback(t)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := tcp.Close(); err != nil {
		t.Fatal(err)
	}
	r := &Resolver{VM: "claw"}
	if err := r.Serve(t.Context(), udp, tcp); err == nil || !strings.HasPrefix(err.Error(), "cannot answer DNS queries over tcp: ") {
		t.Errorf("with a closed listener: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	udp, err = net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err = net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Serve(ctx, udp, tcp); err != nil {
		t.Errorf("with an ended context: %v", err)
	}
}

func FuzzMessage(f *testing.F) {
	good, err := new(dns.Msg).SetQuestion("a.test.", dns.TypeA).Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add([]byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1}) // a name that points at itself
	f.Add(append(binary.BigEndian.AppendUint16(nil, 7), 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 41, 16, 0, 0, 0, 0, 0, 0xff, 0xff))
	r := serve(f, &Resolver{Policy: None{}, Log: func(Event) {}})
	s := r.server
	f.Fuzz(func(t *testing.T, b []byte) {
		w := &sink{limit: dns.MinMsgSize}
		m := new(dns.Msg)
		if len(b) < headerSize || s.accept(header(b), "udp") != dns.MsgAccept || m.Unpack(b) != nil {
			return
		}
		s.handle(w, m)
		if w.wrote == nil {
			return
		}
		reply := new(dns.Msg)
		if err := reply.Unpack(w.wrote); err != nil {
			t.Fatalf("%x: the answer can't be read: %v", b, err)
		}
		if reply.Id != m.Id || !reply.Response || len(reply.Question) != 1 {
			t.Fatalf("%x: %v", b, reply)
		}
	})
}

func FuzzUpstreamAnswer(f *testing.F) {
	m := new(dns.Msg).SetQuestion("a.test.", dns.TypeA)
	m.Response = true
	m.Answer = []dns.RR{record(f, "a.test. 60 CNAME b.test."), record(f, "b.test. 60 A 192.0.2.1"), record(f, `b.test. 60 TXT "x"`)}
	wire, err := m.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	query := new(dns.Msg).SetQuestion("A.test.", dns.TypeA)
	query.SetEdns0(1232, true)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(dns.Msg)
		if m.Unpack(b) != nil {
			return
		}
		a, err := newAnswer(question{name: "a.test.", qtype: dns.TypeA}, m, "ns")
		if err != nil {
			return
		}
		for _, limit := range []int{dns.MinMsgSize, dns.MaxMsgSize} {
			out := a.reply(query, query.IsEdns0(), limit, 5)
			got := new(dns.Msg)
			if err := got.Unpack(out); err != nil {
				t.Fatalf("%x: the answer can't be read: %v", b, err)
			}
			if len(out) > limit || got.Question[0].Name != "A.test." || got.IsEdns0() == nil {
				t.Fatalf("%x: %v", b, got)
			}
		}
	})
}

// Packets without sense go to the resolver's real sockets, and then a query that must still be answered.
func TestRandomPacketsDoNoHarm(t *testing.T) {
	ns := newNameServer(t, nil)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	udp, err := net.Dial("udp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	b := make([]byte, 64)
	seed := uint32(1)
	for i := range 2000 {
		for j := range b {
			seed = seed*1664525 + 1013904223
			b[j] = byte(seed >> 24)
		}
		if i%2 == 0 { // a likely header
			copy(b, []byte{0, byte(i), 1, 0, 0, 1, 0, 0, 0, 0, 0, 0})
		}
		if _, err := udp.Write(b[:1+i%len(b)]); err != nil {
			t.Fatal(err)
		}
	}
	tcp, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	if _, err := tcp.Write(append([]byte{0, 64}, b...)); err != nil {
		t.Fatal(err)
	}
	r.wait(t, "a refusal", func(e Event) bool { return strings.HasPrefix(e.Reason, "malformed message") })
	eventually(t, "an answer", func() bool { // the socket's buffer may still be full
		c := dns.Client{Timeout: time.Second}
		reply, _, err := c.Exchange(new(dns.Msg).SetQuestion("a.test.", dns.TypeA), r.addr)
		return err == nil && len(reply.Answer) == 1
	})
}

func header(b []byte) dns.Header {
	at := func(i int) uint16 { return binary.BigEndian.Uint16(b[i:]) }
	return dns.Header{Id: at(0), Bits: at(2), Qdcount: at(4), Ancount: at(6), Nscount: at(8), Arcount: at(10)}
}

// A sink is a guest over UDP.
type sink struct {
	dns.ResponseWriter
	limit int
	wrote []byte
}

func (s *sink) RemoteAddr() net.Addr { return &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func (s *sink) Write(b []byte) (int, error) {
	s.wrote = b
	return len(b), nil
}
