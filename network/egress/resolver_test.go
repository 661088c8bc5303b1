package egress

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/clawvm/clawvm/network/egress/policy"
)

type running struct {
	*recorder
	server *server
	addr   string
	clock  *clock
}

// serve starts a resolver with a clock that stands still, and checks that it ends as it should.
func serve(t testing.TB, r *Resolver) *running {
	t.Helper()
	run := &running{recorder: new(recorder), clock: newClock()}
	r.VM = "claw"
	if r.Log == nil {
		r.Log = run.log
	}
	udp, tcp := listenBoth(t)
	run.addr = udp.LocalAddr().String()
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
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}, Policy: policy.New(policy.Spec{VM: "claw", Mode: policy.None})})
	m := new(dns.Msg).SetQuestion("example.com.", dns.TypeA)
	m.SetEdns0(512, false)
	reply, _ := r.exchange(t, "udp", m)
	if reply.Rcode != dns.RcodeNameError || len(reply.Answer) != 0 {
		t.Errorf("got %v", reply)
	}
	if e := ede(reply); e == nil || e.InfoCode != dns.ExtendedErrorCodeBlocked || e.ExtraText != "clawvm: VM claw may not reach example.com (egress mode is none)" {
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
	if n := len(up.retired); n > rounds*maxWaiting/socketUses+poolSockets {
		t.Errorf("%d sockets besides the pool", n)
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
	needLoopback(t)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
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
	if err := r.Serve(t.Context(), udp, tcp); err == nil || !strings.HasPrefix(err.Error(), "cannot answer DNS queries over TCP: ") {
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

// A header that counts a question and then ends was once the end of the process.
func TestMissingQuestion(t *testing.T) {
	ns := newNameServer(t, nil)
	r := serve(t, &Resolver{Upstreams: []netip.AddrPort{ns.addr}})
	lie := []byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1}
	for _, network := range []string{"udp", "tcp"} {
		c, err := net.Dial(network, r.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conn := &dns.Conn{Conn: c}
		if _, err := conn.Write(lie); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if reply, err := conn.ReadMsg(); err != nil || reply.Rcode != dns.RcodeFormatError || reply.Id != 7 {
			t.Errorf("%s: got %v, %v", network, reply, err)
		}
		r.wait(t, "the event", func(e Event) bool { return e.Proto == network && e.Reason == "malformed message" })
	}
	if reply := r.ask(t, "a.test.", dns.TypeA); len(reply.Answer) != 1 {
		t.Errorf("got %v", reply)
	}
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
