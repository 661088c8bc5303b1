package gate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// publisher holds the published ports, which change while the gate runs.
type publisher struct {
	guest netip.Addr

	mu    sync.Mutex
	ports map[string]*publishedPort // by where the host listens
	all   sync.WaitGroup
	ended chan error // the first that could not go on
}

type publishedPort struct {
	listener net.Listener
	end      context.CancelFunc

	mu     sync.Mutex
	target uint16
}

func newPublisher(guest netip.Addr) *publisher {
	return &publisher{guest: guest, ports: make(map[string]*publishedPort), ended: make(chan error, 1)}
}

// publish carries what arrives at the socket file to the guest's port. The port
// belongs to the publisher then, and f is closed. Without f, a port that is published
// already is carried elsewhere from the next connection on.
func (p *publisher) publish(ctx context.Context, to Forward, f *os.File) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f == nil {
		port := p.ports[to.Host]
		if port == nil {
			return fmt.Errorf("port %s is not published", to.Host)
		}
		port.mu.Lock()
		port.target = to.Guest
		port.mu.Unlock()
		return nil
	}
	l, err := net.FileListener(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cannot listen on port %s: %w", to.Host, err)
	}
	if p.ports[to.Host] != nil {
		return errors.Join(fmt.Errorf("port %s is published already", to.Host), l.Close())
	}
	ctx, cancel := context.WithCancel(ctx)
	port := &publishedPort{listener: l, end: cancel, target: to.Guest}
	p.ports[to.Host] = port
	p.all.Go(func() {
		err := port.forward(ctx, p.guest)
		if err == nil || ctx.Err() != nil {
			return
		}
		select {
		case p.ended <- fmt.Errorf("port %s: %w", to.Host, err):
		default:
		}
	})
	return nil
}

// unpublish ends a port, and the connections that go through it.
func (p *publisher) unpublish(host string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if port := p.ports[host]; port != nil {
		port.end()
		delete(p.ports, host)
	}
}

// run publishes the configuration's ports, and waits for the end.
func (g *gate) publishAll(ctx context.Context) error {
	for i, to := range g.Ports {
		if err := g.publisher.publish(ctx, to, g.files[FilePort(i)]); err != nil {
			return err
		}
	}
	defer g.publisher.all.Wait()
	select {
	case err := <-g.publisher.ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

// ConnectsAnywhere says whether a gate of this kernel can be told of ports of its
// guest that it did not know when it started: Landlock's rules for connections
// (fourth ABI, Linux 6.7) can't be widened.
func ConnectsAnywhere() bool {
	abi, err := syscall.LandlockGetABIVersion()
	return err != nil || abi < 4
}
