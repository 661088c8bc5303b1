package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Port describes a VM's attachment to the bridge.
type Port struct {
	VM       string
	TAP      string           // "": TAPName(Address)
	MAC      net.HardwareAddr // the guest's; nil: MAC(Address)
	Address  netip.Addr       // the guest's, within the bridge's subnet
	UID, GID int              // who may open the TAP: the VMM's user and group, both
}

// filled returns the port with what it leaves out, and checks it.
func (b Bridge) filled(p Port) (Port, error) {
	if p.TAP == "" {
		p.TAP = TAPName(p.Address)
	}
	if p.MAC == nil {
		p.MAC = MAC(p.Address)
	}
	if err := b.check(); err != nil {
		return p, err
	}
	if err := checkVM(p.VM); err != nil {
		return p, err
	}
	return p, checkLink(p.TAP)
}

// EnsurePort makes a VM's TAP, or makes the one that is there as described:
// persistent, openable by UID and GID, marked, on the bridge, isolated from the
// other ports, learning nothing, flooded with nothing. What the host sends to the
// VM finds it by a static forwarding entry and a permanent neighbour entry,
// which nothing that the guest sends can change. It makes the bridge no bridge:
// EnsureBridge goes first.
//
// A TAP of that name without our mark is refused with ErrNotOurs.
func (b Bridge) EnsurePort(p Port) error {
	p, err := b.filled(p)
	if err == nil {
		err = b.ensurePort(p)
	}
	if err != nil {
		return fmt.Errorf("cannot attach VM %s to bridge %s by TAP %s: %w", p.VM, b.Name, p.TAP, err)
	}
	return nil
}

func (b Bridge) ensurePort(p Port) error {
	if !b.Address.Contains(p.Address) {
		return fmt.Errorf("%v is not in the subnet %v", p.Address, b.Address.Masked())
	}
	if len(p.MAC) != 6 || p.MAC[0]&1 != 0 {
		return fmt.Errorf("%v is not the MAC of one machine", p.MAC)
	}
	br, err := b.find()
	if err != nil {
		return err
	}
	if br == nil {
		return errors.New("there is no such bridge")
	}
	tap, err := b.findTAP(p)
	if err != nil {
		return err
	}
	if tap != nil && (tap.NonPersist || tap.Owner != uint32(p.UID) || tap.Group != uint32(p.GID)) {
		// Another user than declared now: made anew, as nothing else takes the old one's right away.
		if err := b.removePort(p); err != nil {
			return err
		}
		tap = nil
	}
	if tap != nil {
		return b.setPort(br, p, false)
	}
	return makeTAP(p.TAP, p.UID, p.GID, func() error { return b.setPort(br, p, true) })
}

// findTAP looks for the port's TAP: nil without an error when there is none.
func (b Bridge) findTAP(p Port) (*netlink.Tuntap, error) {
	link, err := findLink(p.TAP)
	if err != nil || link == nil {
		return nil, err
	}
	tap, ok := link.(*netlink.Tuntap)
	if !ok || tap.Mode != netlink.TUNTAP_MODE_TAP {
		return nil, reason(ErrNotOurs, "a link of that name exists and is no TAP (%s)", link.Type())
	}
	switch owner, vm, ok := parseAlias(tap.Alias); {
	case !ok:
		return nil, reason(ErrNotOurs, "a TAP of that name exists that clawvm did not make")
	case owner != b.Owner:
		return nil, reason(ErrNotOurs, "it belongs to another root of clawvm (id %s)", owner)
	case vm != p.VM:
		return nil, reason(ErrNotOurs, "it is the port of VM %s", vm)
	}
	return tap, nil
}

// setPort brings the TAP, which exists, into its state; isNew says that it was made
// a moment ago.
func (b Bridge) setPort(br netlink.Link, p Port, isNew bool) error {
	link, err := findLink(p.TAP)
	if err != nil {
		return err
	}
	if link == nil {
		return errors.New("it was removed while it was made")
	}
	// The mark goes first: whatever is on the bridge can be told to be ours.
	if err := netlink.LinkSetAlias(link, alias(b.Owner, p.VM)); err != nil {
		return fmt.Errorf("cannot mark it: %w", err)
	}
	if err := closeLinkToIPv6(p.TAP); err != nil {
		return err
	}
	if err := netlink.LinkSetMTU(link, br.Attrs().MTU); err != nil {
		return fmt.Errorf("cannot set its MTU: %w", err)
	}
	if link.Attrs().MasterIndex != br.Attrs().Index {
		if err := netlink.LinkSetMaster(link, br); err != nil {
			return fmt.Errorf("cannot attach it: %w", err)
		}
	}
	if err := setPortOptions(link.Attrs().Index); err != nil {
		return fmt.Errorf("cannot isolate it: %w", err)
	}
	replace := replaceEntries
	if isNew && p.ownMAC() {
		replace = checkMAC // it had no others; a host's list of them is long
	}
	if err := replace(br, link, p); err != nil {
		return err
	}
	if err := setEntries(br, link, p); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("cannot bring it up: %w", err)
	}
	return nil
}

// setPortOptions sets in one message what the bridge does with a port. The
// kernel takes it only for a link that is a port already.
func setPortOptions(index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	info.AddRtAttr(unix.IFLA_BRPORT_ISOLATED, nl.Uint8Attr(1))      // ports don't reach each other
	info.AddRtAttr(unix.IFLA_BRPORT_LEARNING, nl.Uint8Attr(0))      // guests' frames don't move forwarding entries
	info.AddRtAttr(unix.IFLA_BRPORT_UNICAST_FLOOD, nl.Uint8Attr(0)) // what is for another MAC doesn't come here
	info.AddRtAttr(unix.IFLA_BRPORT_MCAST_FLOOD, nl.Uint8Attr(0))
	info.AddRtAttr(unix.IFLA_BRPORT_BCAST_FLOOD, nl.Uint8Attr(0)) // the host has nothing to ask: it knows all neighbours
	info.AddRtAttr(unix.IFLA_BRPORT_GUARD, nl.Uint8Attr(1))
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// ownMAC says whether the MAC is the one made of the address, which no other port
// has, nor had with another address.
func (p Port) ownMAC() bool { return p.Address.IsValid() && slices.Equal(p.MAC, MAC(p.Address)) }

// checkMAC refuses a MAC that the bridge has at another port: one that was declared.
func checkMAC(br, tap netlink.Link, p Port) error {
	at, err := portOf(br, p.MAC)
	if err != nil {
		return err
	}
	if at != 0 && at != tap.Attrs().Index {
		return takenMAC(p, at)
	}
	return nil
}

func takenMAC(p Port, index int) error {
	return fmt.Errorf("the MAC %v is that of %s already", p.MAC, linkLabel(index))
}

// portOf finds the link at which the bridge has a MAC, by one question; 0 when it
// has it nowhere.
func portOf(br netlink.Link, mac net.HardwareAddr) (index int, err error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_BRIDGE})
	req.AddData(nl.NewRtAttr(netlink.NDA_LLADDR, mac))
	req.AddData(nl.NewRtAttr(netlink.NDA_MASTER, nl.Uint32Attr(uint32(br.Attrs().Index))))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("cannot ask the bridge for the MAC %v: %w", mac, err)
	}
	if len(msgs) != 1 || len(msgs[0]) < unix.SizeofNdMsg {
		return 0, fmt.Errorf("cannot ask the bridge for the MAC %v: the kernel answers with %d messages, not one", mac, len(msgs))
	}
	return int(nl.NativeEndian().Uint32(msgs[0][4:])), nil
}

// replaceEntries removes the forwarding and neighbour entries that the port had with
// another MAC or address.
func replaceEntries(br, tap netlink.Link, p Port) error {
	fdb, err := forwarding()
	if err != nil {
		return err
	}
	macs := []string{p.MAC.String()}
	for _, e := range fdb {
		switch mine, same := e.LinkIndex == tap.Attrs().Index, slices.Equal(e.HardwareAddr, p.MAC); {
		case same && !mine && e.MasterIndex == br.Attrs().Index:
			return takenMAC(p, e.LinkIndex)
		case mine && !same:
			macs = append(macs, e.HardwareAddr.String())
			if err := netlink.NeighDel(&e); err != nil && !isGone(err) {
				return fmt.Errorf("cannot remove the forwarding entry of %v: %w", e.HardwareAddr, err)
			}
		}
	}
	return removeNeighbours(br, func(n netlink.Neigh) bool {
		return slices.Contains(macs, n.HardwareAddr.String()) && !n.IP.Equal(p.Address.AsSlice())
	})
}

// setEntries sets the port's forwarding and neighbour entry.
func setEntries(br, tap netlink.Link, p Port) error {
	// NUD_NOARP is what the bridge calls static; NUD_PERMANENT would mean "the host itself".
	err := netlink.NeighSet(&netlink.Neigh{LinkIndex: tap.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER,
		State: netlink.NUD_NOARP, HardwareAddr: p.MAC})
	if err != nil {
		return fmt.Errorf("cannot set the forwarding entry of %v: %w", p.MAC, err)
	}
	err = netlink.NeighSet(&netlink.Neigh{LinkIndex: br.Attrs().Index, Family: unix.AF_INET,
		State: netlink.NUD_PERMANENT, IP: p.Address.AsSlice(), HardwareAddr: p.MAC})
	if err != nil {
		return fmt.Errorf("cannot set the neighbour entry of %v: %w", p.Address, err)
	}
	return nil
}

// forwarding lists the static forwarding entries of the host's bridges.
func forwarding() ([]netlink.Neigh, error) {
	all, err := list(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, unix.AF_BRIDGE) })
	if err != nil {
		return nil, fmt.Errorf("cannot list the bridges' forwarding entries: %w", err)
	}
	var static []netlink.Neigh
	for _, e := range all {
		if e.State&netlink.NUD_NOARP != 0 && e.MasterIndex != 0 {
			e.Flags = netlink.NTF_MASTER // so that it can be handed to NeighDel
			static = append(static, e)
		}
	}
	return static, nil
}

// neighbours lists the permanent neighbour entries on the bridge.
func neighbours(br netlink.Link) ([]netlink.Neigh, error) {
	all, err := list(func() ([]netlink.Neigh, error) { return netlink.NeighList(br.Attrs().Index, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("cannot list the neighbours on bridge %s: %w", br.Attrs().Name, err)
	}
	return slices.DeleteFunc(all, func(n netlink.Neigh) bool { return n.State&netlink.NUD_PERMANENT == 0 }), nil
}

func removeNeighbours(br netlink.Link, which func(netlink.Neigh) bool) error {
	all, err := neighbours(br)
	if err != nil {
		return err
	}
	for _, n := range all {
		if !which(n) {
			continue
		}
		if err := netlink.NeighDel(&n); err != nil && !isGone(err) {
			return fmt.Errorf("cannot remove the neighbour entry of %v: %w", n.IP, err)
		}
	}
	return nil
}

// RemovePort removes a VM's TAP and its entries. What isn't there is no error,
// and a TAP that isn't this VM's is left alone with ErrNotOurs. The address may
// be left out when TAP is given.
func (b Bridge) RemovePort(p Port) error {
	p, err := b.filled(p)
	if err == nil {
		err = b.removePort(p)
	}
	if err != nil {
		return fmt.Errorf("cannot remove TAP %s of VM %s: %w", p.TAP, p.VM, err)
	}
	return nil
}

func (b Bridge) removePort(p Port) error {
	tap, err := b.findTAP(p)
	if err != nil {
		return err
	}
	br, err := b.find()
	if err != nil && !errors.Is(err, errHalfMade) {
		return err
	}
	var macs []string
	if p.MAC != nil {
		macs = append(macs, p.MAC.String())
	}
	if tap != nil {
		fdb, err := forwarding()
		if err != nil {
			return err
		}
		for _, e := range fdb {
			if e.LinkIndex == tap.Attrs().Index {
				macs = append(macs, e.HardwareAddr.String())
			}
		}
		if err := netlink.LinkDel(tap); err != nil && !isGone(err) {
			return err
		}
	}
	switch {
	case br == nil:
		return nil
	case p.ownMAC() && len(slices.Compact(macs)) <= 1:
		// Its neighbour entry can be that of its address alone.
		err := netlink.NeighDel(&netlink.Neigh{LinkIndex: br.Attrs().Index, Family: unix.AF_INET, IP: p.Address.AsSlice()})
		if err != nil && !isGone(err) {
			return fmt.Errorf("cannot remove the neighbour entry of %v: %w", p.Address, err)
		}
		return nil
	}
	return removeNeighbours(br, func(n netlink.Neigh) bool { return slices.Contains(macs, n.HardwareAddr.String()) })
}
