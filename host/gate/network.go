package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/clawvm/clawvm/network/egress"
	"github.com/clawvm/clawvm/network/egress/policy"
)

// naming is a Naming that changes.
type naming struct {
	mu sync.Mutex
	Naming
	policy  *policy.Policy
	changed chan struct{} // holds a token when there is another
}

func newNaming(n Naming) *naming {
	return &naming{Naming: n, policy: policy.New(n.Policy), changed: make(chan struct{}, 1)}
}

func (n *naming) get() (Naming, *policy.Policy) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.Naming, n.policy
}

func (n *naming) set(to Naming) {
	n.mu.Lock()
	n.Naming, n.policy = to, policy.New(to.Policy)
	n.mu.Unlock()
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

// maxNaming bounds what a supervisor tells of names: 10,000 entries have 2 MB.
const maxNaming = 16 << 20

// readNaming reads the Naming that comes with a message.
func readNaming(f *os.File) (Naming, error) {
	var n Naming
	if f == nil {
		return n, errors.New("a message about names came without its file")
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxNaming))
	if err == nil {
		err = json.Unmarshal(raw, &n)
	}
	if err != nil {
		return n, fmt.Errorf("cannot read how names are answered: %w", err)
	}
	return n, nil
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
	how, allowed := g.naming.get()
	r := egress.Resolver{
		VM: g.VM, Guest: g.Address, Upstreams: how.Upstreams, Policy: allowed, Pin: g.pins.pin, Names: &g.names, Log: g.events.Write,
	}
	return r.Serve(ctx, udp, tcp)
}

// flows logs the guest's connections.
func (g *gate) flows(ctx context.Context) error {
	f := egress.Flows{VM: g.VM, Address: g.Address, Resolver: g.Resolver, Names: &g.names, Log: g.events.Write, Why: g.whyRefused}
	return f.Watch(ctx, g.files[FileFlows], g.files[FileConntrack])
}

// whyRefused says why the packet filter refused a connection. The filter decides by address alone, and what it says is true
// whatever this makes of it.
func (g *gate) whyRefused(proto string, to netip.AddrPort) string {
	_, allowed := g.naming.get()
	port := policy.Port{Protocol: proto, Number: to.Port()}
	v := allowed.Decide("", to.Addr(), port)
	if v.Allowed {
		return "an address of the host, or one that it sends elsewhere"
	}
	name := g.names.Lookup(to.Addr())
	if name == "" || !allowed.Address(to.Addr()).Allowed || !allowed.Name(name).Allowed {
		return v.Reason
	}
	if v := allowed.Decide(name, to.Addr(), port); !v.Allowed {
		return v.Reason
	}
	return "it was the address of " + name + " too long ago; a new look-up allows it again"
}
