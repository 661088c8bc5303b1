package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	maxTTL      = time.Hour       // name servers keep what lives longer; a VM's cache needn't
	maxNegative = 5 * time.Minute // RFC 2308 5: how long a name may be missing
	failureTTL  = time.Second     // RFC 9520 3.2: failures are kept for a second at least

	maxTexts = 16  // records of one answer that are logged
	maxText  = 256 // bytes of one; an escaped byte has four

	headerSize = 12
	optSize    = 11
	offTTL     = 4 // from the end of a record's name

	flagResponse, flagTruncated = 1 << 15, 1 << 9
	flagRecurse, flagRecursive  = 1 << 8, 1 << 7
	flagUnchecked, optDo        = 1 << 4, 1 << 15
)

// An answer is a name server's answer, ready to be given to whoever asked the same question: encoded, without an OPT record.
type answer struct {
	wire     []byte
	ttls     []int // where in wire the records' TTLs are
	question int   // where the question ends
	rcode    int
	ttl      time.Duration // 0: not to be kept
	stored   time.Time     // when it came into the cache
	texts    []string      // the records as the log shows them
	addrs    []netip.Addr
	upstream string
	reason   string
	refused  *refusal // the guest gets this instead
}

// newAnswer takes over what belongs into an answer to q from a name server's message, whose question has been compared.
func newAnswer(q question, wire []byte, upstream string) (*answer, error) {
	m := new(dns.Msg)
	if err := m.Unpack(wire); err != nil {
		return nil, fmt.Errorf("cannot read the name server's answer: %w", err)
	}
	a := &answer{wire: wire, rcode: m.Rcode, upstream: upstream}
	if err := a.index(); err != nil {
		return nil, err
	}
	if m.Rcode > 0xf { // an extended code would need an OPT record to say it
		a.rcode = dns.RcodeServerFailure
	}
	switch a.rcode {
	case dns.RcodeSuccess, dns.RcodeNameError:
		a.ttl = lifetime(m)
	default:
		a.ttl = failureTTL
		a.reason = "the name servers answered " + rcodeName(m.Rcode)
	}
	for _, rr := range m.Answer {
		if r, ok := rr.(*dns.A); ok {
			if addr, ok := netip.AddrFromSlice(r.A); ok {
				a.addrs = append(a.addrs, addr.Unmap())
			}
		}
	}
	a.texts = texts(m.Answer)
	return a, nil
}

// lifetime is how long an answer may be kept (RFC 2308 for those without records; 0 when they have no SOA).
func lifetime(m *dns.Msg) time.Duration {
	seconds := uint32(maxTTL / time.Second)
	for _, rr := range m.Answer {
		seconds = min(seconds, rr.Header().Ttl)
	}
	if len(m.Answer) > 0 && m.Rcode == dns.RcodeSuccess {
		return time.Duration(seconds) * time.Second
	}
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			return min(time.Duration(min(seconds, soa.Hdr.Ttl, soa.Minttl))*time.Second, maxNegative)
		}
	}
	return 0
}

func texts(records []dns.RR) []string {
	var all []string
	for i, rr := range records {
		if i == maxTexts {
			return append(all, fmt.Sprintf("%d more", len(records)-i))
		}
		var text string
		switch r := rr.(type) {
		case *dns.A:
			text = r.A.String()
		case *dns.RRSIG:
			continue // its presence is all that a reader could understand
		default:
			h := rr.Header()
			text = dns.Type(h.Rrtype).String() + " " + strings.TrimPrefix(rr.String(), h.String())
		}
		if len(text) > maxText {
			text = text[:maxText] + "..."
		}
		all = append(all, text)
	}
	return all
}

var errWire = errors.New("cannot read the name server's answer: its records don't fit its counts")

// index finds the TTLs of the answer's and authority's records, and cuts off what follows them: names only point backwards.
func (a *answer) index() error {
	if len(a.wire) <= headerSize || binary.BigEndian.Uint16(a.wire[4:]) != 1 {
		return errWire
	}
	if a.wire[headerSize]&0xc0 != 0 {
		return errWire // a question is never compressed; its spelling is replaced in place
	}
	records := int(binary.BigEndian.Uint16(a.wire[6:])) + int(binary.BigEndian.Uint16(a.wire[8:]))
	at, err := skipName(a.wire, headerSize)
	if err != nil || at+4 > len(a.wire) {
		return errWire
	}
	a.question = at + 4
	at = a.question
	for range records {
		if at, err = skipName(a.wire, at); err != nil || at+10 > len(a.wire) {
			return errWire
		}
		a.ttls = append(a.ttls, at+offTTL)
		at += 10 + int(binary.BigEndian.Uint16(a.wire[at+8:]))
	}
	if at > len(a.wire) {
		return errWire
	}
	a.wire = a.wire[:at:at]
	clear(a.wire[10:headerSize])
	return nil
}

// skipName returns where the name at an offset ends.
func skipName(wire []byte, at int) (int, error) {
	for at < len(wire) {
		switch n := int(wire[at]); {
		case n == 0:
			return at + 1, nil
		case n >= 0xc0:
			return at + 2, nil
		case n > 63:
			return 0, errWire
		default:
			at += 1 + n
		}
	}
	return 0, errWire
}

func (a *answer) age(now time.Time) uint32 {
	if a.stored.IsZero() || now.Before(a.stored) {
		return 0
	}
	return uint32(now.Sub(a.stored) / time.Second)
}

// reply encodes the answer for one query: its id and flags, its spelling of the name, TTLs that have aged, an OPT record when the
// query has one. What is longer than limit is replaced by a sign to ask again over TCP.
func (a *answer) reply(m *dns.Msg, opt *dns.OPT, limit int, age uint32) []byte {
	size := len(a.wire)
	if opt != nil {
		size += optSize
	}
	truncate := size > limit
	body := a.wire
	if truncate {
		body = a.wire[:a.question]
	}
	out := append(make([]byte, 0, len(body)+optSize), body...)
	flags := uint16(flagResponse | flagRecursive | a.rcode)
	if m.RecursionDesired {
		flags |= flagRecurse
	}
	if m.CheckingDisabled {
		flags |= flagUnchecked
	}
	if truncate {
		flags |= flagTruncated
		clear(out[6:headerSize])
	} else {
		for _, at := range a.ttls {
			ttl := binary.BigEndian.Uint32(out[at:])
			binary.BigEndian.PutUint32(out[at:], ttl-min(ttl, age))
		}
	}
	binary.BigEndian.PutUint16(out, m.Id)
	binary.BigEndian.PutUint16(out[2:], flags)
	// The guest's spelling has the length of ours: they differ in case alone. Resolvers that randomise case look at it.
	if _, err := dns.PackDomainName(m.Question[0].Name, out[:a.question-4], headerSize, nil, false); err != nil {
		copy(out[headerSize:a.question], a.wire[headerSize:])
	}
	if opt != nil {
		out[11] = 1
		out = appendOPT(out, opt.Do())
	}
	return out
}
