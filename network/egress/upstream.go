package egress

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	poolSockets  = 16               // ports that are in turn at least, so that a guess at one is seldom right
	maxSockets   = 256              // of one name server at once: two for each query that may wait
	socketUses   = 32               // queries of one port
	socketAge    = 30 * time.Second // of one port
	maxStray     = 32               // answers to other questions before someone is guessing; then TCP decides
	readSize     = 4096             // more than was asked for: some servers don't look
	firstBackoff = time.Second
	maxBackoff   = 30 * time.Second
)

var (
	errSockets = errors.New("too many queries wait for this name server")
	errClosed  = errors.New("the resolver is ending")
)

// An upstream is one name server: its connected sockets, each with a port that the kernel chose at random, and its health.
type upstream struct {
	addr netip.AddrPort
	name string

	mu     sync.Mutex
	idle   []*socket
	open   map[*socket]bool
	busy   int
	closed bool

	failures int
	failedAt time.Time
	retry    time.Time // when a failed one is tried again
	probing  bool
}

// A socket waits for one answer at a time.
type socket struct {
	net.Conn
	uses int
	made time.Time
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

// exchange sends an encoded query under a random id and returns the answer to it, however it is spelled. Truncated answers
// are asked for again over TCP.
func (u *upstream) exchange(wire []byte, q question, deadline time.Time) (*dns.Msg, error) {
	s, err := u.take()
	if err != nil {
		return nil, err
	}
	m, err := ask(s, wire, q, deadline)
	u.give(s, err == nil)
	if errors.Is(err, errTruncated) {
		return u.exchangeTCP(wire, q, deadline)
	}
	return m, err
}

var errTruncated = errors.New("the answer was truncated")

func ask(s *socket, wire []byte, q question, deadline time.Time) (*dns.Msg, error) {
	buf := make([]byte, readSize)
	query := append(buf[:0], wire...)
	id, err := randomID()
	if err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint16(query, id)
	if err := s.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := s.Write(query); err != nil {
		return nil, err
	}
	for range maxStray {
		n, err := s.Read(buf)
		if err != nil {
			return nil, err
		}
		if n < headerSize || binary.BigEndian.Uint16(buf) != id {
			continue
		}
		if binary.BigEndian.Uint16(buf[2:])&(flagResponse|flagTruncated) == flagResponse|flagTruncated {
			return nil, errTruncated
		}
		m := new(dns.Msg)
		if m.Unpack(buf[:n]) == nil && isAnswer(m, id, q) {
			return m, nil
		}
	}
	return nil, errTruncated
}

func (u *upstream) exchangeTCP(wire []byte, q question, deadline time.Time) (*dns.Msg, error) {
	if err := u.admit(); err != nil {
		return nil, err
	}
	defer u.leave()
	d := net.Dialer{Deadline: deadline}
	c, err := d.Dial("tcp", u.name)
	if err != nil {
		return nil, err
	}
	conn := dns.Conn{Conn: c}
	m, err := askTCP(&conn, wire, q, deadline)
	return m, errors.Join(err, conn.Close())
}

func askTCP(c *dns.Conn, wire []byte, q question, deadline time.Time) (*dns.Msg, error) {
	query := append([]byte(nil), wire...)
	id, err := randomID()
	if err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint16(query, id)
	if err := c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	m, err := c.ReadMsg()
	if err != nil {
		return nil, err
	}
	if !isAnswer(m, id, q) {
		return nil, errors.New("the answer is to another question")
	}
	return m, nil
}

func isAnswer(m *dns.Msg, id uint16, q question) bool {
	return m.Id == id && m.Response && m.Opcode == dns.OpcodeQuery && len(m.Question) == 1 &&
		m.Question[0].Qtype == q.qtype && m.Question[0].Qclass == dns.ClassINET && strings.EqualFold(m.Question[0].Name, q.name)
}

func randomID() (uint16, error) {
	var b [2]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("cannot choose a query id: %w", err)
	}
	return binary.BigEndian.Uint16(b[:]), nil
}

// admit counts one more exchange, or says that there are too many.
func (u *upstream) admit() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.closed:
		return errClosed
	case u.busy >= maxSockets:
		return errSockets
	}
	u.busy++
	return nil
}

func (u *upstream) leave() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.busy--
}

// take returns a socket for one exchange: one of the idle ones by chance, when there are enough of them.
func (u *upstream) take() (*socket, error) {
	if err := u.admit(); err != nil {
		return nil, err
	}
	u.mu.Lock()
	for len(u.open) >= poolSockets && len(u.idle) > 0 {
		i := mathrand.IntN(len(u.idle))
		s := u.idle[i]
		last := len(u.idle) - 1
		u.idle[i], u.idle[last] = u.idle[last], nil
		u.idle = u.idle[:last]
		if s.uses < socketUses && time.Since(s.made) < socketAge {
			u.mu.Unlock()
			return s, nil
		}
		delete(u.open, s)
		s.Close() // nothing was written that it could lose; so below
	}
	u.mu.Unlock()
	c, err := net.Dial("udp", u.name)
	if err != nil {
		u.leave()
		return nil, err
	}
	s := &socket{Conn: c, made: time.Now()}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		u.busy--
		return nil, errors.Join(errClosed, c.Close())
	}
	u.open[s] = true
	return s, nil
}

// give returns a socket; one whose exchange failed may still receive the answer, so it is closed.
func (u *upstream) give(s *socket, worked bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.busy--
	s.uses++
	if worked && !u.closed && s.uses < socketUses && len(u.idle) < 2*poolSockets {
		u.idle = append(u.idle, s)
		return
	}
	if !u.open[s] {
		return // close has closed it
	}
	delete(u.open, s)
	s.Close()
}

// close ends all exchanges: those that wait on a socket return an error.
func (u *upstream) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	u.idle = nil
	for s := range u.open {
		s.Close()
	}
	clear(u.open)
}
