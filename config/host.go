package config

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"slices"
)

func defaultHost() *Host {
	return &Host{Bridge: DefaultBridge, Address: DefaultAddress(), UIDBase: DefaultUIDBase}
}

// LoadHost reads what holds for all VMs of a host. Where there is no file, the defaults hold. The error is Problems where the
// file is at fault.
func LoadHost(path string) (*Host, error) {
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return defaultHost(), nil
	}
	if err != nil {
		return nil, err
	}
	return ParseHost(path, data)
}

// ParseHost is LoadHost for what was read from file.
func ParseHost(file string, data []byte) (*Host, error) {
	root, problems := readTree(file, data)
	if len(problems) > 0 {
		return nil, problems.sorted()
	}
	h := defaultHost()
	h.File = file
	d := decoder{places: map[string]place{}}
	d.fields(root, "",
		field{"bridge", func(n *node, p string) {
			if s := d.tap(n, p, &Host{}); s != "" {
				h.Bridge = s
			}
		}},
		field{"address", func(n *node, p string) {
			if a, ok := d.subnet(n, p); ok {
				h.Address = a
			}
		}},
		field{"uidBase", func(n *node, p string) {
			if i, ok := d.integer(n, p, minUIDBase, math.MaxUint32-1); ok {
				h.UIDBase = uint32(i)
			}
		}},
		field{"defaults", func(n *node, p string) { h.defaults = n }},
	)
	// Each address of the subnet has two uids: the VMM's and the gate's.
	if last := uint64(h.UIDBase) + 2<<(32-h.Address.Bits()); last > math.MaxUint32 {
		at, ok := d.places["uidBase"]
		if !ok {
			at = d.places["address"]
		}
		d.fail(at, "uidBase", fmt.Sprintf("%d leaves no room for two uids for each address of %s", h.UIDBase, h.Address.Masked()), "a lower one, or a smaller subnet")
	}
	if h.defaults != nil {
		d.checkDefaults(h)
	}
	if len(d.problems) > 0 {
		return nil, d.problems.sorted()
	}
	return h, nil
}

// checkDefaults reports what is wrong with `defaults:` at once, and not at the first VM.
func (d *decoder) checkDefaults(h *Host) {
	for _, e := range h.defaults.entries {
		if slices.Contains(ownFields, e.key) {
			d.fail(e.place, "defaults."+e.key, "belongs to one VM", "it in the VM's own declaration")
		}
	}
	var vm VM
	d.vm(h.defaults, "defaults", &vm, h)
	if vm.Run != nil && vm.OpenClaw != nil {
		d.failAt("defaults.openclaw", "is there beside run", "one of the two")
	}
}

func (d *decoder) subnet(n *node, path string) (netip.Prefix, bool) {
	const want = "the bridge's address and the length of its subnet, such as 192.168.83.1/24"
	s, ok := d.text(n, path, want)
	if !ok {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(s)
	wrong := ""
	switch {
	case err != nil:
		wrong = quoted(s) + " is no address with a length"
	case !p.Addr().Is4():
		wrong = s + " isn't IPv4"
	case p.Bits() < 8 || p.Bits() > 30:
		wrong = fmt.Sprintf("/%d is no subnet for VMs, which is from /8 to /30", p.Bits())
	case p.Addr() == p.Masked().Addr() || p.Addr() == broadcast(p):
		wrong = p.Addr().String() + " is the subnet's own or its broadcast address"
	case p.Addr().IsLoopback() || p.Addr().IsMulticast() || p.Addr().IsLinkLocalUnicast() || p.Addr().IsUnspecified():
		wrong = p.Addr().String() + " can't be a bridge's"
	}
	return p, d.check(n, path, wrong, want)
}
