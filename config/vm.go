package config

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// ownFields are a single VM's: `defaults:` can't hold them.
var ownFields = []string{"address", "mac", "tap", "hostname"}

func (d *decoder) vm(n *node, path string, vm *VM, h *Host) {
	d.fields(n, path,
		field{"image", func(n *node, p string) { vm.Image = d.image(n, p) }},
		field{"vcpus", func(n *node, p string) {
			if i, ok := d.integer(n, p, 1, maxVCPUs); ok {
				vm.VCPUs = int(i)
			}
		}},
		field{"memory", func(n *node, p string) {
			if s := d.size(n, p, minMemory, maxMemory, mebibyte, "no guest boots with it"); s > 0 {
				vm.Memory = s
			}
		}},
		field{"limits", func(n *node, p string) { d.limits(n, p, &vm.Limits) }},
		field{"vmm", func(n *node, p string) {
			if s, ok := d.oneOf(n, p, VMMAuto, VMMCloudHypervisor, VMMQEMU); ok {
				vm.VMM = s
			}
		}},
		field{"kernel", func(n *node, p string) { vm.Kernel = d.kernel(n, p) }},
		field{"address", func(n *node, p string) { vm.Address = d.guestAddress(n, p, h) }},
		field{"mac", func(n *node, p string) { vm.MAC = d.mac(n, p) }},
		field{"tap", func(n *node, p string) { vm.TAP = d.tap(n, p, h) }},
		field{"hostname", func(n *node, p string) {
			if s := d.hostname(n, p); s != "" {
				vm.Hostname = s
			}
		}},
		field{"gateway", func(n *node, p string) { vm.NoGateway = d.gateway(n, p, h) }},
		field{"nameservers", func(n *node, p string) { vm.Nameservers = d.nameservers(n, p, h) }},
		field{"overlay", func(n *node, p string) { vm.Overlay = d.overlay(n, p) }},
		field{"volumes", func(n *node, p string) {
			d.items(n, p, "a list of volumes", func(n *node, p string) { vm.Volumes = append(vm.Volumes, d.volume(n, p)) })
		}},
		field{"shares", func(n *node, p string) {
			d.items(n, p, "a list of shares", func(n *node, p string) { vm.Shares = append(vm.Shares, d.share(n, p)) })
		}},
		field{"secrets", func(n *node, p string) { vm.Secrets = d.secrets(n, p) }},
		field{"ports", func(n *node, p string) { vm.Ports = d.ports(n, p) }},
		field{"egress", func(n *node, p string) { d.egress(n, p, &vm.Egress) }},
		field{"restart", func(n *node, p string) {
			if b, ok := n.value.(bool); ok && n.kind == boolean && !b {
				vm.Restart = RestartNo // some YAML writers and readers take a bare no for false
				return
			}
			if s, ok := d.oneOf(n, p, RestartNo, RestartOnFailure, RestartAlways); ok {
				vm.Restart = s
			}
		}},
		field{"health", func(n *node, p string) { vm.Health = d.health(n, p) }},
		field{"run", func(n *node, p string) { vm.Run = d.run(n, p) }},
		field{"openclaw", func(n *node, p string) { vm.OpenClaw = d.openClaw(n, p) }},
	)
}

func (d *decoder) image(n *node, path string) string {
	const want = "the name of an image in the store, or sha256: and its 64 hex digits (clawvm image ls)"
	s, ok := d.name(n, path, want)
	if ok && !imagePattern.MatchString(s) && !digestPattern.MatchString(s) {
		d.fail(n.place, path, quoted(s)+" is neither a name nor a digest", want)
	}
	return s
}

func (d *decoder) kernel(n *node, path string) string {
	const want = "the name of a kernel in the store, or a path"
	s, ok := d.name(n, path, want)
	switch {
	case !ok:
		return ""
	case strings.Contains(s, "/"):
		return d.hostPath(n, path)
	case !kernelPattern.MatchString(s):
		d.fail(n.place, path, quoted(s)+" is no name of a kernel", want)
		return ""
	}
	return s
}

func (d *decoder) guestAddress(n *node, path string, h *Host) netip.Addr {
	want := "a free address of " + h.Address.Masked().String()
	a, ok := d.address(n, path, want)
	if !ok {
		return netip.Addr{}
	}
	wrong := ""
	switch {
	case !h.Address.Contains(a):
		wrong = "is outside the subnet"
	case a == h.Address.Masked().Addr():
		wrong = "is the subnet's own address"
	case a == h.Address.Addr():
		wrong = "is the bridge's address"
	case a == broadcast(h.Address):
		wrong = "is the subnet's broadcast address"
	default:
		return a
	}
	d.fail(n.place, path, a.String()+" "+wrong, want)
	return netip.Addr{}
}

func (d *decoder) mac(n *node, path string) string {
	const want = "a unicast address such as 02:00:00:12:34:56"
	s, ok := d.text(n, path, want)
	if !ok {
		return ""
	}
	mac, err := net.ParseMAC(s)
	switch {
	case err != nil || len(mac) != 6:
		d.fail(n.place, path, quoted(s)+" is no MAC address", want)
	case mac[0]&1 != 0:
		d.fail(n.place, path, mac.String()+" is a multicast address", want)
	case slices.Equal(mac, make(net.HardwareAddr, 6)):
		d.fail(n.place, path, mac.String()+" is no device's address", want)
	default:
		return mac.String()
	}
	return ""
}

func (d *decoder) tap(n *node, path string, h *Host) string {
	want := fmt.Sprintf("a letter, then letters, digits, _, . and -, %d at most", maxTAP)
	s, ok := d.text(n, path, want)
	switch {
	case !ok:
		return ""
	case len(s) > maxTAP || !devicePattern.MatchString(s):
		d.fail(n.place, path, quoted(s)+" is no name for a device", want)
		return ""
	case s == h.Bridge || s == "lo" || s == "all" || s == "default":
		d.fail(n.place, path, s+" is taken", want)
		return ""
	}
	return s
}

func (d *decoder) hostname(n *node, path string) string {
	want := fmt.Sprintf("letters, digits and - between them, %d in a part, %d in all", maxLabel, maxHostname)
	s, ok := d.name(n, path, want)
	if !ok {
		return ""
	}
	tooLong := func(label string) bool { return len(label) > maxLabel }
	if len(s) > maxHostname || !hostnamePattern.MatchString(s) || slices.ContainsFunc(strings.Split(s, "."), tooLong) {
		d.fail(n.place, path, quoted(s)+" is no host name", want)
		return ""
	}
	return s
}

func (d *decoder) gateway(n *node, path string, h *Host) (none bool) {
	want := "none, or the bridge's address " + h.Address.Addr().String() + ", which is the default"
	if n.kind == text && n.text == "none" {
		return true
	}
	if a, ok := d.address(n, path, want); ok && a != h.Address.Addr() {
		d.fail(n.place, path, a.String()+" isn't the bridge's address", want)
	}
	return false
}

func (d *decoder) nameservers(n *node, path string, h *Host) []netip.Addr {
	const want = "addresses of resolvers, such as [8.8.8.8, 1.1.1.1]"
	var all []netip.Addr
	d.items(n, path, want, func(n *node, p string) {
		a, ok := d.address(n, p, "the address of a resolver")
		switch {
		case !ok:
		case a.IsUnspecified() || a.IsMulticast() || a == broadcast(h.Address):
			d.fail(n.place, p, a.String()+" is no resolver's address", "the address of a resolver")
		case a == h.Address.Addr():
			d.fail(n.place, p, a.String()+" is the bridge, whose resolver asks these nameservers", "the address of another resolver")
		case slices.Contains(all, a):
			d.fail(n.place, p, a.String()+" is there twice", "it once")
		default:
			all = append(all, a)
		}
	})
	if n.kind == list && (len(n.items) == 0 || len(n.items) > maxNameservers) {
		d.fail(n.place, path, fmt.Sprintf("are %d", len(n.items)), fmt.Sprintf("1 to %d", maxNameservers))
	}
	return all
}

func (d *decoder) ports(n *node, path string) []Port {
	const want = "a list of ports"
	var all []Port
	d.items(n, path, want, func(n *node, p string) {
		const want = `"GUEST", "HOST:GUEST" or "ADDRESS:HOST:GUEST", ports from 1 to 65535, such as "127.0.0.1:8080:80"`
		s, ok := d.name(n, p, want)
		if !ok {
			return
		}
		port, ok := parsePort(s)
		if !ok {
			d.fail(n.place, p, quoted(s)+" is no port", want)
			return
		}
		for _, other := range all {
			if other.HostPort != port.HostPort {
				continue
			}
			a, b := other.HostAddress, port.HostAddress
			if a == b || a.IsUnspecified() || b.IsUnspecified() {
				d.fail(n.place, p, fmt.Sprintf("%s is published already, as %s", netip.AddrPortFrom(b, port.HostPort), other), "another port of the host")
				break
			}
		}
		all = append(all, port)
	})
	if len(all) > maxPorts {
		d.fail(n.place, path, fmt.Sprintf("are %d", len(all)), fmt.Sprintf("%d at most", maxPorts))
	}
	return all
}

func parsePort(s string) (Port, bool) {
	p := Port{HostAddress: netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	rest, guest := "", s
	if i := strings.LastIndexByte(s, ':'); i >= 0 {
		rest, guest = s[:i], s[i+1:]
	}
	number, ok := portNumber(guest)
	p.HostPort, p.GuestPort = number, number
	if !ok || rest == "" {
		return p, ok && len(guest) == len(s)
	}
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		address := rest[:i]
		rest = rest[i+1:]
		inner, bracketed := strings.CutPrefix(address, "[")
		if bracketed {
			inner, ok = strings.CutSuffix(inner, "]")
		}
		a, err := netip.ParseAddr(inner)
		if err != nil || !ok || a.Zone() != "" || a.Is6() != bracketed || a.IsMulticast() {
			return p, false
		}
		p.HostAddress = a.Unmap()
	}
	p.HostPort, ok = portNumber(rest)
	return p, ok
}

func portNumber(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && n > 0
}

// String is the port in its full form, as the declaration has it.
func (p Port) String() string {
	return netip.AddrPortFrom(p.HostAddress, p.HostPort).String() + ":" + strconv.Itoa(int(p.GuestPort))
}

// broadcast is the last address of an IPv4 subnet.
func broadcast(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(a)
}
