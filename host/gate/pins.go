package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"time"
)

// pinning asks the supervisor to let the VM reach addresses. It has a connection of
// its own: a guest's query doesn't wait behind what else is said.
type pinning struct {
	conn *Conn

	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan error
}

func newPinning(conn *Conn) *pinning {
	return &pinning{conn: conn, waiting: map[uint64]chan error{}}
}

// pinLimit is how long a supervisor may take: a millisecond as a rule, some hundred
// with a guest that asks for more than it may.
const pinLimit = 3 * time.Second

// pin returns when the VM can reach the addresses.
func (p *pinning) pin(name string, addrs []netip.Addr, keep time.Duration) error {
	done := make(chan error, 1)
	p.mu.Lock()
	p.last++
	id := p.last
	p.waiting[id] = done
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.waiting, id)
		p.mu.Unlock()
	}()
	request := &PinRequest{ID: id, Name: name, Addresses: addrs, Seconds: int((keep + time.Second - 1) / time.Second)}
	if err := p.conn.Send(Message{Kind: Pin, Pin: request}); err != nil {
		return err
	}
	limit := time.NewTimer(pinLimit)
	defer limit.Stop()
	select {
	case err := <-done:
		return err
	case <-limit.C:
		return fmt.Errorf("no answer from the supervisor within %s", pinLimit)
	}
}

// run hands the supervisor's answers to those who wait for them, until it hangs up.
func (p *pinning) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { p.conn.Close() })
	defer stop()
	for {
		m, err := p.conn.Receive()
		if errors.Is(err, io.EOF) {
			<-ctx.Done() // with the supervisor the gate ends anyway, and obey sees that
			return nil
		}
		if err != nil {
			return err
		}
		if m.Kind != Pinned || m.Pin == nil {
			return fmt.Errorf("a message of kind %q is no answer about addresses", m.Kind)
		}
		err = nil
		if m.Detail != "" {
			err = errors.New(m.Detail)
		}
		p.mu.Lock()
		done := p.waiting[m.Pin.ID]
		delete(p.waiting, m.Pin.ID)
		p.mu.Unlock()
		if done != nil {
			done <- err
		}
	}
}
