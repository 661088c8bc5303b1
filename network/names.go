// Package network makes the host's side of the VMs' network: one bridge, a TAP
// for each VM, the addresses that VMs hold, and the nftables rules that decide
// what a VM may reach and what may reach it.
//
// Everything that it makes carries the owner's mark, so that several roots of
// clawvm live on one host without touching each other: links have the alias
// "clawvm:OWNER:VM" (a bridge "clawvm:OWNER:"), tables the name
// "clawvm_v1_OWNER". Links without the mark are never changed or removed.
//
// All functions act on the network namespace of the calling thread and need
// CAP_NET_ADMIN; making TAPs needs /dev/net/tun besides.
package network

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
)

// maxLinkName is the longest name that the kernel takes for a link
// (IFNAMSIZ less the closing zero). Longer ones are cut without an error by
// TUNSETIFF, so they are refused here.
const maxLinkName = 15

var (
	vmName    = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	ownerName = regexp.MustCompile(`^[0-9a-f]{8}$`)
	linkName  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)
)

// MAC is the hardware address of the one who holds the IPv4 address a: 02:63
// (locally administered, unicast) and the four bytes of the address. No hash,
// so that no two collide.
func MAC(a netip.Addr) net.HardwareAddr {
	if !a.Is4() {
		return nil
	}
	b := a.As4()
	return net.HardwareAddr{0x02, 0x63, b[0], b[1], b[2], b[3]}
}

// TAPName is the name of the TAP of the VM that holds the IPv4 address a:
// "claw" and the address in hex, such as clawc0a8530a.
func TAPName(a netip.Addr) string {
	if !a.Is4() {
		return ""
	}
	b := a.As4()
	return "claw" + hex.EncodeToString(b[:])
}

// alias is the owner's mark on a link; vm is empty on the bridge.
func alias(owner, vm string) string { return "clawvm:" + owner + ":" + vm }

// parseAlias takes an owner's mark apart.
func parseAlias(s string) (owner, vm string, ok bool) {
	rest, ok := strings.CutPrefix(s, "clawvm:")
	if !ok {
		return "", "", false
	}
	owner, vm, ok = strings.Cut(rest, ":")
	if !ok || !ownerName.MatchString(owner) || vm != "" && !vmName.MatchString(vm) {
		return "", "", false
	}
	return owner, vm, true
}

func checkVM(name string) error {
	if !vmName.MatchString(name) {
		return fmt.Errorf("%q is not the name of a VM: a letter, then up to 31 letters, digits or dashes", name)
	}
	return nil
}

func checkLink(name string) error {
	if len(name) > maxLinkName || !linkName.MatchString(name) {
		return fmt.Errorf("%q is not the name of a link: 1 to %d letters, digits, dots, dashes or underscores", name, maxLinkName)
	}
	return nil
}

// check says what is wrong with a bridge's description.
func (b Bridge) check() error {
	if err := checkLink(b.Name); err != nil {
		return err
	}
	if !ownerName.MatchString(b.Owner) {
		return fmt.Errorf("%q is not an owner's id: 8 hex digits", b.Owner)
	}
	a := b.Address
	if !a.IsValid() || !a.Addr().Is4() {
		return fmt.Errorf("the bridge's address %v is not an IPv4 address with a prefix length", a)
	}
	if a.Bits() > 30 || a.Bits() < 8 {
		return fmt.Errorf("the bridge's subnet %v has no place for VMs: the prefix length must be 8 to 30", a)
	}
	if a.Addr() == a.Masked().Addr() || a.Addr() == broadcast(a) {
		return fmt.Errorf("the bridge's address %v is the subnet's own or its broadcast address", a)
	}
	if b.MTU != 0 && (b.MTU < 576 || b.MTU > 65535) {
		return fmt.Errorf("an MTU of %d is not within 576 and 65535", b.MTU)
	}
	return nil
}

// broadcast is the last address of an IPv4 prefix.
func broadcast(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}
