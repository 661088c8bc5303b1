package gate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/clawvm/clawvm/network/egress"
)

// naming is a Naming that changes.
type naming struct {
	mu sync.Mutex
	Naming
	changed chan struct{} // holds a token when there is another
}

func (n *naming) get() Naming {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.Naming
}

func (n *naming) set(to Naming) {
	n.mu.Lock()
	n.Naming = to
	n.mu.Unlock()
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

// resolver answers the guest's queries, and begins anew when it is to answer
// otherwise. The gate keeps the sockets open meanwhile: queries that arrive wait in
// them.
func (g *gate) resolver(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := g.resolveUntilChanged(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (g *gate) resolveUntilChanged(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	udp, err := net.FilePacketConn(g.files[FileDNSPacket])
	if err != nil {
		return fmt.Errorf("cannot use the resolver's descriptor: %w", err)
	}
	tcp, err := g.listener(FileDNSStream)
	if err != nil {
		return errors.Join(err, udp.Close())
	}
	go func() {
		select {
		case <-g.naming.changed:
			cancel()
		case <-ctx.Done():
		}
	}()
	how := g.naming.get()
	r := egress.Resolver{VM: g.VM, Guest: g.Address, Upstreams: how.Upstreams, Names: &g.names, Log: g.events.Write}
	if how.RefuseNames {
		r.Policy = egress.None{}
	}
	return r.Serve(ctx, udp, tcp)
}

// flows logs the guest's connections.
func (g *gate) flows(ctx context.Context) error {
	f := egress.Flows{VM: g.VM, Address: g.Address, Resolver: g.Resolver, Names: &g.names, Log: g.events.Write}
	return f.Watch(ctx, g.files[FileFlows], g.files[FileConntrack])
}
