package egress

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	poolSockets    = 16               // ports in use at once, one of them by chance for each query
	socketUses     = 64               // queries of one port
	socketAge      = 30 * time.Second // of one port
	maxStray       = 32               // answers that nobody waits for, on one port, before it counts as guessing; then TCP decides
	maxUpstreamTCP = 64               // connections to one name server
	readSize       = 4096             // more than was asked for: some servers don't look
	firstBackoff   = time.Second
	maxBackoff     = 30 * time.Second
)

var (
	errConnections = errors.New("too many connections to this name server")
	errClosed      = errors.New("the resolver is ending")
	errTruncated   = errors.New("the answer was truncated")
)

// An upstream is one name server: connected sockets, each with a port that the kernel chose at random, and its health.
type upstream struct {
	addr netip.AddrPort
	name string
	tcp  chan struct{} // one for each connection

	mu      sync.Mutex
	sockets [poolSockets]*socket
	retired map[*socket]bool // no longer in the pool, but waited on
	closed  bool

	failures int
	failedAt time.Time
	retry    time.Time // when a failed one is tried again
	probing  bool
}

// An attempt is a query put to one name server.
type attempt struct {
	up      *upstream
	sock    *socket
	id      uint16
	query   []byte
	results chan<- result // never full
	at      time.Time     // when it was sent, by the forwarder's clock
	sent    time.Time
	over    bool
}

// A result is what an attempt came to: an encoded answer to its question, or an error.
type result struct {
	attempt *attempt
	wire    []byte
	err     error
}

// A socket is one port of ours.
type socket struct {
	net.Conn
	up   *upstream
	made time.Time

	mu      sync.Mutex
	waiting map[uint16]*attempt
	uses    int
	stray   int
	done    bool // takes no more queries; closed when nobody waits
}

func newUpstream(addr netip.AddrPort) *upstream {
	return &upstream{addr: addr, name: addr.String(), tcp: make(chan struct{}, maxUpstreamTCP), retired: map[*socket]bool{}}
}

func (u *upstream) healthy() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.failures == 0
}

func (u *upstream) probeDue(now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.failures == 0 || u.probing || now.Before(u.retry) {
		return false
	}
	u.probing = true
	return true
}

func (u *upstream) worked() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.failures, u.probing = 0, false
}

// failed notes that a query sent at a time got no answer. Queries that were under way at the last failure tell nothing new.
func (u *upstream) failed(sent, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.probing = false
	if u.failures > 0 && sent.Before(u.failedAt) {
		return
	}
	u.retry = now.Add(min(firstBackoff<<min(u.failures, 10), maxBackoff))
	u.failures++
	u.failedAt = now
}

// send puts a query, under a random id, to the name server. Its result comes later, unless it is forgotten before.
func (u *upstream) send(a *attempt) error {
	for {
		s, err := u.socket()
		if err != nil {
			return err
		}
		ok, err := s.register(a)
		if err != nil {
			return err
		}
		if !ok {
			continue // it was used up meanwhile
		}
		if _, err := s.Write(a.query); err != nil {
			s.forget(a)
			s.retire(err)
			return err
		}
		return nil
	}
}

// socket returns one of the pool's, by chance, and a new one in its place when it has been used enough.
func (u *upstream) socket() (*socket, error) {
	slot := mathrand.IntN(poolSockets)
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil, errClosed
	}
	s := u.sockets[slot]
	if s != nil && !s.usedUp() {
		return s, nil
	}
	c, err := net.Dial("udp", u.name) // connects without a packet
	if err != nil {
		return nil, err
	}
	fresh := &socket{Conn: c, up: u, made: time.Now(), waiting: map[uint16]*attempt{}}
	if err := c.SetReadDeadline(fresh.made.Add(socketAge)); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if s != nil {
		u.retired[s] = true
		go s.retire(nil)
	}
	u.sockets[slot] = fresh
	go fresh.read()
	return fresh, nil
}

func (s *socket) usedUp() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done || s.uses >= socketUses || time.Since(s.made) >= socketAge
}

// register chooses the attempt's id and makes the socket wait for it; false when the socket takes no more.
func (s *socket) register(a *attempt) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return false, nil
	}
	for {
		id, err := randomID()
		if err != nil {
			return false, err
		}
		if s.waiting[id] != nil {
			continue
		}
		a.id, a.sock = id, s
		binary.BigEndian.PutUint16(a.query, id)
		s.waiting[id] = a
		s.uses++
		return true, nil
	}
}

// forget makes the socket no longer wait for an attempt.
func (s *socket) forget(a *attempt) {
	s.mu.Lock()
	if s.waiting[a.id] == a {
		delete(s.waiting, a.id)
	}
	end := s.done && len(s.waiting) == 0
	s.mu.Unlock()
	if end {
		s.end()
	}
}

// retire takes the socket out of use: at once with an error, which all who wait get, else when nobody waits any more.
func (s *socket) retire(err error) {
	s.mu.Lock()
	s.done = true
	if err != nil {
		for _, a := range s.waiting {
			a.results <- result{attempt: a, err: err}
		}
		clear(s.waiting)
	}
	end := len(s.waiting) == 0
	s.mu.Unlock()
	if end {
		s.end()
	}
}

// end closes the socket; its reader ends with it.
func (s *socket) end() {
	s.up.mu.Lock()
	defer s.up.mu.Unlock()
	for i, other := range s.up.sockets {
		if other == s {
			s.up.sockets[i] = nil
		}
	}
	delete(s.up.retired, s)
	s.Close() // nothing was written that closing could lose
}

// read hands answers to those who wait for them.
func (s *socket) read() {
	buf := make([]byte, readSize)
	for {
		n, err := s.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			// Its age. Who still waits is told when the lookup's own limit ends.
			s.retire(nil)
			if err := s.SetReadDeadline(time.Now().Add(lookupLimit)); err != nil {
				return
			}
			continue
		case err != nil:
			s.retire(err)
			return
		}
		if a := s.take(buf[:n]); a != nil {
			r := result{attempt: a}
			if binary.BigEndian.Uint16(buf[2:])&flagTruncated != 0 {
				r.err = errTruncated
			} else {
				r.wire = append([]byte(nil), buf[:n]...)
			}
			a.results <- r
		} else if s.guessed() {
			s.retire(errTruncated)
		}
	}
}

// take returns the attempt that a packet answers, and ends its waiting; nil when it answers none.
func (s *socket) take(wire []byte) *attempt {
	if len(wire) < headerSize {
		return nil
	}
	s.mu.Lock()
	a := s.waiting[binary.BigEndian.Uint16(wire)]
	s.mu.Unlock()
	if a == nil || !answers(wire, a.query) {
		return nil
	}
	s.forget(a)
	return a
}

func (s *socket) guessed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stray++
	return s.stray >= maxStray
}

// answers tells whether a message is a response with the query's id and question, however the name is spelled.
func answers(wire, query []byte) bool {
	question := query[headerSize : len(query)-optSize]
	if len(wire) < headerSize+len(question) || wire[0] != query[0] || wire[1] != query[1] ||
		wire[2]&0xf8 != flagResponse>>8 || binary.BigEndian.Uint16(wire[4:]) != 1 { // flags: a response, opcode 0
		return false
	}
	for i, c := range question[:len(question)-4] {
		// A length is never a letter: it is 63 at most.
		if got := wire[headerSize+i]; got != c && (got|0x20 != c|0x20 || c|0x20 < 'a' || c|0x20 > 'z') {
			return false
		}
	}
	end := headerSize + len(question)
	return string(wire[end-4:end]) == string(question[len(question)-4:])
}

// exchangeTCP puts an attempt's query over a connection of its own.
func (u *upstream) exchangeTCP(a *attempt, deadline time.Time) {
	select {
	case u.tcp <- struct{}{}:
		defer func() { <-u.tcp }()
	default:
		a.results <- result{attempt: a, err: errConnections}
		return
	}
	d := net.Dialer{Deadline: deadline}
	c, err := d.Dial("tcp", u.name)
	if err != nil {
		a.results <- result{attempt: a, err: err}
		return
	}
	wire, err := askTCP(&dns.Conn{Conn: c}, a.query, deadline)
	a.results <- result{attempt: a, wire: wire, err: errors.Join(err, c.Close())}
}

func askTCP(c *dns.Conn, query []byte, deadline time.Time) ([]byte, error) {
	id, err := randomID()
	if err != nil {
		return nil, err
	}
	query = append([]byte(nil), query...)
	binary.BigEndian.PutUint16(query, id)
	if err := c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	wire, err := c.ReadMsgHeader(nil)
	if err != nil {
		return nil, err
	}
	if !answers(wire, query) {
		return nil, errors.New("the answer is to another question")
	}
	return wire, nil
}

func randomID() (uint16, error) {
	var b [2]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("cannot choose a query id: %w", err)
	}
	return binary.BigEndian.Uint16(b[:]), nil
}

// close ends everything; who waits gets an error.
func (u *upstream) close() {
	u.mu.Lock()
	u.closed = true
	var all []*socket
	for _, s := range u.sockets {
		if s != nil {
			all = append(all, s)
		}
	}
	for s := range u.retired {
		all = append(all, s)
	}
	u.mu.Unlock()
	for _, s := range all {
		s.retire(errClosed)
	}
}
