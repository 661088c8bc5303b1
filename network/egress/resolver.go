package egress

import (
	"context"
	"encoding/binary"
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

	"github.com/clawvm/clawvm/network/egress/policy"
)

// What one guest may have of its resolver.
const (
	maxWaiting   = 256              // queries that wait for a name server; more are answered SERVFAIL at once
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
	Policy    *policy.Policy   // nil: open
	// Pin lets the VM reach the addresses of an allowed name for so long. It is called before they are answered, with a policy that is
	// an allowlist; its error refuses the answer. It may be called by many at once, and may be nil.
	Pin   func(name string, addrs []netip.Addr, keep time.Duration) error
	Names *Names      // is told which names led to which addresses; may be nil
	Log   func(Event) // gets one event for each query; called from many goroutines; must not block
}

// Serve answers on both sockets until ctx ends, then closes them and returns nil; or returns the error that ended it. It needs no
// privilege. IPv6 addresses are answered empty: a guest has no IPv6.
func (r *Resolver) Serve(ctx context.Context, udp net.PacketConn, tcp net.Listener) error {
	return newServer(r, time.Now).serve(ctx, udp, tcp)
}

// A server is a Resolver at work.
type server struct {
	*Resolver
	policy  *policy.Policy
	now     func() time.Time // for what ages: cache and the health of name servers
	cache   *cache
	forward *forwarder
	flights singleflight.Group
	waiting atomic.Int64
}

func newServer(r *Resolver, now func() time.Time) *server {
	s := &server{Resolver: r, policy: r.Policy, now: now, cache: newCache(cacheEntries, cacheBytes), forward: newForwarder(r.Upstreams, now)}
	if s.policy == nil {
		s.policy = policy.New(policy.Spec{VM: r.VM, Mode: policy.Open})
	}
	return s
}

func (s *server) serve(ctx context.Context, packets net.PacketConn, tcp net.Listener) error {
	udp, ok := packets.(*net.UDPConn)
	if !ok {
		return fmt.Errorf("cannot answer DNS queries: %T is no UDP socket", packets)
	}
	defer s.forward.close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := s.serveUDP(ctx, udp); err != nil {
			return fmt.Errorf("cannot answer DNS queries over UDP: %w", err)
		}
		return nil
	})
	started := make(chan struct{})
	d := &dns.Server{
		Listener:          netutil.LimitListener(deadlineListener{tcp}, maxTCP),
		ReadTimeout:       tcpFirst,
		IdleTimeout:       func() time.Duration { return tcpIdle },
		MaxTCPQueries:     tcpQueries,
		Handler:           dns.HandlerFunc(s.handleTCP),
		MsgAcceptFunc:     s.acceptTCP,
		MsgInvalidFunc:    func([]byte, error) { s.logRejected("tcp", &malformed) },
		NotifyStartedFunc: func() { close(started) },
	}
	group.Go(func() error {
		if err := d.ActivateAndServe(); err != nil {
			return fmt.Errorf("cannot answer DNS queries over TCP: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		s.forward.close() // ends the waiting of queries under way
		select {
		case <-started:
		case <-time.After(stopLimit):
			return nil // it failed, and says why
		}
		limit, cancel := context.WithTimeout(context.Background(), stopLimit)
		defer cancel()
		if err := d.ShutdownContext(limit); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("cannot end the resolver: %w", err)
		}
		return nil // the group waits for the last connections, whose writes have a limit
	})
	return group.Wait()
}

// serveUDP answers at once what needs no name server, and each other query in a goroutine of its own; lookup bounds how many.
// (The library's server starts one for every packet, and costs twice as much.)
func (s *server) serveUDP(ctx context.Context, udp *net.UDPConn) error {
	var waiting sync.WaitGroup
	stop := context.AfterFunc(ctx, func() {
		// It ends the read below; what waits may still be sent.
		if err := udp.SetReadDeadline(time.Unix(1, 0)); err != nil {
			return
		}
	})
	defer stop()
	defer func() {
		waiting.Wait()
		udp.Close() // nothing more is sent
	}()
	buf := make([]byte, maxQuerySize)
	for {
		n, from, err := udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		start := time.Now()
		if n < headerSize {
			s.logRejected("udp", &malformed)
			continue
		}
		h := header(buf)
		if isResponse(h) {
			continue
		}
		m := new(dns.Msg)
		rejected := reject(h)
		if rejected == nil && (m.Unpack(buf[:n]) != nil || len(m.Question) != 1) {
			rejected = &malformed // the library takes a message that ends before the question that it counts
		}
		if rejected != nil {
			s.logRejected("udp", rejected)
			if _, err := udp.WriteToUDPAddrPort(rejection(h, rejected.rcode), from); err != nil {
				s.logRejected("udp", &unsent)
			}
			continue
		}
		x := s.begin(m, from.Addr().Unmap(), true, start)
		send := func(wire []byte) error {
			_, err := udp.WriteToUDPAddrPort(wire, from)
			return err
		}
		if x.wire != nil {
			s.end(x, send)
			continue
		}
		waiting.Go(func() {
			s.lookUp(x)
			s.end(x, send)
		})
	}
}

// handleTCP answers a query over TCP, whose connections are bounded.
func (s *server) handleTCP(w dns.ResponseWriter, m *dns.Msg) {
	if len(m.Question) != 1 {
		s.logRejected("tcp", &malformed)
		if _, err := w.Write(rejection(dns.Header{Id: m.Id}, malformed.rcode)); err != nil {
			s.logRejected("tcp", &unsent)
		}
		return
	}
	var from netip.Addr
	if a, ok := w.RemoteAddr().(*net.TCPAddr); ok {
		from = a.AddrPort().Addr().Unmap()
	}
	x := s.begin(m, from, false, time.Now())
	if x.wire == nil {
		s.lookUp(x)
	}
	s.end(x, func(wire []byte) error {
		_, err := w.Write(wire)
		return err
	})
}

func (s *server) acceptTCP(h dns.Header) dns.MsgAcceptAction {
	if isResponse(h) {
		return dns.MsgIgnore
	}
	r := reject(h)
	if r == nil {
		return dns.MsgAccept
	}
	s.logRejected("tcp", r)
	if r.rcode == dns.RcodeNotImplemented {
		return dns.MsgRejectNotImplemented
	}
	return dns.MsgReject
}

func header(b []byte) dns.Header {
	at := func(i int) uint16 { return binary.BigEndian.Uint16(b[i:]) }
	return dns.Header{Id: at(0), Bits: at(2), Qdcount: at(4), Ancount: at(6), Nscount: at(8), Arcount: at(10)}
}

// isResponse: those are never answered, lest answers go round in circles.
func isResponse(h dns.Header) bool { return h.Bits&flagResponse != 0 }

// reject looks at a query's header before anything else of it is parsed. What it lets pass has one question and at most
// two additional records, so that parsing is cheap.
func reject(h dns.Header) *refusal {
	switch {
	case int(h.Bits>>11)&0xf != dns.OpcodeQuery:
		return &notQuery
	case h.Qdcount != 1:
		return &notOne
	case h.Ancount != 0 || h.Nscount != 0 || h.Arcount > 2:
		return &withAnswers
	}
	return nil
}

// rejection is an answer that is a header alone.
func rejection(h dns.Header, rcode int) []byte {
	const kept = 0xf<<11 | flagRecurse // opcode
	out := binary.BigEndian.AppendUint16(make([]byte, 0, headerSize), h.Id)
	out = binary.BigEndian.AppendUint16(out, h.Bits&kept|flagResponse|flagRecursive|uint16(rcode))
	return out[:headerSize]
}

func (s *server) logRejected(proto string, r *refusal) {
	s.log(Event{Time: time.Now(), Proto: proto, Verdict: Refused, Reason: r.reason, RCode: rcodeName(r.rcode)})
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
