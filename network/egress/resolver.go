package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
)

// What one guest may have of its resolver.
const (
	maxWaiting   = 128              // queries that wait for a name server; more are answered SERVFAIL at once
	maxTCP       = 32               // connections; more wait in the listener's backlog
	tcpIdle      = 10 * time.Second // RFC 7766 6.2.3: of the order of seconds
	tcpFirst     = 2 * time.Second  // for the first query of a connection
	tcpWrite     = 2 * time.Second  // a guest that doesn't read loses its connection
	tcpQueries   = 128              // of one connection
	udpSize      = 1232             // DNS flag day 2020: what needs no fragments; of queries and answers
	maxQuerySize = 1500             // one frame of the bridge
	stopLimit    = time.Second      // for queries under way when Serve ends
	acceptPause  = 50 * time.Millisecond
)

// A Resolver answers one VM's DNS queries by asking its name servers. Set the fields before Serve and leave them alone then.
type Resolver struct {
	VM        string
	Guest     netip.Addr       // who may ask; the zero Addr: whoever reaches the sockets
	Upstreams []netip.AddrPort // in order of preference; one that fails is passed over until it answers again
	Policy    Policy           // nil: Open
	Names     *Names           // is told which names led to which addresses; may be nil
	Log       func(Event)      // gets one event for each query; called from many goroutines; must not block
}

// Serve answers on both sockets until ctx ends, then closes them and returns nil; or returns the error that ended it. It needs no
// privilege. IPv6 addresses are answered empty: a guest has no IPv6.
func (r *Resolver) Serve(ctx context.Context, udp net.PacketConn, tcp net.Listener) error {
	return newServer(r, time.Now).serve(ctx, udp, tcp)
}

// A server is a Resolver at work.
type server struct {
	*Resolver
	policy  Policy
	now     func() time.Time // for what ages: cache and the health of name servers
	cache   *cache
	forward *forwarder
	flights singleflight.Group
	waiting atomic.Int64
}

func newServer(r *Resolver, now func() time.Time) *server {
	s := &server{Resolver: r, policy: r.Policy, now: now, cache: newCache(cacheEntries, cacheBytes), forward: newForwarder(r.Upstreams, now)}
	if s.policy == nil {
		s.policy = Open{}
	}
	return s
}

func (s *server) serve(ctx context.Context, udp net.PacketConn, tcp net.Listener) error {
	handler := dns.HandlerFunc(s.handle)
	servers := []*dns.Server{
		{PacketConn: udp, UDPSize: maxQuerySize},
		{
			Listener:      netutil.LimitListener(deadlineListener{tcp}, maxTCP),
			ReadTimeout:   tcpFirst,
			IdleTimeout:   func() time.Duration { return tcpIdle },
			MaxTCPQueries: tcpQueries,
		},
	}
	defer s.forward.close()
	group, ctx := errgroup.WithContext(ctx)
	for i, d := range servers {
		d.Handler = handler
		proto := []string{"udp", "tcp"}[i]
		d.MsgAcceptFunc = func(h dns.Header) dns.MsgAcceptAction { return s.accept(h, proto) }
		d.MsgInvalidFunc = func(_ []byte, err error) { s.malformed(proto, err) }
		started := make(chan struct{})
		d.NotifyStartedFunc = sync.OnceFunc(func() { close(started) })
		group.Go(func() error {
			if err := d.ActivateAndServe(); err != nil {
				return fmt.Errorf("cannot answer DNS queries over %s: %w", proto, err)
			}
			return nil
		})
		group.Go(func() error {
			<-ctx.Done()
			select {
			case <-started:
			case <-time.After(stopLimit):
				return nil // its ActivateAndServe failed and says why
			}
			s.forward.close() // ends the waiting of queries under way
			limit, cancel := context.WithTimeout(context.Background(), stopLimit)
			defer cancel()
			if err := d.ShutdownContext(limit); err != nil && !errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("cannot end the resolver: %w", err)
			}
			return nil // the group waits for the last connections, whose writes have a limit
		})
	}
	return group.Wait()
}

// accept looks at a message's header before anything else of it is parsed. What it lets pass has one question and at most
// two additional records, so that parsing is cheap.
func (s *server) accept(h dns.Header, proto string) dns.MsgAcceptAction {
	const response = 1 << 15
	opcode := int(h.Bits>>11) & 0xf
	reason := ""
	action := dns.MsgReject
	switch {
	case h.Bits&response != 0:
		return dns.MsgIgnore // answering answers can go round in circles
	case opcode != dns.OpcodeQuery:
		reason, action = "not a query", dns.MsgRejectNotImplemented
	case h.Qdcount != 1:
		reason = "not one question"
	case h.Ancount != 0 || h.Nscount != 0 || h.Arcount > 2:
		reason = "a query with answers"
	default:
		return dns.MsgAccept
	}
	rcode := dns.RcodeFormatError
	if action == dns.MsgRejectNotImplemented {
		rcode = dns.RcodeNotImplemented
	}
	s.log(Event{Time: time.Now(), Proto: proto, Verdict: Refused, Reason: reason, RCode: rcodeName(rcode)})
	return action
}

func (s *server) malformed(proto string, err error) {
	reason := "malformed message"
	if errors.Is(err, dns.ErrShortRead) {
		reason = "malformed message: too short"
	}
	s.log(Event{Time: time.Now(), Proto: proto, Verdict: Refused, Reason: reason, RCode: rcodeName(dns.RcodeFormatError)})
}

func (s *server) log(e Event) {
	if s.Log != nil {
		e.VM, e.Kind = s.VM, KindQuery
		s.Log(e)
	}
}

func rcodeName(rcode int) string {
	if name, ok := dns.RcodeToString[rcode]; ok {
		return name
	}
	return fmt.Sprintf("RCODE%d", rcode)
}

// deadlineListener gives each connection's writes a limit, which the server has none for, and doesn't spin when the
// process is out of descriptors, which the server would.
type deadlineListener struct{ net.Listener }

func (l deadlineListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		if !errors.Is(err, net.ErrClosed) {
			pause := time.NewTimer(acceptPause)
			<-pause.C
		}
		return nil, err
	}
	return deadlineConn{c}, nil
}

type deadlineConn struct{ net.Conn }

func (c deadlineConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(tcpWrite)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}
