package network

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// PortStatus is a TAP of ours that exists.
type PortStatus struct {
	TAP, VM string
	Address netip.Addr // what the VM has; not valid when the port is half made
	Up      bool       // the link is up; that a VMM has it open is Running
	Running bool       // a VMM has it open
}

// Ports lists every TAP with this root's mark, by name, whether it is on the
// bridge or not. An error means that it could not be looked, never that there
// are none.
func (b Bridge) Ports() ([]PortStatus, error) {
	ports, err := b.ports()
	if err != nil {
		return nil, fmt.Errorf("cannot list the ports of bridge %s: %w", b.Name, err)
	}
	return ports, nil
}

func (b Bridge) ports() ([]PortStatus, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	all, err := links()
	if err != nil {
		return nil, err
	}
	addresses, err := b.addresses()
	if err != nil {
		return nil, err
	}
	var ports []PortStatus
	for _, l := range all {
		a := l.Attrs()
		owner, vm, ok := parseAlias(a.Alias)
		if _, isTAP := l.(*netlink.Tuntap); !isTAP || !ok || owner != b.Owner || vm == "" {
			continue
		}
		ports = append(ports, PortStatus{TAP: a.Name, VM: vm, Address: addresses[a.Index],
			Up: a.RawFlags&flagUp != 0, Running: a.RawFlags&flagLowerUp != 0})
	}
	slices.SortFunc(ports, func(x, y PortStatus) int { return cmp.Compare(x.TAP, y.TAP) })
	return ports, nil
}

// The link's flags of if.h; a TAP has a carrier when a process has it open.
const (
	flagUp      = 0x1
	flagLowerUp = 0x10000
)

// addresses finds the guests' addresses by the index of their TAP: the static
// forwarding entry says which MAC is there, the neighbour entry whose it is.
func (b Bridge) addresses() (map[int]netip.Addr, error) {
	br, err := b.find()
	if errors.Is(err, errHalfMade) || err == nil && br == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	near, err := neighbours(br)
	if err != nil {
		return nil, err
	}
	byMAC := map[string]netip.Addr{}
	for _, n := range near {
		if a, ok := netip.AddrFromSlice(n.IP.To4()); ok {
			byMAC[n.HardwareAddr.String()] = a
		}
	}
	fdb, err := forwarding()
	if err != nil {
		return nil, err
	}
	byLink := map[int]netip.Addr{}
	for _, e := range fdb {
		if a, ok := byMAC[e.HardwareAddr.String()]; ok && e.MasterIndex == br.Attrs().Index {
			byLink[e.LinkIndex] = a
		}
	}
	return byLink, nil
}

// Counters are the bytes that a VM has received and sent over its TAP since the
// TAP was made, Ethernet headers counted, as the guest sees it: what the TAP
// transmits is what the guest receives.
func (b Bridge) Counters(tap string) (received, sent uint64, err error) {
	link, err := findLink(tap)
	if err != nil {
		return 0, 0, err
	}
	if link == nil {
		return 0, 0, fmt.Errorf("cannot read the counters of TAP %s: there is none", tap)
	}
	owner, vm, ok := parseAlias(link.Attrs().Alias)
	if !ok || owner != b.Owner || vm == "" {
		return 0, 0, fmt.Errorf("cannot read the counters of TAP %s: %w", tap, ErrNotOurs)
	}
	s := link.Attrs().Statistics
	if s == nil {
		return 0, 0, fmt.Errorf("cannot read the counters of TAP %s: the kernel gave none", tap)
	}
	return s.TxBytes, s.RxBytes, nil
}
