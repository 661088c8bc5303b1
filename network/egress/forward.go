package egress

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

const (
	hedgeDelay   = 250 * time.Millisecond // without an answer after this the next name server is asked too; doubled each time
	attemptLimit = 2 * time.Second        // for one name server's answer
	lookupLimit  = 4 * time.Second        // for an answer at all: before the guest's C library gives up (5 s)
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
		f.upstreams = append(f.upstreams, &upstream{addr: a, name: a.String(), open: map[*socket]bool{}})
	}
	return f
}

func (f *forwarder) close() {
	for _, u := range f.upstreams {
		u.close()
	}
}

// An attempt is a question put to one name server.
type attempt struct {
	up    *upstream
	at    time.Time // by the forwarder's clock
	start time.Time
	over  bool
	msg   *dns.Msg
	err   error
}

// ask returns the first useful answer: the preferred name server's, or another's when that one is slow, silent or
// unable. Whoever keeps a query waiting is passed over for a while.
func (f *forwarder) ask(q question) (*answer, error) {
	if len(f.upstreams) == 0 {
		return nil, errNoUpstream
	}
	wire, err := queryWire(q)
	if err != nil {
		return nil, err
	}
	now := f.now()
	order := f.order(now)
	if order[0].healthy() {
		// Names servers that failed are tried beside the query, which needn't wait for them.
		for _, u := range order[1:] {
			if u.probeDue(now) {
				go f.attempt(u, wire, q, time.Now().Add(attemptLimit), nil)
			}
		}
	}
	end := time.Now().Add(lookupLimit)
	results := make(chan *attempt, rounds*len(order))
	var made []*attempt
	begin := func() {
		u := order[len(made)%len(order)]
		a := &attempt{up: u, at: f.now(), start: time.Now()}
		made = append(made, a)
		deadline := a.start.Add(attemptLimit)
		if deadline.After(end) {
			deadline = end
		}
		go f.attempt(u, wire, q, deadline, func(m *dns.Msg, err error) {
			results <- &attempt{up: u, start: a.start, msg: m, err: err}
		})
	}
	begin()
	delay := hedgeDelay
	hedge := time.NewTimer(delay)
	defer hedge.Stop()
	var unable *answer
	pending := 1
	for {
		select {
		case r := <-results:
			pending--
			for _, a := range made {
				a.over = a.over || (a.up == r.up && a.start.Equal(r.start))
			}
			if r.err == nil {
				a, err := newAnswer(q, r.msg, r.up.name)
				if err == nil && (a.rcode == dns.RcodeSuccess || a.rcode == dns.RcodeNameError) {
					f.blame(made)
					return a, nil
				}
				if err == nil {
					unable = a
				}
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
		case <-hedge.C:
			if len(made) < rounds*len(order) && time.Now().Before(end) {
				begin()
				pending++
				delay *= 2
				hedge.Reset(delay)
			}
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

// blame marks those who have kept a query waiting that another answered meanwhile. An answer that still comes clears them.
func (f *forwarder) blame(made []*attempt) {
	for _, a := range made {
		if !a.over && time.Since(a.start) >= hedgeDelay {
			a.up.failed(a.at, f.now())
		}
	}
}

// attempt asks one name server and learns from it.
func (f *forwarder) attempt(u *upstream, wire []byte, q question, deadline time.Time, done func(*dns.Msg, error)) {
	at := f.now()
	m, err := u.exchange(wire, q, deadline)
	switch {
	case err == nil:
		u.worked()
	case !errors.Is(err, errSockets) && !errors.Is(err, errClosed):
		u.failed(at, f.now())
	}
	if done != nil {
		done(m, err)
	}
}

// queryWire encodes a question for name servers, with id 0.
func queryWire(q question) ([]byte, error) {
	m := dns.Msg{
		MsgHdr:   dns.MsgHdr{RecursionDesired: true, CheckingDisabled: q.cd},
		Question: []dns.Question{{Name: q.name, Qtype: q.qtype, Qclass: dns.ClassINET}},
	}
	m.SetEdns0(udpSize, q.do)
	wire, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("cannot encode the query: %w", err)
	}
	return wire, nil
}
