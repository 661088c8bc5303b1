package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/clawvm/clawvm/network"
)

func (k *look) bridge() network.Bridge {
	return network.Bridge{Name: k.host.Bridge, Address: k.host.Address, Owner: k.Layout.ID}
}

// checkFirewall looks for other firewalls that drop what VMs send.
func checkFirewall(_ context.Context, k *look) []Finding {
	b := k.bridge()
	neighbours, err := b.Neighbours()
	var all []Finding
	if err != nil {
		all = append(all, broken("firewall", Unknown, err))
	} else {
		all = firewall(neighbours, b.Name)
	}
	legacy, err := network.LegacyTables()
	switch {
	case err != nil:
		all = append(all, broken("firewall-legacy", Unknown, err))
	case slices.Contains(legacy, "filter"):
		all = append(all, Finding{Check: "firewall-legacy", Severity: Note,
			Seen: "iptables' old tables are in use; what they drop is not looked at",
			Do:   "iptables-legacy -S FORWARD; if it drops: iptables-legacy -I FORWARD -i " + b.Name + " -j ACCEPT, and the same for -o"})
	}
	return all
}

// firewall judges the chains of others that drop at their end.
func firewall(neighbours []network.Neighbour, bridge string) []Finding {
	if len(neighbours) == 0 {
		return found("firewall", OK, "", "no other firewall drops what VMs send")
	}
	var all []Finding
	for _, n := range neighbours {
		f := Finding{Check: "firewall", Severity: OK, Seen: fmt.Sprintf("%s drops at its end, and has a rule about %s or clawvm's mark", n, bridge)}
		if !n.Told {
			what := "what VMs send to elsewhere"
			if n.Hook == "input" {
				what = "what VMs ask their resolver"
			}
			f.Severity, f.Do = Error, letThrough(n, bridge)
			f.Seen = fmt.Sprintf("%s drops at its end, %s too", n, what)
			if n.Firewall != "" && n.Firewall != "iptables" {
				f.Seen += " (" + n.Firewall + ")"
			}
		}
		all = append(all, f)
	}
	return all
}

// letThrough is the command by which a firewall's own program lets VMs' traffic through. It opens nothing that clawvm's tables close.
func letThrough(n network.Neighbour, bridge string) string {
	mark := fmt.Sprintf("0x%08x/0x%08x", uint32(network.MarkAccepted), uint32(network.MarkAcceptedMask))
	switch {
	case n.Firewall == "docker" && n.Hook == "forward":
		return "iptables -I DOCKER-USER -m mark --mark " + mark + " -j ACCEPT"
	case n.Firewall == "ufw" && n.Hook == "forward":
		return "ufw route allow in on " + bridge
	case n.Firewall == "ufw":
		return "ufw allow in on " + bridge
	case n.Firewall == "firewalld":
		return "firewall-cmd --permanent --zone=trusted --add-interface=" + bridge + " && firewall-cmd --reload"
	case n.Firewall == "docker" || n.Firewall == "iptables":
		return "iptables -I " + n.Chain + " -m mark --mark " + mark + " -j ACCEPT, and keep it as your other rules are kept"
	}
	return fmt.Sprintf("nft insert rule %s meta mark and 0x%08x == 0x%08x accept, and the same in the file that the table is loaded from",
		n, uint32(network.MarkAcceptedMask), uint32(network.MarkAccepted))
}

// checkSubnet looks whether the bridge is this root's, or can become it.
func checkSubnet(_ context.Context, k *look) []Finding {
	b := k.bridge()
	fresh := b.Owner == ""
	if fresh {
		b.Owner = freshOwner
	}
	err := b.Check()
	var route *network.RouteError
	switch {
	case errors.As(err, &route):
		return found("subnet", Error, "declare another `address:` in "+k.Layout.HostConfig(), "%v", route)
	case errors.Is(err, network.ErrNotOurs) && fresh && !k.root:
		return found("subnet", Unknown, "ask as root", "bridge %s is there; whose it is could not be looked at", b.Name)
	case errors.Is(err, network.ErrNotOurs):
		return found("subnet", Error, "declare another `bridge:` and `address:` in "+k.Layout.HostConfig(), "%v", err)
	case err != nil:
		return []Finding{broken("subnet", Error, err)}
	}
	return found("subnet", OK, "", "%v on %s is free for VMs", b.Address.Masked(), b.Name)
}

// freshOwner stands for the id of a root that has none yet.
const freshOwner = "00000000"

// checkUIDs looks whether someone else has the numbers that VMs' processes run as.
func checkUIDs(_ context.Context, k *look) []Finding {
	passwd, err := readLines("/etc/passwd")
	if err != nil {
		return []Finding{broken("uids", Unknown, err)}
	}
	subuid, err := readLines("/etc/subuid")
	if err != nil {
		subuid = nil // few hosts have none; then nobody has subordinate ids
	}
	first := uint64(k.host.UIDBase)
	last := first + 2<<(32-k.host.Address.Bits()) - 1
	return uids(first, last, passwd, subuid, k.Layout.HostConfig())
}

// uids looks for users and subordinate ids from first to last.
func uids(first, last uint64, passwd, subuid []string, file string) []Finding {
	do := "set another `uidBase:` in " + file
	for _, line := range passwd {
		fields := strings.Split(line, ":")
		if len(fields) < 3 {
			continue
		}
		if id, ok := number(fields[2]); ok && id >= first && id <= last {
			return found("uids", Error, do, "uid %d, one of %d to %d that VMs run as, is user %s of this host", id, first, last, fields[0])
		}
	}
	for _, line := range subuid {
		fields := strings.Split(line, ":")
		if len(fields) < 3 {
			continue
		}
		begin, ok1 := number(fields[1])
		count, ok2 := number(fields[2])
		if ok1 && ok2 && count > 0 && begin <= last && begin+count-1 >= first {
			return found("uids", Warning, do, "uids %d to %d, which VMs run as, overlap the subordinate ids of %s (/etc/subuid)", first, last, fields[0])
		}
	}
	return found("uids", OK, "", "%d to %d are nobody else's", first, last)
}
