package config

import "fmt"

// egress reads what a VM may reach. `allow:` alone means allowlist; neither, open.
func (d *decoder) egress(n *node, path string, e *Egress) {
	var mode, list *node
	read := d.fields(n, path,
		field{"mode", func(n *node, p string) {
			if s, ok := d.oneOf(n, p, EgressOpen, EgressAllowlist, EgressNone); ok {
				e.Mode, mode = s, n
			}
		}},
		field{"allow", func(n *node, p string) { list = n }},
		field{"allowPrivate", func(n *node, p string) { e.AllowPrivate = d.boolean(n, p) }},
	)
	if !read {
		return
	}
	if mode == nil && list != nil {
		e.Mode = EgressAllowlist
	}
	switch {
	case list != nil && e.Mode != EgressAllowlist:
		d.fail(list.place, join(path, "allow"), "is there beside mode: "+e.Mode, "mode: allowlist, or no list")
	case list != nil:
		e.Allow = d.allow(list, join(path, "allow"), e.AllowPrivate)
	case e.Mode == EgressAllowlist:
		d.fail(mode.place, join(path, "mode"), "is allowlist, and there is no list", "allow: [NAME, …] beside it; [] to allow nothing")
	}
	if e.Mode == EgressNone && e.AllowPrivate {
		d.failAt(join(path, "allowPrivate"), "is true, and nothing is reached", "mode: open or allowlist, or no allowPrivate")
	}
}

// allow reads the list of what is allowed.
func (d *decoder) allow(n *node, path string, private bool) []Allow {
	all := []Allow{}
	seen := map[string]bool{}
	d.items(n, path, "a list of names, networks and bundles", func(n *node, p string) {
		entries := d.allowEntry(n, p)
		for _, a := range entries {
			if what := a.private(); what != "" && !private {
				d.fail(n.place, p, a.Prefix.String()+" is "+what, wantPrivate)
				continue
			}
			text := a.String()
			if seen[text] && len(entries) == 1 {
				d.fail(n.place, p, text+" is there twice", "it once")
			}
			if !seen[text] {
				seen[text] = true
				all = append(all, a)
			}
		}
	})
	if len(all) > maxAllow {
		d.fail(n.place, path, fmt.Sprintf("are %d", len(all)), fmt.Sprintf("%d at most", maxAllow))
	}
	return all
}

// allowEntry reads an entry: its text, or {name, ports, protocol}, or {cidr, …}.
func (d *decoder) allowEntry(n *node, path string) []Allow {
	if n.kind != mapping {
		s, ok := d.name(n, path, wantAllow)
		if !ok {
			return nil
		}
		all, wrong, want := parseAllow(s)
		if !d.check(n, path, wrong, want) {
			return nil
		}
		return all
	}
	var what *node
	var ports []uint16
	protocol, before := "", len(d.problems)
	target := func(n *node, p string) {
		if what != nil {
			d.fail(n.place, p, "is there beside "+quoted(what.text), "one of the two")
			return
		}
		what = n
	}
	d.fields(n, path,
		field{"name", target},
		field{"cidr", target},
		field{"ports", func(n *node, p string) {
			ports = []uint16{}
			d.items(n, p, "a list of ports", func(n *node, p string) {
				if i, ok := d.integer(n, p, 1, 65535); ok {
					ports = append(ports, uint16(i))
				}
			})
		}},
		field{"protocol", func(n *node, p string) { protocol, _ = d.oneOf(n, p, ProtocolTCP, ProtocolUDP) }},
	)
	if what == nil {
		d.fail(n.place, path, "allows nothing", "name: or cidr: in it")
	}
	if len(d.problems) > before {
		return nil
	}
	s, ok := d.name(what, path, wantAllow)
	if !ok {
		return nil
	}
	if _, isBundle := bundles[s]; isBundle {
		d.fail(what.place, path, quoted(s)+" is a bundle, which has ports of its own", s+" alone, as text")
		return nil
	}
	a, wrong, want := parseTarget(s, ports, protocol)
	if !d.check(what, path, wrong, want) {
		return nil
	}
	return []Allow{a}
}

func (e Egress) show() []pair {
	all := []pair{{"mode", e.Mode}, {"allow", nil}, {"allowPrivate", nil}}
	if e.Mode == EgressAllowlist {
		all[1].value = listOf(e.Allow)
	}
	if e.AllowPrivate {
		all[2].value = true
	}
	return all
}
