package egress

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/clawvm/clawvm/network/egress/policy"
)

const (
	maxChain  = 16 // CNAMEs from a name to its addresses; resolvers give up at 8 to 16
	maxPinned = 32 // addresses of one answer that the guest gets

	// pinFloor is how long an address can be reached at least after it was answered: programs look up, and connect a little later.
	pinFloor = time.Minute
	// pinSlack is added for who gets the answer from the cache at the end of its life.
	pinSlack = time.Minute
)

// strict says whether only allowed names are answered, and with checked addresses alone.
func (s *server) strict() bool { return s.policy.Mode() == policy.Allowlist }

// checked makes of a name server's answer the one that the guest gets: the addresses of the name, and the CNAMEs that lead to them
// from owner to owner. An address that the VM may not reach is left out; an answer that has no other is refused. The addresses are
// pinned when it returns, so that they can be reached when the guest knows them.
func (s *server) checked(q question, a *answer) (*answer, error) {
	m := new(dns.Msg)
	if err := m.Unpack(a.wire); err != nil {
		return nil, fmt.Errorf("cannot read the name server's answer: %w", err)
	}
	out := new(dns.Msg)
	out.SetQuestion(q.name, q.qtype)
	out.Response, out.RecursionAvailable, out.Rcode = true, true, a.rcode
	if a.rcode != dns.RcodeSuccess {
		return a.rebuilt(q, out)
	}
	chain, records := ownerChain(q.name, m.Answer)
	out.Answer = chain
	var addrs []netip.Addr
	var why string // the first address that is refused
	ttl := a.ttl
	for _, r := range records {
		addr, ok := netip.AddrFromSlice(r.A)
		if !ok || slices.Contains(addrs, addr.Unmap()) {
			continue
		}
		if v := s.policy.Address(addr); !v.Allowed {
			if why == "" {
				why = v.Reason
			}
			continue
		}
		if len(addrs) == maxPinned {
			break
		}
		addrs, out.Answer = append(addrs, addr.Unmap()), append(out.Answer, r)
		ttl = max(ttl, time.Duration(r.Hdr.Ttl)*time.Second)
	}
	if len(addrs) == 0 && why != "" {
		refused := *a
		refused.refused = &refusal{rcode: dns.RcodeNameError, verdict: Refused, reason: why, ede: dns.ExtendedErrorCodeBlocked}
		refused.addrs = nil
		return &refused, nil
	}
	if len(addrs) > 0 && s.Pin != nil {
		if err := s.Pin(strings.TrimSuffix(q.name, "."), addrs, max(min(ttl, maxTTL), pinFloor)+pinSlack); err != nil {
			return nil, fmt.Errorf("the packet filter could not be told: %w", err)
		}
	}
	return a.rebuilt(q, out)
}

// rebuilt is the answer with other records.
func (a *answer) rebuilt(q question, m *dns.Msg) (*answer, error) {
	m.Compress = true
	wire, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("cannot write the answer anew: %w", err)
	}
	fresh, err := newAnswer(q, wire, a.upstream)
	if err != nil {
		return nil, err
	}
	fresh.ttl, fresh.reason = a.ttl, a.reason
	return fresh, nil
}

// ownerChain follows CNAMEs from a name to the addresses of the last one. Records of other owners, whatever they say, are no part of
// the answer.
func ownerChain(name string, all []dns.RR) (chain []dns.RR, addresses []*dns.A) {
	owner := dns.CanonicalName(name)
	is := func(rr dns.RR) bool {
		return rr.Header().Class == dns.ClassINET && dns.CanonicalName(rr.Header().Name) == owner
	}
	for range maxChain {
		for _, rr := range all {
			if a, ok := rr.(*dns.A); ok && is(rr) {
				addresses = append(addresses, a)
			}
		}
		if len(addresses) > 0 {
			return chain, addresses
		}
		i := slices.IndexFunc(all, func(rr dns.RR) bool { _, ok := rr.(*dns.CNAME); return ok && is(rr) })
		if i < 0 {
			return chain, nil
		}
		chain = append(chain, all[i])
		owner = dns.CanonicalName(all[i].(*dns.CNAME).Target)
	}
	return nil, nil // it goes round, or is too long to be true
}
