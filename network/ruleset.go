package network

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/network/egress/policy"
)

// layout is the version of the tables below, a part of their names. Whoever
// changes a set's type or what a chain is for raises it: an older layout's
// tables are then removed in the transaction that makes the new ones, and a
// program that finds a newer layout's leaves them alone.
const layout = 1

// The prefixes that a new connection is logged with, through its VM's group:
// the reader tells the verdict by it. nftables takes up to 127 characters.
const (
	LogAllowed = "microvm-egress: "
	LogRefused = "microvm-refused: "
)

// Packet marks. The bridge table puts the first on what a VM sent with its own
// MAC and address; the inet table drops what comes from the bridge without it,
// so that nothing passes while only one of the two tables is there. It puts the
// second on what it accepts, by which other firewalls can be told to do so too:
// an accept in one table doesn't overrule a drop in another. Other bits are
// left as they are; those that Docker, Tailscale and kube-proxy use are among them.
const (
	MarkPinned       = 0x00530000
	MarkPinnedMask   = 0x00ff0000
	MarkAccepted     = 0x53000000
	MarkAcceptedMask = 0xff000000
)

// Guest is what the rules need to know of a VM.
type Guest struct {
	VM        string
	TAP       string           // "": TAPName(Address)
	MAC       net.HardwareAddr // nil: MAC(Address)
	Address   netip.Addr
	Egress    string // "open": to anywhere but other VMs, the host and special addresses; "allowlist": to Allowed and what is pinned; "none": nowhere
	Resolver  uint16 // the gate's port on the bridge's address, UDP and TCP, that DNS is sent to; 0: none
	LogGroup  uint16 // the NFLOG group that its connections are logged through
	NoGateway bool   // nothing is forwarded, whatever Egress says
	// AllowPrivate: private addresses are no special ones.
	AllowPrivate bool
	// Allowed is what "allowlist" lets through without a name, however many overlap.
	Allowed []Destination
}

// What Guest.Egress can be.
const (
	EgressOpen      = "open"
	EgressAllowlist = "allowlist"
	EgressNone      = "none"
)

// priorityBefore is how much earlier than the customary place our chains run, so
// that our mark is there when other firewalls' chains look for it.
const priorityBefore = 5

// The names of the sets and maps; of each VM there are a few elements.
const (
	mapGuests    = "guests"    // address: goto the VM's chain
	mapRefusals  = "refusals"  // address: goto the chain that logs and refuses for the VM
	mapResolvers = "resolvers" // address: bridge address . port of its resolver
	setServices  = "services"  // address . protocol . port that it may reach on the bridge's address
	setTAPs      = "taps"      // names of the TAPs that are pinned
	setPins      = "pins"      // TAP . MAC . address that belong together
	// setConnections has the addresses of VMs that began a connection, each with how
	// many it has: the kernel adds and counts them.
	setConnections = "connections"
)

// ConnectionsMax is how many connections a VM may begin and have at once, those
// among them that are only not forgotten yet: the kernel has one table of them for the
// whole host (262,144 entries on most), and without room in it nobody's begin, the
// owner's own neither. The kernel walks through a VM's at a new one, a few hundred
// microseconds for so many.
const ConnectionsMax = 4096

var connectionsMax uint32 = ConnectionsMax // a test can't begin so many in a moment

func chainOf(vm string) string      { return "vm_" + vm }
func pinsOf(vm string) string       { return "pins_" + vm }
func allowedOf(vm string) string    { return "allowed_" + vm }
func refuseChain(vm string) string  { return "refuse_" + vm }
func tableName(owner string) string { return fmt.Sprintf("clawvm_v%d_%s", layout, owner) }

// table, chain, rule, set and element describe a rule set. They are made by pure
// functions, rendered by String in the words of the nft program, and sent to the
// kernel by apply.
type table struct {
	family nftables.TableFamily
	name   string
	sets   []set
	own    []set // a VM's own: they come and go with it
	chains []chain
}

type set struct {
	name     string
	key      nftables.SetDatatype
	data     nftables.SetDatatype // of a map
	isMap    bool
	byLink   bool   // the key begins with the name of a link, which is in the host's byte order
	dynamic  bool   // rules add its elements
	size     uint32 // how many elements there may be; 0: as many as come
	timeout  bool   // elements vanish by themselves: those that are there are left alone
	interval bool   // elements are ranges
	elements []element
}

// dynamicSize bounds a set whose elements rules add; a bridge has fewer ports.
const dynamicSize = 65535

// element is a set's element: its key, and in a map what it leads to.
type element struct {
	text  string
	key   []byte
	end   []byte // the last key, of a range
	value []byte // of a map of values
	chain string // of a map of verdicts: goto this
}

type chain struct {
	name  string
	hook  *hook // nil for a chain that is only jumped to
	rules []rule
}

type hook struct {
	kind     nftables.ChainType
	point    nftables.ChainHook
	priority int32
	text     string
}

// sharedTables are the tables of a root with all that doesn't depend on its VMs.
func sharedTables(b Bridge) []table {
	return []table{inetTable(b), bridgeTable(b)}
}

func inetTable(b Bridge) table {
	subnet, own := b.Address.Masked(), b.Address.Addr()
	return table{
		family: nftables.TableFamilyINet,
		name:   tableName(b.Owner),
		sets: []set{
			{name: mapGuests, key: nftables.TypeIPAddr, data: nftables.TypeVerdict, isMap: true},
			{name: mapRefusals, key: nftables.TypeIPAddr, data: nftables.TypeVerdict, isMap: true},
			{name: mapResolvers, key: nftables.TypeIPAddr, data: typeService, isMap: true},
			{name: setServices, key: typeGuestService},
			// The last: VMs' parts (guestTables) have no elements of it to put there.
			{name: setConnections, key: nftables.TypeIPAddr, size: dynamicSize, dynamic: true},
		},
		chains: []chain{
			// Before anyone's forwarding of the host's ports, Docker's among them: a
			// packet that has been redirected to a container no longer shows that it
			// was for the host, and a refusal of it comes from an address that the
			// guest didn't ask.
			{name: "before_nat", hook: &hook{nftables.ChainTypeFilter, *nftables.ChainHookPrerouting, -100 - 2*priorityBefore,
				"type filter hook prerouting priority dstnat - 10; policy accept;"}, rules: []rule{
				newRule("not from a VM", notIif(b.Name), accept()),
				newRule("", ctState("established,related"), accept()),
				newRule("too many connections at once", dport(unix.IPPROTO_UDP, 53), countedOver(setConnections, connectionsMax), jump(chainRefuse)),
				newRule("", dport(unix.IPPROTO_TCP, 53), countedOver(setConnections, connectionsMax), jump(chainRefuse)),
				newRule("not for the host", notForHost(), accept()),
				newRule("", dport(unix.IPPROTO_UDP, 53), accept()),
				newRule("", dport(unix.IPPROTO_TCP, 53), accept()),
				newRule("what the VM may use on the host", daddr(netip.PrefixFrom(own, 32)), serviceIn(setServices), accept()),
				newRule("any other port and address of the host", jump(chainRefuse)),
			}},
			{name: "prerouting", hook: &hook{nftables.ChainTypeNAT, *nftables.ChainHookPrerouting, -100 - priorityBefore,
				"type nat hook prerouting priority dstnat - 5; policy accept;"}, rules: []rule{
				newRule("DNS to any address goes to the VM's own resolver",
					iif(b.Name), dport(unix.IPPROTO_UDP, 53), dnatBy(mapResolvers)),
				newRule("", iif(b.Name), dport(unix.IPPROTO_TCP, 53), dnatBy(mapResolvers)),
			}},
			{name: "input", hook: &hook{nftables.ChainTypeFilter, *nftables.ChainHookInput, -priorityBefore,
				"type filter hook input priority filter - 5; policy accept;"}, rules: []rule{
				newRule("not from a VM", notIif(b.Name), accept()),
				newRule("not looked at by the bridge table", notPinned(), drop()),
				newRule("IPv6 is closed", notIPv4(), drop()),
				newRule("answers to the host, published ports among them", ctState("established,related"), markAccepted(), accept()),
				newRule("", ctState("invalid"), drop()),
				newRule("too many connections at once", ctState("new"), countedOver(setConnections, connectionsMax), jump(chainRefuse)),
				newRule("what the VM may use on the host", daddr(netip.PrefixFrom(own, 32)), serviceIn(setServices), markAccepted(), accept()),
				newRule("any other port and address of the host", jump(chainRefuse)),
			}},
			{name: "forward", hook: &hook{nftables.ChainTypeFilter, *nftables.ChainHookForward, -priorityBefore,
				"type filter hook forward priority filter - 5; policy accept;"}, rules: []rule{
				newRule("", iif(b.Name), jump(chainFromGuests)),
				newRule("", oif(b.Name), jump(chainToGuests)),
			}},
			{name: "output", hook: &hook{nftables.ChainTypeFilter, *nftables.ChainHookOutput, -priorityBefore,
				"type filter hook output priority filter - 5; policy accept;"}, rules: []rule{
				newRule("no VM is told to look for another by itself", oif(b.Name), icmpRedirect(), drop()),
			}},
			{name: "postrouting", hook: &hook{nftables.ChainTypeNAT, *nftables.ChainHookPostrouting, 100 - priorityBefore,
				"type nat hook postrouting priority srcnat - 5; policy accept;"}, rules: []rule{
				newRule("", saddr(subnet), notOif(b.Name), notOif("lo"), masquerade()),
			}},
			{name: chainFromGuests, rules: []rule{
				newRule("not looked at by the bridge table", notPinned(), drop()),
				newRule("IPv6 is closed", notIPv4(), drop()),
				newRule("link-local, metadata services among it", daddr(linkLocal), jump(chainRefuse)),
				newRule("another VM", oif(b.Name), jump(chainRefuse)),
				newRule("redirected by others", ctStatusDNAT(), jump(chainRefuse)),
				newRule("would leave with the VM's own address", ctState("invalid"), drop()),
				newRule("too many connections at once", ctState("new"), countedOver(setConnections, connectionsMax), jump(chainRefuse)),
				newRule("", vmapBySource(mapGuests)),
				newRule("a VM that isn't up", jump(chainRefuse)),
			}},
			{name: chainToGuests, rules: []rule{
				newRule("", ctState("established,related"), markAccepted(), accept()),
				newRule("another root's VM, which is answered", pinned(), jump(chainRefuse)),
				newRule("nobody asked for it", drop()),
			}},
			{name: chainRefuse, rules: append([]rule{newRule("", vmapBySource(mapRefusals))}, refuse()...)},
		},
	}
}

// The chains that are only jumped to, by all VMs' packets.
const (
	chainFromGuests = "from_guests"
	chainToGuests   = "to_guests"
	chainRefuse     = "refuse"
)

// linkLocal holds the metadata services of the clouds (169.254.169.254).
var linkLocal = netip.MustParsePrefix("169.254.0.0/16")

// refuse answers at once: TCP by a reset, as the host limits the rate of ICMP
// errors (8 of 192 were answered), anything else by ICMP.
func refuse() []rule {
	return []rule{newRule("", l4proto(unix.IPPROTO_TCP), rejectTCP()), newRule("", rejectICMP())}
}

// bridgeTable pins every TAP to its MAC and address. Its first rule lets other
// ports and bridges of the host be; its last counts and drops whatever a VM
// sends that is neither IPv4 nor ARP in its own name: IPv6, VLAN tags, DHCP,
// router advertisements, spanning tree.
func bridgeTable(b Bridge) table {
	return table{
		family: nftables.TableFamilyBridge,
		name:   tableName(b.Owner),
		sets: []set{
			{name: setTAPs, key: nftables.TypeIFName, byLink: true},
			{name: setPins, key: typePin, byLink: true},
		},
		chains: []chain{
			{name: "prerouting", hook: &hook{nftables.ChainTypeFilter, *nftables.ChainHookPrerouting, -300,
				"type filter hook prerouting priority dstnat; policy accept;"}, rules: []rule{
				newRule("not from a VM", notIifIn(setTAPs), accept()),
				newRule("", etherIPv4(), pinnedIPv4(setPins), markPinned(), accept()),
				newRule("", etherARP(), arpForIPv4(), pinnedARP(setPins), accept()),
				newRule("not in the VM's own name", counter(), drop()),
			}},
		},
	}
}

// guestTables are the parts of the tables that are one VM's: its chains and its
// elements. g is filled.
func guestTables(b Bridge, g Guest) []table {
	inet := table{
		family: nftables.TableFamilyINet,
		name:   tableName(b.Owner),
		sets: []set{
			{name: mapGuests, elements: []element{gotoElement(g.Address, chainOf(g.VM))}},
			{name: mapRefusals, elements: []element{gotoElement(g.Address, refuseChain(g.VM))}},
			{name: mapResolvers},
			{name: setServices},
		},
		chains: []chain{
			{name: chainOf(g.VM), rules: egress(g)},
			{name: refuseChain(g.VM), rules: append([]rule{newRule("", logTo(LogRefused, g.LogGroup))}, refuse()...)},
		},
	}
	if g.filters() {
		inet.own = []set{
			{name: pinsOf(g.VM), key: typeDestination, size: MaxPins, timeout: true},
			{name: allowedOf(g.VM), key: typeDestination, interval: true, elements: allowedElements(g.Allowed)},
		}
	}
	if g.Resolver != 0 {
		inet.sets[2].elements = []element{resolverElement(g.Address, b.Address.Addr(), g.Resolver)}
		inet.sets[3].elements = []element{
			serviceElement(g.Address, unix.IPPROTO_TCP, g.Resolver),
			serviceElement(g.Address, unix.IPPROTO_UDP, g.Resolver),
		}
	}
	return []table{inet, {
		family: nftables.TableFamilyBridge,
		name:   tableName(b.Owner),
		sets: []set{
			{name: setTAPs, elements: []element{tapElement(g.TAP)}},
			{name: setPins, elements: []element{pinElement(g.TAP, g.MAC, g.Address)}},
		},
	}}
}

// egress are the rules of a VM's own chain, for what it sends out into the world.
// What isn't new and isn't part of a connection that was accepted (untracked
// packets) is refused: it would pass without being logged.
func egress(g Guest) []rule {
	refused := jump(refuseChain(g.VM))
	switch {
	case g.NoGateway:
		return []rule{newRule("no gateway", refused)}
	case g.Egress == EgressNone:
		return []rule{newRule("egress none", refused)}
	}
	rules := []rule{newRule("", ctState("established,related"), markAccepted(), accept())}
	if !g.AllowPrivate {
		for _, p := range policy.Private() {
			rules = append(rules, newRule("private", daddr(p), refused))
		}
	}
	if g.Egress == EgressOpen {
		return append(rules,
			newRule("egress open", ctState("new"), logTo(LogAllowed, g.LogGroup), markAccepted(), accept()),
			newRule("", refused))
	}
	return append(rules,
		newRule("what the VM's resolver answered", ctState("new"), destinationIn(pinsOf(g.VM)), logTo(LogAllowed, g.LogGroup), markAccepted(), accept()),
		newRule("allowed without a name", ctState("new"), destinationIn(allowedOf(g.VM)), logTo(LogAllowed, g.LogGroup), markAccepted(), accept()),
		newRule("", refused))
}

// filters says whether the VM has sets of what it may reach.
func (g Guest) filters() bool { return g.Egress == EgressAllowlist && !g.NoGateway }

// filled returns the guest with what it leaves out, and checks it.
func (g Guest) filled(b Bridge) (Guest, error) {
	if g.TAP == "" {
		g.TAP = TAPName(g.Address)
	}
	if g.MAC == nil {
		g.MAC = MAC(g.Address)
	}
	if err := b.check(); err != nil {
		return g, err
	}
	if err := checkVM(g.VM); err != nil {
		return g, err
	}
	if err := checkLink(g.TAP); err != nil {
		return g, err
	}
	if !(Leases{Subnet: b.Address}).usable(g.Address) {
		return g, reason(ErrOutside, "%v is not one that VMs of %v can hold", g.Address, b.Address.Masked())
	}
	if len(g.MAC) != 6 {
		return g, fmt.Errorf("%v is not the MAC of a network card", g.MAC)
	}
	if g.Egress != EgressOpen && g.Egress != EgressAllowlist && g.Egress != EgressNone {
		return g, fmt.Errorf("egress %q is none of %q, %q and %q", g.Egress, EgressOpen, EgressAllowlist, EgressNone)
	}
	for _, d := range g.Allowed {
		if err := d.check(); err != nil {
			return g, err
		}
	}
	return g, nil
}
