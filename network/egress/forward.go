package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

const (
	hedgeDelay   = 250 * time.Millisecond // without an answer after this the next name server is asked too; doubled each time
	lookupLimit  = 4 * time.Second        // for an answer: before the guest's C library gives up (5 s)
	rounds       = 2                      // how often each name server is asked: a packet may be lost
	maxUpstreams = 4
)

var (
	errNoUpstream = errors.New("the VM has no name servers")
	errNoAnswer   = errors.New("no name server of the VM answered")
)

// A forwarder asks a VM's name servers.
type forwarder struct {
	upstreams []*upstream
	now       func() time.Time
}

func newForwarder(addrs []netip.AddrPort, now func() time.Time) *forwarder {
	f := &forwarder{now: now}
	for _, a := range addrs[:min(len(addrs), maxUpstreams)] {
		f.upstreams = append(f.upstreams, newUpstream(a))
	}
	return f
}

func (f *forwarder) close() {
	for _, u := range f.upstreams {
		u.close()
	}
}

// ask returns the first useful answer: the preferred name server's, or another's when that one is slow, silent or
// unable. Whoever keeps a query waiting is passed over for a while.
func (f *forwarder) ask(q question) (*answer, error) {
	if len(f.upstreams) == 0 {
		return nil, errNoUpstream
	}
	now := f.now()
	order := f.order(now)
	if order[0].healthy() {
		// Name servers that failed are tried beside the query, which needn't wait for them.
		for _, u := range order[1:] {
			if u.probeDue(now) {
				go f.probe(u, q)
			}
		}
	}
	return f.askOf(order, rounds, q)
}

// probe lets a name server's health be learnt.
func (f *forwarder) probe(u *upstream, q question) {
	if _, err := f.askOf([]*upstream{u}, 1, q); err != nil {
		u.failed(f.now(), f.now()) // also when nothing could be sent, so that there is another probe
	}
}

// askOf asks name servers in turn, the next one when one fails or takes long, each so many times.
func (f *forwarder) askOf(order []*upstream, rounds int, q question) (*answer, error) {
	query, err := queryWire(q)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	end := start.Add(lookupLimit)
	results := make(chan result, 2*rounds*len(order)) // an attempt has two at most: over UDP, over TCP
	made := make([]*attempt, 0, 2)
	begin := func() {
		a := &attempt{up: order[len(made)%len(order)], query: append([]byte(nil), query...), results: results, at: f.now(), sent: time.Now()}
		made = append(made, a)
		if err := a.up.send(a); err != nil {
			results <- result{attempt: a, err: err}
		}
	}
	defer func() {
		for _, a := range made {
			if !a.over && a.sock != nil {
				a.sock.forget(a)
			}
		}
	}()
	begin()
	delay := hedgeDelay
	timer := time.NewTimer(delay)
	defer timer.Stop()
	var unable *answer
	pending := 1
	for {
		select {
		case r := <-results:
			if errors.Is(r.err, errTruncated) {
				go r.attempt.up.exchangeTCP(r.attempt, end)
				continue
			}
			pending--
			r.attempt.over = true
			a, err := f.learn(q, r)
			if err == nil && (a.rcode == dns.RcodeSuccess || a.rcode == dns.RcodeNameError) {
				f.blame(made, hedgeDelay)
				return a, nil
			}
			if err == nil {
				unable = a
			}
			switch {
			case len(made) < len(order):
				begin()
				pending++
			case pending > 0:
			case unable != nil:
				return unable, nil
			default:
				return nil, errNoAnswer
			}
		case <-timer.C:
			left := time.Until(end)
			if left <= 0 {
				f.blame(made, 0)
				if unable != nil {
					return unable, nil
				}
				return nil, errNoAnswer
			}
			if len(made) < rounds*len(order) {
				begin()
				pending++
				delay *= 2
				left = min(left, delay)
			}
			timer.Reset(left)
		}
	}
}

// order is the healthy name servers as declared, then the others.
func (f *forwarder) order(now time.Time) []*upstream {
	order := make([]*upstream, 0, len(f.upstreams))
	for _, want := range []bool{true, false} {
		for _, u := range f.upstreams {
			if u.healthy() == want {
				order = append(order, u)
			}
		}
	}
	return order
}

// learn reads an attempt's result and notes what it says about the name server's health.
func (f *forwarder) learn(q question, r result) (*answer, error) {
	u := r.attempt.up
	switch {
	case r.err == nil:
		u.worked() // what it answered is another matter
		return newAnswer(q, r.wire, u.name)
	case !errors.Is(r.err, errConnections) && !errors.Is(r.err, errClosed):
		u.failed(r.attempt.at, f.now())
	}
	return nil, r.err
}

// blame marks those who have kept a query waiting for so long.
func (f *forwarder) blame(made []*attempt, wait time.Duration) {
	for _, a := range made {
		if !a.over && time.Since(a.sent) >= wait {
			a.up.failed(a.at, f.now())
		}
	}
}

// queryWire encodes a question for name servers, with id 0: header, question, OPT record.
func queryWire(q question) ([]byte, error) {
	wire := make([]byte, headerSize+len(q.name)+1+4+optSize)
	end, err := dns.PackDomainName(q.name, wire, headerSize, nil, false)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the query: %w", err)
	}
	flags := uint16(flagRecurse)
	if q.cd {
		flags |= flagUnchecked
	}
	binary.BigEndian.PutUint16(wire[2:], flags)
	wire[5], wire[11] = 1, 1 // one question, one additional record
	wire = binary.BigEndian.AppendUint16(wire[:end], q.qtype)
	wire = binary.BigEndian.AppendUint16(wire, dns.ClassINET)
	return appendOPT(wire, q.do), nil
}

// appendOPT appends an OPT record (RFC 6891 6.1.2) that says which size is welcome, and whether DNSSEC's records are.
func appendOPT(wire []byte, do bool) []byte {
	flags := byte(0)
	if do {
		flags = optDo >> 8
	}
	return append(wire, 0, 0, byte(dns.TypeOPT), udpSize>>8, udpSize&0xff, 0, 0, flags, 0, 0, 0)
}
