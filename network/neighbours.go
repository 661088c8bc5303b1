package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Neighbour is a chain of another firewall that drops or refuses what nothing before its end accepts, at a hook that VMs' packets
// pass. An accept in our tables doesn't overrule it.
type Neighbour struct {
	Family string // "ip" or "inet"
	Table  string
	Chain  string
	Hook   string // "input" or "forward"
	// Firewall is the program that such tables are known to be of: "docker", "ufw", "firewalld", "iptables", or "" for nftables' own.
	Firewall string
	// Told says that a rule of the table is about the bridge or the mark of what we accept. What it says isn't understood.
	Told bool
}

// String is the chain as the nft program names it.
func (n Neighbour) String() string { return n.Family + " " + n.Table + " " + n.Chain }

// Neighbours looks for other firewalls at the hooks input and forward, of which only the nftables ones can be seen by it: see
// LegacyTables. It changes nothing, and needs CAP_NET_ADMIN.
func (b Bridge) Neighbours() ([]Neighbour, error) {
	var found []Neighbour
	err := reading(func(k *rulesReader) error {
		chains, err := k.baseChains()
		if err != nil {
			return err
		}
		known, err := k.knownFirewalls()
		if err != nil {
			return err
		}
		for _, c := range chains {
			if tableNames.MatchString(c.table) {
				continue
			}
			rules, err := k.rawRules(c.family, c.table, c.name)
			if err != nil {
				return err
			}
			if !c.drops && !(len(rules) > 0 && endsAll(rules[len(rules)-1])) {
				continue
			}
			n := Neighbour{Family: familiesOfInterest[c.family], Table: c.table, Chain: c.name, Hook: c.hook, Firewall: known[tableID{c.family, c.table}]}
			// A rule about us may stand in any chain that this one jumps to.
			all, err := k.rawRules(c.family, c.table, "")
			if err != nil {
				return err
			}
			n.Told = slices.ContainsFunc(all, func(rule []byte) bool { return b.isAbout(rule) })
			found = append(found, n)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot look for other firewalls: %w", err)
	}
	return found, nil
}

// LegacyTables are the tables of iptables' old kernel interface, which nftables doesn't show. A kernel without it has none.
func LegacyTables() ([]string, error) {
	b, err := os.ReadFile("/proc/net/ip_tables_names")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot look for iptables' old tables: %w", err)
	}
	return strings.Fields(string(b)), nil
}

// isAbout says whether a rule, as the kernel lists it, compares something with the bridge's name or with the mark of what we accept. An
// iptables match has its data in one piece (mark, mask), nftables has an expression for each.
func (b Bridge) isAbout(rule []byte) bool {
	if bytes.Contains(rule, append([]byte(b.Name), 0)) {
		return true
	}
	mark := binary.NativeEndian.AppendUint32(nil, MarkAccepted)
	mask := binary.NativeEndian.AppendUint32(nil, MarkAcceptedMask)
	return bytes.Contains(rule, mark) && bytes.Contains(rule, mask)
}

// baseChain is a chain at the hook input or forward.
type baseChain struct {
	family nftables.TableFamily
	table  string
	name   string
	hook   string
	drops  bool // by its policy
}

type tableID struct {
	family nftables.TableFamily
	name   string
}

// verdictDrop is NF_DROP of linux/netfilter.h.
const verdictDrop = 0

// familiesOfInterest are those whose chains see the IPv4 packets that are routed, in the words of the nft program.
var familiesOfInterest = map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyINet: "inet"}

// hooksOfInterest are those that packets of VMs to the host and to elsewhere pass.
var hooksOfInterest = map[uint32]string{unix.NF_INET_LOCAL_IN: "input", unix.NF_INET_FORWARD: "forward"}

// baseChains lists the filter chains of all tables that see IPv4.
func (r *rulesReader) baseChains() ([]baseChain, error) {
	msgs, _, err := r.get(unix.NFT_MSG_GETCHAIN, nftables.TableFamilyUnspecified)
	if err != nil {
		return nil, err
	}
	var all []baseChain
	for _, m := range msgs {
		if c, ok, err := parseBaseChain(m.Data); err != nil {
			return nil, err
		} else if ok {
			all = append(all, c)
		}
	}
	return all, nil
}

// parseBaseChain reads the kernel's message about a chain.
func parseBaseChain(data []byte) (c baseChain, ok bool, err error) {
	if len(data) < nfgenmsg {
		return c, false, nil
	}
	c.family = nftables.TableFamily(data[0])
	err = attributes(data[nfgenmsg:], func(d *netlink.AttributeDecoder) {
		switch d.Type() {
		case unix.NFTA_CHAIN_TABLE:
			c.table = d.String()
		case unix.NFTA_CHAIN_NAME:
			c.name = d.String()
		case unix.NFTA_CHAIN_POLICY:
			c.drops = d.Uint32() == verdictDrop
		case unix.NFTA_CHAIN_HOOK:
			d.Nested(func(h *netlink.AttributeDecoder) error {
				for h.Next() {
					if h.Type() == unix.NFTA_HOOK_HOOKNUM {
						c.hook = hooksOfInterest[h.Uint32()]
					}
				}
				return nil
			})
		}
	})
	return c, familiesOfInterest[c.family] != "" && c.hook != "", err
}

// knownFirewalls tells the tables of well-known programs by names that only they use.
func (r *rulesReader) knownFirewalls() (map[tableID]string, error) {
	msgs, _, err := r.get(unix.NFT_MSG_GETCHAIN, nftables.TableFamilyUnspecified)
	if err != nil {
		return nil, err
	}
	known := map[tableID]string{}
	for _, m := range msgs {
		if len(m.Data) < nfgenmsg {
			continue
		}
		table, name := "", ""
		if err := attributes(m.Data[nfgenmsg:], func(d *netlink.AttributeDecoder) {
			switch d.Type() {
			case unix.NFTA_CHAIN_TABLE:
				table = d.String()
			case unix.NFTA_CHAIN_NAME:
				name = d.String()
			}
		}); err != nil {
			return nil, err
		}
		id := tableID{nftables.TableFamily(m.Data[0]), table}
		if program := firewallOf(id, name); program != "" && (known[id] == "" || known[id] == "iptables") {
			known[id] = program
		}
	}
	return known, nil
}

// firewallOf is the program that makes a chain of this name, or "". ufw and Docker may share iptables' table; either
// one's way in serves then.
func firewallOf(t tableID, chain string) string {
	switch {
	case t.name == "firewalld":
		return "firewalld"
	case t.family != nftables.TableFamilyIPv4 || t.name != "filter":
		return ""
	case strings.HasPrefix(chain, "ufw-"):
		return "ufw"
	case chain == "DOCKER-USER":
		return "docker"
	case chain == "FORWARD" || chain == "INPUT":
		return "iptables"
	}
	return ""
}

// rawRules lists a chain's rules, or with "" a table's, as the kernel's messages.
func (r *rulesReader) rawRules(family nftables.TableFamily, table, chain string) ([][]byte, error) {
	attrs := []netlink.Attribute{nameAttr(unix.NFTA_RULE_TABLE, table)}
	if chain != "" {
		attrs = append(attrs, nameAttr(unix.NFTA_RULE_CHAIN, chain))
	}
	msgs, _, err := r.get(unix.NFT_MSG_GETRULE, family, attrs...)
	if err != nil {
		return nil, err
	}
	var all [][]byte
	for _, m := range msgs {
		if len(m.Data) >= nfgenmsg {
			all = append(all, m.Data[nfgenmsg:])
		}
	}
	return all, nil
}

// endsAll says whether a rule drops or refuses every packet that comes to it: its expressions compare nothing.
func endsAll(rule []byte) bool {
	ends, matches := false, false
	err := attributes(rule, func(d *netlink.AttributeDecoder) {
		if d.Type() != unix.NFTA_RULE_EXPRESSIONS {
			return
		}
		d.Nested(func(list *netlink.AttributeDecoder) error {
			for list.Next() {
				list.Nested(func(e *netlink.AttributeDecoder) error {
					for e.Next() {
						switch e.Type() {
						case unix.NFTA_EXPR_NAME:
							switch e.String() {
							case "counter", "log", "immediate":
							case "reject":
								ends = true
							default:
								matches = true
							}
						case unix.NFTA_EXPR_DATA:
							ends = ends || dropVerdict(e.Bytes())
						}
					}
					return nil
				})
			}
			return nil
		})
	})
	return err == nil && ends && !matches
}

// dropVerdict says whether the data of an expression are of one that drops at once.
func dropVerdict(data []byte) bool {
	drops := false
	err := attributes(data, func(d *netlink.AttributeDecoder) {
		if d.Type() != unix.NFTA_IMMEDIATE_DATA {
			return
		}
		d.Nested(func(v *netlink.AttributeDecoder) error {
			for v.Next() {
				if v.Type() != unix.NFTA_DATA_VERDICT {
					continue
				}
				v.Nested(func(w *netlink.AttributeDecoder) error {
					for w.Next() {
						if w.Type() == unix.NFTA_VERDICT_CODE {
							drops = drops || w.Uint32() == verdictDrop
						}
					}
					return nil
				})
			}
			return nil
		})
	})
	return err == nil && drops
}
