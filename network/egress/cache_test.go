package egress

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
)

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

// answerOf encodes a name server's message and takes it over.
func answerOf(t testing.TB, q question, m *dns.Msg) *answer {
	t.Helper()
	m.Question = []dns.Question{{Name: q.name, Qtype: q.qtype, Qclass: dns.ClassINET}}
	wire, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	a, err := newAnswer(q, wire, "ns")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestCacheBounds(t *testing.T) {
	make := func(name string, ttl uint32) (question, *answer) {
		q := question{name: name, qtype: dns.TypeA}
		m := new(dns.Msg)
		m.Answer = []dns.RR{record(t, fmt.Sprintf("%s %d A 192.0.2.1", name, ttl))}
		return q, answerOf(t, q, m)
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
