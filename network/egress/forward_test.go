package egress

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

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
	u := newUpstream(netip.AddrPort{})
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
