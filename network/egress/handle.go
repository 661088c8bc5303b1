package egress

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/clawvm/clawvm/network/egress/policy"
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
	addable bool   // the owner could allow it
}

var (
	errBusy       = errors.New("too many queries wait already")
	notIN         = refusal{rcode: dns.RcodeRefused, verdict: Refused, reason: "only class IN is answered"}
	anyQuery      = refusal{rcode: dns.RcodeRefused, verdict: Refused, reason: "queries for all types are not answered", ede: dns.ExtendedErrorCodeNotSupported}
	transfer      = refusal{rcode: dns.RcodeRefused, verdict: Refused, reason: "not a type that can be looked up", ede: dns.ExtendedErrorCodeNotSupported}
	stranger      = refusal{rcode: dns.RcodeRefused, verdict: Refused, reason: "not from the VM's address"}
	noIPv6        = refusal{rcode: dns.RcodeSuccess, verdict: Allowed, reason: "the VM has no IPv6"}
	addressesOnly = refusal{rcode: dns.RcodeSuccess, verdict: Refused, reason: "only addresses (A) are looked up under an allowlist", ede: dns.ExtendedErrorCodeBlocked}
	badVers       = refusal{rcode: dns.RcodeBadVers, verdict: Refused, reason: "unknown EDNS version"}

	// Of these not even the question is known.
	notQuery    = refusal{rcode: dns.RcodeNotImplemented, reason: "not a query"}
	notOne      = refusal{rcode: dns.RcodeFormatError, reason: "not one question"}
	withAnswers = refusal{rcode: dns.RcodeFormatError, reason: "a query with answers"}
	malformed   = refusal{rcode: dns.RcodeFormatError, reason: "malformed message"}
	unsent      = refusal{rcode: dns.RcodeFormatError, reason: "the answer could not be sent"}
)

// An exchange is one query of the guest's and what it comes to.
type exchange struct {
	query    *dns.Msg
	opt      *dns.OPT
	udp      bool
	start    time.Time
	question question
	wire     []byte // the answer
	event    Event
}

// begin answers what needs no name server; else the exchange has no answer yet.
func (s *server) begin(m *dns.Msg, from netip.Addr, udp bool, start time.Time) *exchange {
	asked := m.Question[0]
	x := &exchange{query: m, opt: m.IsEdns0(), udp: udp, start: start}
	x.question = question{name: strings.ToLower(asked.Name), qtype: asked.Qtype}
	if !s.strict() { // whose answers are made anew, and can't be proved any more
		x.question.cd, x.question.do = m.CheckingDisabled, x.opt != nil && x.opt.Do()
	}
	x.event = Event{Name: strings.TrimSuffix(x.question.name, "."), Type: typeName(asked.Qtype), Proto: "tcp", Verdict: Allowed}
	if udp {
		x.event.Proto = "udp"
	}
	if refused := s.refuse(x, from); refused != nil {
		s.refused(x, refused)
	} else if a := s.cache.get(x.question, s.now()); a != nil {
		x.event.Cached = true
		s.answered(x, a)
	}
	return x
}

// lookUp answers what begin could not.
func (s *server) lookUp(x *exchange) {
	a, err := s.lookup(x.question)
	switch {
	case errors.Is(err, errBusy):
		s.refused(x, &refusal{rcode: dns.RcodeServerFailure, verdict: Refused, reason: err.Error(), ede: dns.ExtendedErrorCodeNotReady})
	case err != nil:
		s.refused(x, &refusal{rcode: dns.RcodeServerFailure, verdict: Allowed, reason: err.Error(), ede: dns.ExtendedErrorCodeNetworkError})
	default:
		x.event.Upstream = a.upstream
		s.answered(x, a)
	}
}

// end sends the answer and logs the exchange.
func (s *server) end(x *exchange, send func([]byte) error) {
	if err := send(x.wire); err != nil {
		x.event.Reason = "the answer could not be sent"
	}
	end := time.Now()
	x.event.Time, x.event.Millis = end, float64(end.Sub(x.start).Microseconds())/1000
	s.log(x.event)
}

// refuse returns how a query is to be answered that no name server will see, or nil.
func (s *server) refuse(x *exchange, from netip.Addr) *refusal {
	asked := x.query.Question[0]
	switch {
	case s.Guest.IsValid() && from != s.Guest:
		return &stranger
	case x.opt != nil && x.opt.Version() != 0:
		return &badVers
	case asked.Qclass != dns.ClassINET:
		return &notIN
	case asked.Qtype == dns.TypeANY:
		return &anyQuery
	case asked.Qtype == dns.TypeNone || asked.Qtype == dns.TypeOPT || (asked.Qtype >= 128 && asked.Qtype <= 255):
		return &transfer // 128–255 ask about more than a record: transfers, TSIG, TKEY (RFC 6895 3.1)
	}
	v := s.policy.Name(x.question.name)
	if !v.Allowed {
		// NXDOMAIN and not REFUSED, because programs then fail at once; on REFUSED the C library says "try again".
		return &refusal{rcode: dns.RcodeNameError, verdict: Refused, reason: v.Reason, ede: dns.ExtendedErrorCodeBlocked, addable: v.Addable}
	}
	x.event.Rule = v.Rule
	switch {
	case asked.Qtype == dns.TypeAAAA:
		return &noIPv6
	case s.strict() && asked.Qtype != dns.TypeA:
		// The name is there, so that it isn't NXDOMAIN: browsers and resolvers would take that for all types.
		return &addressesOnly
	}
	return nil
}

// answered makes the exchange's answer from a name server's.
func (s *server) answered(x *exchange, a *answer) {
	x.event.RCode, x.event.Answers, x.event.Reason = rcodeName(a.rcode), a.texts, a.reason
	if a.refused != nil {
		s.refused(x, a.refused)
		return
	}
	s.Names.remember(x.event.Name, a.addrs)
	limit := dns.MaxMsgSize
	if x.udp {
		limit = dns.MinMsgSize
		if x.opt != nil {
			limit = min(max(limit, int(x.opt.UDPSize())), udpSize)
		}
	}
	x.wire = a.reply(x.query, x.opt, limit, a.age(s.now()))
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
		if err == nil && s.strict() {
			a, err = s.checked(q, a)
		}
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

// refused makes the exchange's answer without records. The extended error is only for who speaks EDNS (RFC 6891 7).
func (s *server) refused(x *exchange, r *refusal) {
	x.event.Verdict, x.event.Reason, x.event.RCode = r.verdict, r.reason, rcodeName(r.rcode)
	if r.rcode == dns.RcodeBadVers {
		x.event.RCode = "BADVERS" // the number's other name is BADSIG
	}
	out := new(dns.Msg).SetRcode(x.query, r.rcode)
	out.RecursionAvailable = true
	if x.opt != nil {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(udpSize)
		if x.opt.Do() {
			opt.SetDo()
		}
		if r.ede != 0 {
			text := "clawvm: VM " + s.VM + ": " + r.reason
			if r.verdict == Refused {
				text = s.policy.Sentence(shownName(x.event.Name), policy.Verdict{Reason: r.reason, Addable: r.addable})
			}
			opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: r.ede, ExtraText: text})
		}
		out.Extra = append(out.Extra, opt)
	}
	wire, err := out.Pack()
	if err != nil {
		// A name that could be read but can't be written again.
		h := dns.Header{Id: x.query.Id}
		wire = rejection(h, dns.RcodeFormatError)
	}
	x.wire = wire
}

// maxShownName bounds a name in an extended error, which is to fit into a packet beside its question.
const maxShownName = 100

func shownName(name string) string {
	if name == "" || len(name) > maxShownName {
		return "this name"
	}
	return name
}

func typeName(t uint16) string { return dns.Type(t).String() }
