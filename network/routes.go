package network

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// defaultMTU is what Ethernet has, for a host that has no default route.
const defaultMTU = 1500

// RouteError says that the bridge's subnet is in use on the host.
type RouteError struct {
	Subnet netip.Prefix
	Route  netip.Prefix // the host's route
	Link   string       // where it leads; empty for one without a link (blackhole, unreachable)
}

func (e *RouteError) Error() string {
	via := "without a link"
	if e.Link != "" {
		via = "over " + e.Link
	}
	return fmt.Sprintf("subnet %v is in use on this host: it overlaps the route to %v %s", e.Subnet, e.Route, via)
}

// routes lists the IPv4 routes of all tables of the host.
func routes() ([]netlink.Route, error) {
	all, err := list(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list the host's routes: %w", err)
	}
	return all, nil
}

// destination is where a route leads; 0.0.0.0/0 for a default route.
func destination(r netlink.Route) netip.Prefix {
	if r.Dst == nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
	ones, _ := r.Dst.Mask.Size()
	if !ok {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, ones)
}

// collision looks for a route that overlaps the subnet and leads elsewhere than
// over the link with the index own (0 when the bridge isn't there yet).
// A default route overlaps everything and means nothing, and so do its two
// halves, 0.0.0.0/1 and 128.0.0.0/1, which OpenVPN puts beside it.
func collision(all []netlink.Route, subnet netip.Prefix, own int) (netlink.Route, bool) {
	for _, r := range all {
		d := destination(r)
		if d.Bits() <= 1 || own != 0 && r.LinkIndex == own {
			continue
		}
		if d.Overlaps(subnet) {
			return r, true
		}
	}
	return netlink.Route{}, false
}

// checkRoutes refuses a subnet that the host uses for something else.
func checkRoutes(subnet netip.Prefix, own int) error {
	all, err := routes()
	if err != nil {
		return err
	}
	r, found := collision(all, subnet.Masked(), own)
	if !found {
		return nil
	}
	e := &RouteError{Subnet: subnet.Masked(), Route: destination(r)}
	if i := routeLink(r); i != 0 {
		e.Link = linkLabel(i)
	}
	return e
}

// routeLink is the index of a route's first link, 0 when it has none.
func routeLink(r netlink.Route) int {
	if r.LinkIndex == 0 && len(r.MultiPath) > 0 {
		return r.MultiPath[0].LinkIndex
	}
	return r.LinkIndex
}

// linkLabel names a link for a message.
func linkLabel(index int) string {
	if i, err := net.InterfaceByIndex(index); err == nil {
		return i.Name
	}
	return fmt.Sprintf("link %d", index)
}

// uplink finds the link of the default route with the lowest metric in the main
// table; nil without an error when the host has no default route.
func uplink() (netlink.Link, error) {
	all, err := routes()
	if err != nil {
		return nil, err
	}
	best, found := netlink.Route{}, false
	for _, r := range all {
		if r.Table != unix.RT_TABLE_MAIN || destination(r).Bits() != 0 || routeLink(r) == 0 {
			continue
		}
		if !found || r.Priority < best.Priority {
			best, found = r, true
		}
	}
	if !found {
		return nil, nil
	}
	l, err := netlink.LinkByIndex(routeLink(best))
	if err != nil {
		return nil, fmt.Errorf("cannot look at the link of the default route: %w", err)
	}
	return l, nil
}
