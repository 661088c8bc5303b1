package host

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/network/egress/policy"
)

// What a gate may ask for, and with it its guest, which decides how many names of an
// allowed suffix it looks up.
const (
	pinBurst     = 256 // requests as they come: a program's start looks up some ten names
	pinRate      = 50  // a second, then
	pinAddresses = 64  // of one request; a gate asks for 32 at most
	pinLeast     = time.Minute
	pinMost      = 2 * time.Hour // a gate asks for an hour and a minute at most
	pinNames     = 8             // that are remembered of one address
)

// pinKernel is the packet filter's part: network.Pinner.
type pinKernel interface {
	Pin(all []network.Destination, keep time.Duration) error
	Unpin(all []network.Destination) error
	Close() error
}

// pins are the addresses that a VM with an allowlist can reach because its resolver
// answered them.
type pins struct {
	kernel pinKernel
	now    func() time.Time

	mu     sync.Mutex
	policy *policy.Policy
	held   map[network.Destination]heldPin
}

type heldPin struct {
	names []string
	until time.Time
}

func newPins(p *policy.Policy, kernel pinKernel) *pins {
	return &pins{kernel: kernel, now: time.Now, policy: p, held: map[network.Destination]heldPin{}}
}

// close leaves what is pinned to the rules' own end.
func (p *pins) close() error { return p.kernel.Close() }

func (p *pins) allowed() *policy.Policy {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.policy
}

// pin lets the VM reach addresses of a name, on the ports that the policy allows of
// it. The gate is asked to have checked all that: what is refused here is a mistake,
// a policy that has just changed, or a gate that is not one's own any more.
func (p *pins) pin(r *gate.PinRequest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.policy.Mode() != policy.Allowlist {
		return errors.New("the VM has no allowlist")
	}
	if v := p.policy.Name(r.Name); !v.Allowed {
		return errors.New(v.Reason)
	}
	if len(r.Addresses) == 0 || len(r.Addresses) > pinAddresses {
		return fmt.Errorf("%d addresses", len(r.Addresses))
	}
	keep := min(max(time.Duration(r.Seconds)*time.Second, pinLeast), pinMost)
	until := p.now().Add(keep)
	var all []network.Destination
	for _, a := range r.Addresses {
		a = a.Unmap()
		if v := p.policy.Address(a); !v.Allowed {
			return errors.New(v.Reason)
		}
		for _, port := range p.policy.Ports(r.Name) {
			all = append(all, destination(netip.PrefixFrom(a, a.BitLen()), port))
		}
	}
	p.forget()
	// The time that is left is never shortened: another name's answer may need it.
	longest, fresh := keep, 0
	for _, d := range all {
		h, there := p.held[d]
		if longest = max(longest, h.until.Sub(p.now())); !there {
			fresh++
		}
	}
	if len(p.held)+fresh > network.MaxPins {
		return network.ErrManyPins
	}
	if err := p.kernel.Pin(all, longest); err != nil {
		return err
	}
	if longest > keep {
		until = p.now().Add(longest)
	}
	for _, d := range all {
		h := p.held[d]
		if !slices.Contains(h.names, r.Name) {
			h.names = append(h.names, r.Name)
			h.names = h.names[max(0, len(h.names)-pinNames):]
		}
		h.until = until
		p.held[d] = h
	}
	return nil
}

// forget drops what the kernel has dropped by itself.
func (p *pins) forget() {
	now := p.now()
	for d, h := range p.held {
		if !h.until.After(now) {
			delete(p.held, d)
		}
	}
}

// govern goes by another policy: what no name allows any more is taken back.
func (p *pins) govern(by *policy.Policy) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.policy = by
	p.forget()
	if by.Mode() != policy.Allowlist {
		clear(p.held) // the kernel's set went with the rules
		return nil
	}
	var gone []network.Destination
	for d, h := range p.held {
		a, port := d.Prefix.Addr(), portOf(d)
		h.names = slices.DeleteFunc(slices.Clone(h.names), func(name string) bool { return !by.Decide(name, a, port).Allowed })
		p.held[d] = h
		if len(h.names) == 0 {
			gone = append(gone, d)
			delete(p.held, d)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	return p.kernel.Unpin(gone)
}

func portOf(d network.Destination) policy.Port {
	for name, number := range protocolNumbers {
		if number == d.Protocol {
			return policy.Port{Protocol: name, Number: d.Port}
		}
	}
	return policy.Port{}
}

// restore pins anew what was pinned, for the time that is left of it, after the
// rules were gone.
func (p *pins) restore() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forget()
	now := p.now()
	byTime := map[time.Duration][]network.Destination{}
	for d, h := range p.held {
		// To the second: so that what was pinned together is again.
		left := max(h.until.Sub(now).Round(time.Second), time.Second)
		byTime[left] = append(byTime[left], d)
	}
	var errs []error
	for left, all := range byTime {
		errs = append(errs, p.kernel.Pin(all, left))
	}
	return errors.Join(errs...)
}

// keeps says which of the VM's connections go on under the policy that holds now.
// Those to the VM's own resolver always do: gate is the host's address on the bridge.
func (p *pins) keeps(gate netip.Addr) func(proto string, to netip.AddrPort) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	by, held := p.policy, make(map[network.Destination]bool, len(p.held))
	for d := range p.held {
		held[d] = true
	}
	return func(proto string, to netip.AddrPort) bool {
		port := policy.Port{Protocol: proto, Number: to.Port()}
		switch {
		case to.Addr() == gate, to.Port() == dnsPort && protocolNumbers[proto] != 0:
			return true
		case held[destination(netip.PrefixFrom(to.Addr(), to.Addr().BitLen()), port)]:
			return true
		}
		return by.Decide("", to.Addr(), port).Allowed
	}
}

// servePins answers the gate's requests until it hangs up. One that speaks nonsense
// is not one's own any more, and is killed.
func (l *life) servePins(conn *gate.Conn) {
	tokens := newBucket(pinBurst, pinRate)
	for {
		m, err := conn.Receive()
		if errors.Is(err, io.EOF) {
			return
		}
		if err == nil && (m.Kind != gate.Pin || m.Pin == nil) {
			err = fmt.Errorf("a message of kind %q is no request for addresses", m.Kind)
		}
		if err != nil {
			l.gate.fail(err)
			if err := l.gate.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				l.gate.fail(err)
			}
			return
		}
		for wait := tokens.take(time.Now()); wait > 0; wait = tokens.take(time.Now()) {
			time.Sleep(wait) // the guest's answers wait with it
		}
		answer := gate.Message{Kind: gate.Pinned, Pin: &gate.PinRequest{ID: m.Pin.ID}}
		err = l.pins.pin(m.Pin)
		if errors.Is(err, network.ErrNoPins) {
			// Someone has just removed the rules. Whoever puts them back may not have come to it.
			if err = l.rules.Ensure(*l.ruled.Load()); err == nil {
				err = errors.Join(l.pins.restore(), l.pins.pin(m.Pin))
			}
		}
		if err != nil {
			answer.Detail = err.Error()
		}
		if err := conn.Send(answer); err != nil {
			return // the gate is gone, which others see
		}
	}
}
