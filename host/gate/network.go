package gate

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/clawvm/clawvm/network/egress"
)

// resolver answers the guest's queries.
func (g *gate) resolver(ctx context.Context) error {
	udp, err := net.FilePacketConn(g.files[FileDNSPacket])
	if err != nil {
		return fmt.Errorf("cannot use the resolver's descriptor: %w", err)
	}
	tcp, err := g.listener(FileDNSStream)
	if err != nil {
		return errors.Join(err, udp.Close())
	}
	r := egress.Resolver{
		VM: g.VM, Guest: g.Address, Upstreams: g.Upstreams, Names: &g.names, Log: g.events.Write,
	}
	if g.RefuseNames {
		r.Policy = egress.None{}
	}
	return r.Serve(ctx, udp, tcp)
}

// flows logs the guest's connections.
func (g *gate) flows(ctx context.Context) error {
	f := egress.Flows{VM: g.VM, Address: g.Address, Resolver: g.Resolver, Names: &g.names, Log: g.events.Write}
	return f.Watch(ctx, g.files[FileFlows], g.files[FileConntrack])
}
