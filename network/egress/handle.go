package egress

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// A question is what is asked of name servers and kept in the cache.
type question struct {
	name   string // lower case, with the final dot
	qtype  uint16
	do, cd bool // DNSSEC: records wanted; checking disabled
}

// key is the question in a form that singleflight takes.
func (q question) key() string {
	flags := 0
	if q.do {
		flags |= 1
	}
	if q.cd {
		flags |= 2
	}
	return strconv.Itoa(int(q.qtype)) + "." + strconv.Itoa(flags) + "." + q.name
}

// A refusal is an answer that the resolver makes itself.
type refusal struct {
	rcode   int
	verdict string
	reason  string // for the log, and the extended error's text when ede is set
	ede     uint16 // RFC 8914; 0 is "other" and not used here
}

var (
	errBusy  = errors.New("too many queries wait already")
	notIN    = refusal{rcode: dns.RcodeRefused, verdict: Refused, reason: "only class IN is answered"}
	anyQuery = refusal{rcode: dns.RcodeRefused, verdict: Refused, reason: "queries for all types are not answered", ede: dns.ExtendedErrorCodeNotSupported}
	transfer = refusal{rcode: dns.RcodeRefused, verdict: Refused, reason: "not a type that can be looked up", ede: dns.ExtendedErrorCodeNotSupported}
	stranger = refusal{rcode: dns.RcodeRefused, verdict: Refused, reason: "not from the VM's address"}
	noIPv6   = refusal{rcode: dns.RcodeSuccess, verdict: Allowed, reason: "the VM has no IPv6"}
	badVers  = refusal{rcode: dns.RcodeBadVers, verdict: Refused, reason: "unknown EDNS version"}
)

// handle answers one query that accept let pass, and logs it.
func (s *server) handle(w dns.ResponseWriter, m *dns.Msg) {
	start := time.Now()
	asked := m.Question[0]
	from, udp := source(w)
	e := Event{Name: strings.ToLower(asked.Name), Type: typeName(asked.Qtype), Proto: "tcp", Verdict: Allowed}
	if udp {
		e.Proto = "udp"
	}
	opt := m.IsEdns0()
	var wire []byte
	if refused := s.refuse(m, opt, from, e.Name); refused != nil {
		wire = s.refusalWire(m, opt, refused, &e)
	} else {
		wire = s.resolve(m, opt, udp, &e)
	}
	if wire == nil {
		return
	}
	if _, err := w.Write(wire); err != nil {
		e.Reason = "the answer could not be sent"
	}
	end := time.Now()
	e.Time, e.Millis = end, float64(end.Sub(start).Microseconds())/1000
	e.Name = strings.TrimSuffix(e.Name, ".")
	s.log(e)
}

// refuse returns how a query is to be answered that no name server will see, or nil.
func (s *server) refuse(m *dns.Msg, opt *dns.OPT, from netip.Addr, name string) *refusal {
	asked := m.Question[0]
	switch {
	case s.Guest.IsValid() && from != s.Guest:
		return &stranger
	case opt != nil && opt.Version() != 0:
		return &badVers
	case asked.Qclass != dns.ClassINET:
		return &notIN
	case asked.Qtype == dns.TypeANY:
		return &anyQuery
	case asked.Qtype == dns.TypeNone || asked.Qtype == dns.TypeOPT || (asked.Qtype >= 128 && asked.Qtype <= 255):
		return &transfer // 128–255 ask about more than a record: transfers, TSIG, TKEY (RFC 6895 3.1)
	}
	if ok, why := s.policy.Query(name, asked.Qtype); !ok {
		// NXDOMAIN and not REFUSED, because programs then fail at once; on REFUSED the C library says "try again".
		return &refusal{rcode: dns.RcodeNameError, verdict: Refused, reason: why, ede: dns.ExtendedErrorCodeBlocked}
	}
	if asked.Qtype == dns.TypeAAAA {
		return &noIPv6
	}
	return nil
}

// resolve answers from the cache or from a name server.
func (s *server) resolve(m *dns.Msg, opt *dns.OPT, udp bool, e *Event) []byte {
	q := question{name: e.Name, qtype: m.Question[0].Qtype, cd: m.CheckingDisabled, do: opt != nil && opt.Do()}
	a := s.cache.get(q, s.now())
	if a != nil {
		e.Cached = true
	} else {
		var err error
		if a, err = s.lookup(q); err != nil {
			ede := dns.ExtendedErrorCodeNetworkError
			if errors.Is(err, errBusy) {
				ede = dns.ExtendedErrorCodeNotReady
			}
			return s.refusalWire(m, opt, &refusal{rcode: dns.RcodeServerFailure, verdict: Allowed, reason: err.Error(), ede: ede}, e)
		}
		e.Upstream = a.upstream
	}
	e.RCode, e.Answers = rcodeName(a.rcode), a.texts
	e.Reason = a.reason
	s.Names.remember(strings.TrimSuffix(q.name, "."), a.addrs)
	limit := dns.MaxMsgSize
	if udp {
		limit = dns.MinMsgSize
		if opt != nil {
			limit = min(max(limit, int(opt.UDPSize())), udpSize)
		}
	}
	return a.reply(m, opt, limit, a.age(s.now()))
}

// lookup asks the name servers, once for all who wait for the same answer.
func (s *server) lookup(q question) (*answer, error) {
	defer s.waiting.Add(-1)
	if s.waiting.Add(1) > maxWaiting {
		return nil, errBusy
	}
	v, err, _ := s.flights.Do(q.key(), func() (any, error) {
		// Another flight may have landed between the look into the cache and this one's start.
		if a := s.cache.get(q, s.now()); a != nil {
			return a, nil
		}
		a, err := s.forward.ask(q)
		if err != nil {
			return nil, err
		}
		s.cache.put(q, a, s.now())
		return a, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*answer), nil
}

// refusalWire encodes an answer without records. The extended error is only for who speaks EDNS (RFC 6891 7).
func (s *server) refusalWire(m *dns.Msg, opt *dns.OPT, r *refusal, e *Event) []byte {
	e.Verdict, e.Reason, e.RCode = r.verdict, r.reason, rcodeName(r.rcode)
	if r.rcode == dns.RcodeBadVers {
		e.RCode = "BADVERS" // the number's other name is BADSIG
	}
	out := new(dns.Msg).SetRcode(m, r.rcode)
	out.RecursionAvailable = true
	if opt != nil {
		answer := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		answer.SetUDPSize(udpSize)
		if opt.Do() {
			answer.SetDo()
		}
		if r.ede != 0 {
			text := "clawvm: VM " + s.VM + ": " + r.reason
			if r.verdict == Refused {
				text = "clawvm: VM " + s.VM + " may not look up this name: " + r.reason
			}
			answer.Option = append(answer.Option, &dns.EDNS0_EDE{InfoCode: r.ede, ExtraText: text})
		}
		out.Extra = append(out.Extra, answer)
	}
	wire, err := out.Pack()
	if err != nil {
		// A name that could be read but not be written again; it gets no answer, like one that could not be read.
		s.malformed(e.Proto, err)
		return nil
	}
	return wire
}

// source returns who asks, and whether over UDP.
func source(w dns.ResponseWriter) (netip.Addr, bool) {
	switch a := w.RemoteAddr().(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap(), true
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap(), false
	}
	return netip.Addr{}, false
}

func typeName(t uint16) string { return dns.Type(t).String() }
