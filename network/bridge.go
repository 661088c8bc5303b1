package network

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Bridge describes the bridge that a root's VMs are attached to.
type Bridge struct {
	Name    string       // of the link, at most 15 characters
	Address netip.Prefix // the host's address on it, and the subnet's length: 192.168.83.1/24
	Owner   string       // the id of the root that it belongs to, 8 hex digits
	MTU     int          // 0: that of the link of the default route, or 1500
}

var (
	// ErrNotOurs is in the error about a link that exists without our mark.
	ErrNotOurs = errors.New("not ours")
	// ErrPortsLeft is in RemoveBridge's error while VMs are attached.
	ErrPortsLeft = errors.New("ports left")
)

// EnsureBridge makes the bridge, or makes the one that is there as described:
// its MAC derived from its address (a bridge without one takes that of a port,
// and changes it when ports come and go), no forward delay, no spanning tree,
// no multicast snooping, no IPv6, its address and no other, up. It turns
// forwarding of IPv4 on.
//
// The notes say what was changed on the host, for the user to read. A subnet
// that the host routes elsewhere is refused with a *RouteError; a link of the
// name that belongs to another root, or to none, with ErrNotOurs.
func EnsureBridge(b Bridge) (notes []string, err error) {
	if err := b.check(); err != nil {
		return nil, fmt.Errorf("cannot make bridge %s: %w", b.Name, err)
	}
	if notes, err = b.ensure(); err != nil {
		return notes, fmt.Errorf("cannot make bridge %s: %w", b.Name, err)
	}
	return notes, nil
}

// Check says what EnsureBridge would refuse, and changes nothing.
func (b Bridge) Check() error {
	if err := b.check(); err != nil {
		return fmt.Errorf("cannot make bridge %s: %w", b.Name, err)
	}
	old, err := b.find()
	if err != nil && !errors.Is(err, errHalfMade) {
		return fmt.Errorf("cannot make bridge %s: %w", b.Name, err)
	}
	own := 0
	if old != nil {
		own = old.Attrs().Index
	}
	if err := checkRoutes(b.Address, own); err != nil {
		return fmt.Errorf("cannot make bridge %s: %w", b.Name, err)
	}
	return nil
}

func (b Bridge) ensure() (notes []string, err error) {
	old, err := b.find()
	if err != nil && !errors.Is(err, errHalfMade) {
		return nil, err
	}
	own := 0
	if old != nil {
		own = old.Attrs().Index
	}
	if err := checkRoutes(b.Address, own); err != nil {
		return nil, err
	}
	mtu, why, err := b.mtu(old)
	if err != nil {
		return nil, err
	}
	if old == nil {
		off := false
		attrs := netlink.NewLinkAttrs()
		// The MTU is set afterwards: one that a bridge is made with counts as the
		// kernel's own choice, and goes when the last port does.
		attrs.Name, attrs.HardwareAddr = b.Name, MAC(b.Address.Addr())
		err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off})
		// Another supervisor of this root may have been faster; the look below
		// tells whether it was one.
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
		notes = append(notes, fmt.Sprintf("made bridge %s with %v, MTU %d (%s)", b.Name, b.Address, mtu, why))
	}
	link, err := b.find()
	if errors.Is(err, errHalfMade) {
		err = netlink.LinkSetAlias(link, alias(b.Owner, ""))
	}
	if err != nil {
		return notes, err
	}
	if link == nil {
		return notes, errors.New("it was removed while it was made")
	}
	if err := b.configure(link, mtu); err != nil {
		return notes, err
	}
	had, err := setSysctl("net/ipv4/ip_forward", "1")
	if err != nil {
		return notes, err
	}
	if had != "1" {
		notes = append(notes, "net.ipv4.ip_forward was "+had+", is 1")
	}
	return notes, nil
}

// errHalfMade says that the bridge is one of ours from its name and MAC, and
// nobody's from its alias: whoever made it was killed before it set the mark,
// or is about to.
var errHalfMade = errors.New("half made")

// find looks for the bridge: nil without an error when there is none, the link
// with errHalfMade when it has to be marked yet, ErrNotOurs when it isn't ours.
func (b Bridge) find() (netlink.Link, error) {
	link, err := findLink(b.Name)
	if err != nil || link == nil {
		return nil, err
	}
	a := link.Attrs()
	switch owner, vm, ok := parseAlias(a.Alias); {
	case link.Type() != "bridge":
		return nil, reason(ErrNotOurs, "a link of that name exists and is no bridge (%s)", link.Type())
	case ok && owner == b.Owner && vm == "":
		return link, nil
	case ok:
		return nil, reason(ErrNotOurs, "it belongs to another root of clawvm (id %s)", owner)
	case a.Alias == "" && slices.Equal(a.HardwareAddr, MAC(b.Address.Addr())):
		return link, errHalfMade
	}
	return nil, reason(ErrNotOurs, "a bridge of that name exists that clawvm did not make")
}

// mtu says which MTU the bridge gets, and where that is from.
func (b Bridge) mtu(old netlink.Link) (mtu int, why string, err error) {
	if b.MTU != 0 {
		return b.MTU, "declared", nil
	}
	up, err := uplink()
	switch {
	case err != nil:
		return 0, "", err
	case up != nil && up.Attrs().MTU >= 576 && up.Attrs().MTU <= 65535:
		return up.Attrs().MTU, "as " + up.Attrs().Name, nil
	case old != nil:
		// The default route may be away for a moment; guests hold the MTU that they were given.
		return old.Attrs().MTU, "as it was", nil
	}
	return defaultMTU, "no default route", nil
}

func (b Bridge) configure(link netlink.Link, mtu int) error {
	a := link.Attrs()
	if mac := MAC(b.Address.Addr()); !slices.Equal(a.HardwareAddr, mac) {
		if err := netlink.LinkSetHardwareAddr(link, mac); err != nil {
			return fmt.Errorf("cannot set its MAC: %w", err)
		}
	}
	if a.MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("cannot set its MTU: %w", err)
		}
	}
	if err := setBridgeOptions(a.Index); err != nil {
		return fmt.Errorf("cannot set its options: %w", err)
	}
	if err := closeLinkToIPv6(b.Name); err != nil {
		return err
	}
	if err := b.ensureAddress(link); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("cannot bring it up: %w", err)
	}
	return nil
}

// setBridgeOptions turns off what holds frames back or lets guests speak to the
// bridge itself: forward delay (centiseconds), spanning tree, multicast
// snooping. netlink.Bridge has no fields for the first two.
func setBridgeOptions(index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
	data.AddRtAttr(nl.IFLA_BR_FORWARD_DELAY, nl.Uint32Attr(0))
	data.AddRtAttr(nl.IFLA_BR_MCAST_SNOOPING, nl.Uint8Attr(0))
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// ensureAddress gives the bridge its address and takes any other away.
func (b Bridge) ensureAddress(link netlink.Link) error {
	have, err := list(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("cannot list its addresses: %w", err)
	}
	want := &net.IPNet{IP: b.Address.Addr().AsSlice(), Mask: net.CIDRMask(b.Address.Bits(), 32)}
	found := false
	for _, a := range have {
		if a.IPNet.String() == want.String() {
			found = true
			continue
		}
		if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("cannot take the address %v from it: %w", a.IPNet, err)
		}
	}
	if found {
		return nil
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: want}); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("cannot give it the address %v: %w", want, err)
	}
	return nil
}

// RemoveBridge removes the bridge and the root's tables of rules, and nothing
// else: ip_forward stays as it is. It refuses with ErrPortsLeft while a link is
// attached, and with ErrNotOurs when the bridge isn't this root's. What isn't
// there is no error.
func RemoveBridge(b Bridge) error {
	if err := b.check(); err != nil {
		return fmt.Errorf("cannot remove bridge %s: %w", b.Name, err)
	}
	link, err := b.find()
	if err != nil && !errors.Is(err, errHalfMade) {
		return fmt.Errorf("cannot remove bridge %s: %w", b.Name, err)
	}
	if link != nil {
		all, err := links()
		if err != nil {
			return fmt.Errorf("cannot remove bridge %s: %w", b.Name, err)
		}
		for _, l := range all {
			if l.Attrs().MasterIndex == link.Attrs().Index {
				return fmt.Errorf("cannot remove bridge %s: %s is attached to it: %w", b.Name, l.Attrs().Name, ErrPortsLeft)
			}
		}
	}
	if err := removeTables(b.Owner); err != nil {
		return fmt.Errorf("cannot remove the rules of bridge %s: %w", b.Name, err)
	}
	if link == nil {
		return nil
	}
	if err := netlink.LinkDel(link); err != nil && !isGone(err) {
		return fmt.Errorf("cannot remove bridge %s: %w", b.Name, err)
	}
	return nil
}

// isGone tells the errors by which the kernel says that what was to be removed
// isn't there: no such device, no such entry, no such file.
func isGone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist)
}

// LinkMTU is the MTU that the bridge has, which is that of every port and the
// one to give to guests.
func (b Bridge) LinkMTU() (int, error) {
	link, err := b.find()
	if err != nil {
		return 0, fmt.Errorf("cannot read the MTU of bridge %s: %w", b.Name, err)
	}
	if link == nil {
		return 0, fmt.Errorf("cannot read the MTU of bridge %s: there is none", b.Name)
	}
	return link.Attrs().MTU, nil
}
