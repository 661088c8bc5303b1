package boot

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"github.com/clawvm/clawvm/guest"
	"github.com/vishvananda/netlink"
)

// linkTime is how long the interface may take to appear after its driver was loaded.
const linkTime = 5 * time.Second

// configureNetwork brings up the loopback and, when there is one, the interface: its address as a /32, and the default route by a
// gateway that is on the link although no network says so.
func configureNetwork(n *guest.Network) error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("cannot bring up the loopback: %w", err)
	}
	// A workload without capabilities may use any port: it is the only one here.
	if err := setSysctl("net/ipv4/ip_unprivileged_port_start", "0"); err != nil {
		return err
	}
	if n == nil {
		return nil
	}
	mac, err := net.ParseMAC(n.MAC)
	if err != nil {
		return err
	}
	var link netlink.Link
	err = waitFor(linkTime, func() (err error) {
		link, err = linkByMAC(mac)
		return err
	})
	if err != nil {
		return err
	}
	name := link.Attrs().Name
	// The host carries no IPv6 for the guest; without an address of its own the guest asks for none.
	if err := setSysctl("net/ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil {
		return err
	}
	if err := setUp(link, n); err != nil {
		return fmt.Errorf("cannot configure %s: %w", name, err)
	}
	return nil
}

func setUp(link netlink.Link, n *guest.Network) error {
	if n.MTU != 0 {
		if err := netlink.LinkSetMTU(link, n.MTU); err != nil {
			return fmt.Errorf("mtu %d: %w", n.MTU, err)
		}
	}
	address := &net.IPNet{IP: n.Address.AsSlice(), Mask: net.CIDRMask(32, 32)}
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: address}); err != nil {
		return fmt.Errorf("address %s: %w", n.Address, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("cannot bring it up: %w", err)
	}
	if !n.Gateway.IsValid() {
		return nil
	}
	err := netlink.RouteReplace(&netlink.Route{
		LinkIndex: link.Attrs().Index,
		Gw:        n.Gateway.AsSlice(),
		Flags:     int(netlink.FLAG_ONLINK),
	})
	if err != nil {
		return fmt.Errorf("default route by %s: %w", n.Gateway, err)
	}
	return nil
}

func linkByMAC(mac net.HardwareAddr) (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if bytes.Equal(l.Attrs().HardwareAddr, mac) {
			return l, nil
		}
	}
	return nil, fmt.Errorf("there is no network interface with the address %s", mac)
}

// setSysctl sets a kernel parameter, given as a path below /proc/sys; one that the kernel doesn't have needs no setting.
func setSysctl(name, value string) error {
	err := os.WriteFile("/proc/sys/"+name, []byte(value), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot set %s: %w", name, err)
	}
	return nil
}

// hostsFile is /etc/hosts.
func hostsFile(d *guest.Document) []byte {
	var b strings.Builder
	fmt.Fprint(&b, "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	if d.Network != nil {
		fmt.Fprintf(&b, "%s %s\n", d.Network.Address, d.Hostname)
	} else {
		fmt.Fprintf(&b, "127.0.1.1 %s\n", d.Hostname)
	}
	return []byte(b.String())
}

// resolvFile is /etc/resolv.conf.
func resolvFile(n *guest.Network) []byte {
	var b strings.Builder
	if n != nil {
		if len(n.Search) > 0 {
			fmt.Fprintf(&b, "search %s\n", strings.Join(n.Search, " "))
		}
		for _, a := range n.Nameservers {
			fmt.Fprintf(&b, "nameserver %s\n", a)
		}
	}
	return []byte(b.String())
}
