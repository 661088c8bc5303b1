package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

const (
	forwardMax  = 512             // connections of one published port at a time
	dialTimeout = 5 * time.Second // the guest is one hop away
)

// forward accepts on a published port and carries each connection to the guest's
// address, where the program sees the bridge's address as its client and not
// its own loopback: "local" stays what is inside the guest.
func (p *publishedPort) forward(ctx context.Context, guest netip.Addr) error {
	l := p.listener
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	slots := make(chan struct{}, forwardMax)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("cannot accept: %w", err)
		case err != nil: // out of descriptors for a moment, or the peer is gone
			<-slots
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		p.mu.Lock()
		target := netip.AddrPortFrom(guest, p.target).String()
		p.mu.Unlock()
		go func() {
			defer func() { <-slots }()
			splice(ctx, conn, target)
		}()
	}
}

// acceptPause is how long to wait when accepting fails, so that it does not spin.
const acceptPause = 50 * time.Millisecond

// splice connects client to target and copies both ways until both are done.
// What goes wrong is the client's to notice: its connection ends.
func splice(ctx context.Context, client net.Conn, target string) {
	defer client.Close()
	d := net.Dialer{Timeout: dialTimeout}
	server, err := d.DialContext(ctx, "tcp", target)
	if err != nil {
		// A reset says "refused", where an orderly end would say "empty answer".
		if tcp, ok := client.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		return
	}
	defer server.Close()
	stop := context.AfterFunc(ctx, func() { client.Close(); server.Close() })
	defer stop()
	done := make(chan struct{}, 2)
	half := func(to, from net.Conn) {
		io.Copy(to, from)
		if tcp, ok := to.(*net.TCPConn); ok {
			tcp.CloseWrite()
		}
		done <- struct{}{}
	}
	go half(server, client)
	go half(client, server)
	<-done
	<-done
}
