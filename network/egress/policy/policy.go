// Package policy decides what a VM may reach. It is pure: it looks nothing up, and keeps no state. The gate decides by it, and the
// supervisor checks by it what the gate asks for.
package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/clawvm/clawvm/config"
)

// Mode is how a VM's way out is governed.
type Mode string

// The modes.
const (
	Open      Mode = "open"      // everything that is no special address
	Allowlist Mode = "allowlist" // what a rule allows
	None      Mode = "none"      // nothing
)

// Spec is a policy as it is told from one process to another.
type Spec struct {
	VM    string         `json:"vm"`
	Mode  Mode           `json:"mode"`
	Rules []config.Allow `json:"rules,omitempty"` // of Allowlist
	// AllowPrivate: private addresses, and those of CGNAT, are no special ones.
	AllowPrivate bool `json:"allowPrivate,omitempty"`
	// Own are the host's networks of VMs, none of whose addresses is ever reached.
	Own []netip.Prefix `json:"own,omitempty"`
}

// Port is a port of a protocol.
type Port struct {
	Protocol string // config.ProtocolTCP, config.ProtocolUDP, or another that no rule can name
	Number   uint16
}

func (p Port) String() string {
	if p.Number == 0 {
		return p.Protocol // which has no ports
	}
	return p.Protocol + " " + strconv.Itoa(int(p.Number))
}

// Verdict is a decision.
type Verdict struct {
	Allowed bool
	Rule    string // the rule that allows, as String shows it; "" with Open
	Reason  string // why not; completes the sentence "VM x may not reach y (…)"
	Addable bool   // it is refused for want of a rule alone
}

// Policy is a Spec that decides. It may be used by many at once.
type Policy struct {
	spec     Spec
	names    map[string][]config.Allow       // by name
	suffixes map[string][]config.Allow       // by the name that they are below
	prefixes map[netip.Prefix][]config.Allow // masked
	lengths  []int                           // of prefixes, the longest first
}

// New makes a policy. Rules that are neither of a name nor of addresses match nothing.
func New(s Spec) *Policy {
	p := &Policy{spec: s, names: map[string][]config.Allow{}, suffixes: map[string][]config.Allow{}, prefixes: map[netip.Prefix][]config.Allow{}}
	for _, r := range s.Rules {
		below, isSuffix := strings.CutPrefix(r.Name, "*.")
		switch {
		case isSuffix:
			p.suffixes[below] = append(p.suffixes[below], r)
		case r.Name != "":
			p.names[r.Name] = append(p.names[r.Name], r)
		case r.Prefix.IsValid():
			m := r.Prefix.Masked()
			p.prefixes[m] = append(p.prefixes[m], r)
			if !slices.Contains(p.lengths, m.Bits()) {
				p.lengths = append(p.lengths, m.Bits())
			}
		}
	}
	slices.Sort(p.lengths)
	slices.Reverse(p.lengths)
	return p
}

// Mode is the policy's.
func (p *Policy) Mode() Mode { return p.spec.Mode }

// VM is whose policy it is.
func (p *Policy) VM() string { return p.spec.VM }

// Reasons.
const (
	reasonNone    = "egress mode is none"
	reasonUnknown = "egress mode is unknown"
	reasonList    = "not in egress.allow"
	reasonTLS     = "DNS over TLS would go past the VM's own resolver"
)

// portDNSOverTLS is RFC 7858's.
const portDNSOverTLS = 853

// Name says whether a name may be looked up. It is in lower case; a final dot is no part of it.
func (p *Policy) Name(name string) Verdict {
	switch p.spec.Mode {
	case Open:
		return Verdict{Allowed: true}
	case None:
		return Verdict{Reason: reasonNone}
	case Allowlist:
		if rules := p.rulesOf(strings.TrimSuffix(name, ".")); len(rules) > 0 {
			return Verdict{Allowed: true, Rule: rules[0].String()}
		}
		return Verdict{Reason: reasonList, Addable: true}
	}
	return Verdict{Reason: reasonUnknown}
}

// Ports are those that the rules of a name allow, in a fixed order.
func (p *Policy) Ports(name string) []Port {
	if p.spec.Mode != Allowlist {
		return nil
	}
	var all []Port
	for _, r := range p.rulesOf(strings.TrimSuffix(name, ".")) {
		for _, n := range r.Ports {
			if port := (Port{r.Protocol, n}); !slices.Contains(all, port) {
				all = append(all, port)
			}
		}
	}
	slices.SortFunc(all, func(a, b Port) int {
		if c := strings.Compare(a.Protocol, b.Protocol); c != 0 {
			return c
		}
		return int(a.Number) - int(b.Number)
	})
	return all
}

const hostCharacters = "abcdefghijklmnopqrstuvwxyz0123456789-_."

// rulesOf are all rules for a name: its own first, then those of what it is below, the nearest first.
func (p *Policy) rulesOf(name string) []config.Allow {
	var found []config.Allow
	// What isn't a host's name is under no rule. An escaped dot (x\.example.com) would be a part of a label, and the name not below example.com.
	if name == "" || name[0] == '.' || strings.Contains(name, "..") || strings.Trim(name, hostCharacters) != "" {
		return nil
	}
	found = append(found, p.names[name]...)
	for below := name; ; {
		_, rest, ok := strings.Cut(below, ".")
		if !ok {
			return found
		}
		below = rest
		found = append(found, p.suffixes[below]...)
	}
}

var special = config.SpecialNetworks()

// Private are the networks that AllowPrivate opens.
func Private() []netip.Prefix {
	var all []netip.Prefix
	for _, s := range special {
		if s.Private {
			all = append(all, s.Prefix)
		}
	}
	return all
}

// Address says whether an address may be the answer to an allowed name, or a destination at all: whether it is no special one.
func (p *Policy) Address(a netip.Addr) Verdict {
	a = a.Unmap()
	if !a.Is4() {
		return Verdict{Reason: "the VM has no IPv6"}
	}
	for _, own := range p.spec.Own {
		if own.Contains(a) {
			return Verdict{Reason: a.String() + " is of the host and its VMs"}
		}
	}
	for _, s := range special {
		if s.Prefix.Contains(a) && !(s.Private && p.spec.AllowPrivate) {
			reason := a.String() + " is " + s.What
			if s.Private {
				reason += ", and egress.allowPrivate isn't set"
			}
			return Verdict{Reason: reason}
		}
	}
	return Verdict{Allowed: true}
}

// Decide says whether a port may be reached. The name is the one that is asked for, "" for whoever asks for an address; the
// address is the zero Addr as long as it isn't known.
func (p *Policy) Decide(name string, a netip.Addr, port Port) Verdict {
	switch p.spec.Mode {
	case None:
		return Verdict{Reason: reasonNone}
	case Open, Allowlist:
	default:
		return Verdict{Reason: reasonUnknown}
	}
	if a.IsValid() {
		if v := p.Address(a); !v.Allowed {
			return v
		}
	}
	if p.spec.Mode == Open {
		return Verdict{Allowed: true}
	}
	var near []config.Allow
	if name = strings.TrimSuffix(name, "."); name != "" {
		near = p.rulesOf(name)
	} else if a.IsValid() {
		near = p.rulesTo(a.Unmap())
	}
	for _, r := range near {
		if r.Protocol == port.Protocol && slices.Contains(r.Ports, port.Number) {
			return Verdict{Allowed: true, Rule: r.String()}
		}
	}
	switch {
	case port.Number == portDNSOverTLS:
		return Verdict{Reason: reasonTLS}
	case len(near) > 0:
		return Verdict{Reason: fmt.Sprintf("%s is not among its ports in egress.allow: %s", port, near[0]), Addable: port.Number != 0}
	}
	return Verdict{Reason: reasonList, Addable: port.Number != 0}
}

// rulesTo are all rules for an address, the narrowest first.
func (p *Policy) rulesTo(a netip.Addr) []config.Allow {
	var found []config.Allow
	for _, bits := range p.lengths {
		if m, err := a.Prefix(bits); err == nil {
			found = append(found, p.prefixes[m]...)
		}
	}
	return found
}

// Addresses are the prefixes that rules allow without a name, a port each.
func (p *Policy) Addresses() []Destination {
	if p.spec.Mode != Allowlist {
		return nil
	}
	var all []Destination
	for _, r := range p.spec.Rules {
		if r.Name != "" || !r.Prefix.IsValid() {
			continue
		}
		for _, n := range r.Ports {
			all = append(all, Destination{r.Prefix.Masked(), Port{r.Protocol, n}})
		}
	}
	return all
}

// Destination is a port of addresses.
type Destination struct {
	Prefix netip.Prefix
	Port   Port
}

// Sentence is a refusal for whoever asked: the guest's programs, and through them its owner. what is the name or address, with
// or without a port.
func (p *Policy) Sentence(what string, v Verdict) string {
	s := fmt.Sprintf("clawvm: VM %s may not reach %s (%s)", p.spec.VM, what, v.Reason)
	// The guest chose the name, and the owner may copy the command into a shell.
	host, _, _ := strings.Cut(what, ":")
	if entry := strings.TrimSuffix(what, ":443"); v.Addable && host != "" && host[0] != '-' && strings.Trim(what, hostCharacters+":") == "" {
		s += fmt.Sprintf("; the owner can run: clawvm allow %s %s", p.spec.VM, entry)
	}
	return s
}
