package egress

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/clawvm/clawvm/network/egress/policy"
)

func FuzzMessage(f *testing.F) {
	good, err := new(dns.Msg).SetQuestion("a.test.", dns.TypeA).Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add([]byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1}) // a name that points at itself
	f.Add(append(binary.BigEndian.AppendUint16(nil, 7), 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 41, 16, 0, 0, 0, 0, 0, 0xff, 0xff))
	ns := newNameServer(f, nil)
	r := serve(f, &Resolver{Policy: policy.New(policy.Spec{Mode: policy.None}), Log: func(Event) {}})
	open := newServer(&Resolver{Upstreams: []netip.AddrPort{ns.addr}}, time.Now)
	f.Cleanup(open.forward.close)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(dns.Msg)
		if len(b) < headerSize || isResponse(header(b)) || reject(header(b)) != nil || m.Unpack(b) != nil || len(m.Question) != 1 {
			return
		}
		if x := open.begin(m.Copy(), netip.Addr{}, true, time.Now()); x.wire == nil {
			if q, err := queryWire(x.question); err == nil && new(dns.Msg).Unpack(q) != nil {
				t.Fatalf("%x: the query %x can't be read", b, q)
			}
		}
		x := r.server.begin(m, netip.Addr{}, true, time.Now())
		reply := new(dns.Msg)
		if err := reply.Unpack(x.wire); err != nil {
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
	q := question{name: "a.test.", qtype: dns.TypeA}
	asked, err := queryWire(q)
	if err != nil {
		f.Fatal(err)
	}
	query := new(dns.Msg).SetQuestion("A.test.", dns.TypeA)
	query.SetEdns0(1232, true)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < headerSize {
			return
		}
		b[0], b[1] = 0, 0 // the id of asked
		if !answers(b, asked) {
			return
		}
		a, err := newAnswer(q, bytes.Clone(b), "ns")
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
