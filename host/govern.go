package host

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/network/egress/policy"
)

// policySpec is what a declaration, and the owner beside it, lets the VM reach. The gate decides by it, and
// the supervisor checks by it.
func (l *life) policySpec(vm *config.VM) policy.Spec {
	s := policy.Spec{
		VM: l.name, Mode: policy.Mode(vm.Egress.Mode), AllowPrivate: vm.Egress.AllowPrivate,
		Own: []netip.Prefix{l.hostConfig.Address.Masked()},
	}
	if s.Mode == policy.Allowlist {
		s.Rules = l.exceptions.list(vm.Egress.Allow, time.Now())
	}
	return s
}

// protocolNumbers are the numbers of the protocols that a rule can name.
var protocolNumbers = map[string]uint8{config.ProtocolTCP: unix.IPPROTO_TCP, config.ProtocolUDP: unix.IPPROTO_UDP}

// governed is a guest with what a policy says of it to the packet filter.
func governed(g network.Guest, s policy.Spec) network.Guest {
	g.Egress, g.AllowPrivate, g.Allowed = string(s.Mode), s.AllowPrivate, nil
	for _, d := range policy.New(s).Addresses() {
		g.Allowed = append(g.Allowed, destination(d.Prefix, d.Port))
	}
	return g
}

func destination(p netip.Prefix, port policy.Port) network.Destination {
	return network.Destination{Prefix: p, Protocol: protocolNumbers[port.Protocol], Port: port.Number}
}

// govern makes packet filter and pins go by another declaration. What takes it back
// is pushed on undo.
func (l *life) govern(vm *config.VM, undo *undoStack) error {
	was, before, spec := l.ruled.Load(), l.pins.allowed(), l.policySpec(vm)
	is := governed(*was, spec)
	undo.push("the new packet filter rules", func() error {
		l.ruled.Store(was)
		if err := l.rules.Ensure(*was); err != nil {
			return err
		}
		return l.pins.govern(before)
	})
	l.ruled.Store(&is)
	if err := l.rules.Ensure(is); err != nil {
		return err
	}
	return l.pins.govern(policy.New(spec))
}
