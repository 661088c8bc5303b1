package network

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// rule is one rule: what the nft program shows for it, and the kernel's expressions.
type rule struct {
	text    string
	comment string
	exprs   []expr.Any
}

// part is a piece of a rule. Each function below writes one, the text that the
// nft program lists beside the expressions that it makes of that text; a test
// compares what it lists with the texts.
type part struct {
	text  string
	exprs []expr.Any
}

func newRule(comment string, parts ...part) rule {
	r := rule{comment: comment}
	var words []string
	for _, p := range parts {
		if p.text != "" {
			words = append(words, p.text)
		}
		r.exprs = append(r.exprs, p.exprs...)
	}
	r.text = strings.Join(words, " ")
	return r
}

// fingerprintType is the kind of user data that a rule's fingerprint is kept
// under in the kernel. The nft program knows 0 (a comment) and 1, and passes
// over others.
const fingerprintType userdata.Type = 0xc1

// userData is what is kept with a rule: its comment and a fingerprint of its
// expressions, so that a look at it tells whether it is the one that was put there.
func (r rule) userData(family nftables.TableFamily) ([]byte, error) {
	sum := sha256.New()
	for _, e := range r.exprs {
		b, err := expr.Marshal(byte(family), e)
		if err != nil {
			return nil, fmt.Errorf("rule %q: %w", r.text, err)
		}
		if _, err := sum.Write(b); err != nil {
			return nil, err
		}
	}
	var data []byte
	if r.comment != "" {
		data = userdata.AppendString(data, userdata.TypeComment, r.comment)
	}
	return userdata.Append(data, fingerprintType, sum.Sum(nil)[:8]), nil
}

// Registers: 1 is 16 bytes long and enough for one value. The parts of a
// concatenated key lie one after the other in words of 4 bytes, which are
// numbered from regWord; so the second 16 bytes begin at regWord+4.
const (
	reg     = 1
	regWord = unix.NFT_REG32_00
)

// Offsets in the headers, in bytes.
const (
	etherSource = 6
	etherType   = 12
	ipSource    = 12
	ipDest      = 16
	arpFormat   = 0 // hardware type, protocol type
	arpLengths  = 4 // of a hardware and of a protocol address
	arpMAC      = 8 // the sender's
	arpIP       = 14
	portDest    = 2 // of TCP and UDP
)

func load(base expr.PayloadBase, offset, length, to uint32) expr.Any {
	return &expr.Payload{OperationType: expr.PayloadLoad, Base: base, Offset: offset, Len: length, DestRegister: to}
}

func loadMeta(key expr.MetaKey, to uint32) expr.Any { return &expr.Meta{Key: key, Register: to} }

func equals(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: data}
}

func differs(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: data}
}

// and32 leaves of a word in the host's byte order what the mask has, and sets bits.
func and32(mask, set uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4,
		Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: binaryutil.NativeEndian.PutUint32(set)}
}

// linkKey is a link's name as the kernel compares it: 16 bytes, closed by zeros.
func linkKey(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func iif(link string) part {
	return part{fmt.Sprintf("iifname %q", link), []expr.Any{loadMeta(expr.MetaKeyIIFNAME, reg), equals(linkKey(link))}}
}

func notIif(link string) part {
	return part{fmt.Sprintf("iifname != %q", link), []expr.Any{loadMeta(expr.MetaKeyIIFNAME, reg), differs(linkKey(link))}}
}

func notIifIn(set string) part {
	return part{"iifname != @" + set, []expr.Any{loadMeta(expr.MetaKeyIIFNAME, reg),
		&expr.Lookup{SourceRegister: reg, SetName: set, Invert: true}}}
}

func oif(link string) part {
	return part{fmt.Sprintf("oifname %q", link), []expr.Any{loadMeta(expr.MetaKeyOIFNAME, reg), equals(linkKey(link))}}
}

func notOif(link string) part {
	return part{fmt.Sprintf("oifname != %q", link), []expr.Any{loadMeta(expr.MetaKeyOIFNAME, reg), differs(linkKey(link))}}
}

// ipv4 is what must go before a look at the IPv4 header in the inet family.
func ipv4() []expr.Any {
	return []expr.Any{loadMeta(expr.MetaKeyNFPROTO, reg), equals([]byte{unix.NFPROTO_IPV4})}
}

func notIPv4() part {
	return part{"meta nfproto != ipv4", []expr.Any{loadMeta(expr.MetaKeyNFPROTO, reg), differs([]byte{unix.NFPROTO_IPV4})}}
}

func address(word string, offset uint32, p netip.Prefix) part {
	a, text := p.Masked().Addr().As4(), p.String()
	e := append(ipv4(), load(expr.PayloadBaseNetworkHeader, offset, 4, reg))
	if p.Bits() == 32 {
		text = p.Addr().String()
	} else {
		mask := net.CIDRMask(p.Bits(), 32)
		e = append(e, &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: mask, Xor: make([]byte, 4)})
	}
	return part{word + " " + text, append(e, equals(a[:]))}
}

func saddr(p netip.Prefix) part { return address("ip saddr", ipSource, p) }
func daddr(p netip.Prefix) part { return address("ip daddr", ipDest, p) }

var protocols = map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}

func l4proto(proto uint8) part {
	return part{"meta l4proto " + protocols[proto], []expr.Any{loadMeta(expr.MetaKeyL4PROTO, reg), equals([]byte{proto})}}
}

func dport(proto uint8, port uint16) part {
	return part{fmt.Sprintf("%s dport %d", protocols[proto], port), append(l4proto(proto).exprs,
		load(expr.PayloadBaseTransportHeader, portDest, 2, reg), equals(binaryutil.BigEndian.PutUint16(port)))}
}

// icmpTypeRedirect is the ICMP message of RFC 792 by which a router sends a host to another.
const icmpTypeRedirect = 5

func icmpRedirect() part {
	return part{"icmp type redirect", append(ipv4(), loadMeta(expr.MetaKeyL4PROTO, reg), equals([]byte{unix.IPPROTO_ICMP}),
		load(expr.PayloadBaseTransportHeader, 0, 1, reg), equals([]byte{icmpTypeRedirect}))}
}

var ctStates = map[string]uint32{
	"new":                 expr.CtStateBitNEW,
	"invalid":             expr.CtStateBitINVALID,
	"established,related": expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED,
}

func ctState(states string) part {
	return part{"ct state " + states, []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: reg},
		and32(ctStates[states], 0), differs(make([]byte, 4))}}
}

// connlimitInverted is NFT_CONNLIMIT_F_INV of linux/netfilter/nf_tables.h: more than so many, and not up to.
const connlimitInverted = 1

// countedOver takes a connection of who has more than so many at once, this one
// included, by a set that counts them for each address that they come from.
func countedOver(set string, most uint32) part {
	return part{fmt.Sprintf("add @%s { ip saddr ct count over %d }", set, most), append(ipv4(),
		load(expr.PayloadBaseNetworkHeader, ipSource, 4, reg),
		&expr.Dynset{SrcRegKey: reg, SetName: set, Operation: unix.NFT_DYNSET_OP_ADD,
			Exprs: []expr.Any{&expr.Connlimit{Count: most, Flags: connlimitInverted}}})}
}

// ctStatusDNATBit is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const ctStatusDNATBit = 1 << 5

func ctStatusDNAT() part {
	return part{"ct status dnat", []expr.Any{&expr.Ct{Key: expr.CtKeySTATUS, Register: reg},
		and32(ctStatusDNATBit, 0), differs(make([]byte, 4))}}
}

func pinned() part {
	return part{fmt.Sprintf("meta mark & 0x%08x == 0x%08x", MarkPinnedMask, MarkPinned), []expr.Any{loadMeta(expr.MetaKeyMARK, reg),
		and32(MarkPinnedMask, 0), equals(binaryutil.NativeEndian.PutUint32(MarkPinned))}}
}

func notPinned() part {
	return part{fmt.Sprintf("meta mark & 0x%08x != 0x%08x", MarkPinnedMask, MarkPinned), []expr.Any{loadMeta(expr.MetaKeyMARK, reg),
		and32(MarkPinnedMask, 0), differs(binaryutil.NativeEndian.PutUint32(MarkPinned))}}
}

// setMark sets a part of the mark. The nft program shows the bits to be set in
// the mask too; the kernel's word is (mark & mask) ^ bits.
func setMark(mask, bits uint32) part {
	return part{fmt.Sprintf("meta mark set meta mark & 0x%08x | 0x%08x", ^mask|bits, bits), []expr.Any{loadMeta(expr.MetaKeyMARK, reg),
		and32(^mask, bits), &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg}}}
}

func markAccepted() part { return setMark(MarkAcceptedMask, MarkAccepted) }
func markPinned() part   { return setMark(MarkPinnedMask, MarkPinned) }

// notForHost takes what isn't for one of the host's own addresses, on whatever link.
func notForHost() part {
	return part{"fib daddr type != local", []expr.Any{&expr.Fib{Register: reg, FlagDADDR: true, ResultADDRTYPE: true},
		differs(binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL))}}
}

func accept() part { return part{"accept", []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}} }
func drop() part   { return part{"drop", []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}} }

func jump(chain string) part {
	return part{"goto " + chain, []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}}
}

func counter() part { return part{"counter packets 0 bytes 0", []expr.Any{&expr.Counter{}}} }

func rejectTCP() part {
	return part{"reject with tcp reset", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}

func rejectICMP() part {
	return part{"reject with icmpx admin-prohibited", []expr.Any{
		&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}}
}

func masquerade() part { return part{"masquerade", []expr.Any{&expr.Masq{}}} }

func logTo(prefix string, group uint16) part {
	return part{fmt.Sprintf("log prefix %q group %d", prefix, group), []expr.Any{&expr.Log{
		Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX, Group: group, Data: []byte(prefix)}}}
}

func vmapBySource(name string) part {
	return part{"ip saddr vmap @" + name, append(ipv4(), load(expr.PayloadBaseNetworkHeader, ipSource, 4, reg),
		&expr.Lookup{SourceRegister: reg, SetName: name, IsDestRegSet: true, DestRegister: unix.NFT_REG_VERDICT})}
}

// dnatBy looks the resolver's address and port up by the source: the address
// goes to the first word of register 1, the port to the second.
func dnatBy(name string) part {
	return part{"dnat ip to ip saddr map @" + name, append(ipv4(), load(expr.PayloadBaseNetworkHeader, ipSource, 4, reg),
		&expr.Lookup{SourceRegister: reg, SetName: name, IsDestRegSet: true, DestRegister: reg},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg, RegProtoMin: regWord + 1, Specified: true})}
}

func serviceIn(set string) part {
	return part{"ip saddr . meta l4proto . th dport @" + set, append(ipv4(), load(expr.PayloadBaseNetworkHeader, ipSource, 4, regWord),
		loadMeta(expr.MetaKeyL4PROTO, regWord+1), load(expr.PayloadBaseTransportHeader, portDest, 2, regWord+2),
		&expr.Lookup{SourceRegister: regWord, SetName: set})}
}

func destinationIn(set string) part {
	return part{"ip daddr . meta l4proto . th dport @" + set, append(ipv4(), load(expr.PayloadBaseNetworkHeader, ipDest, 4, regWord),
		loadMeta(expr.MetaKeyL4PROTO, regWord+1), load(expr.PayloadBaseTransportHeader, portDest, 2, regWord+2),
		&expr.Lookup{SourceRegister: regWord, SetName: set})}
}

// The type in the Ethernet header is compared as it was sent: a frame with a
// VLAN tag has the tag's there, even where the kernel has taken the tag off.
func ether(proto uint16) part {
	return part{"", []expr.Any{load(expr.PayloadBaseLLHeader, etherType, 2, reg), equals(binaryutil.BigEndian.PutUint16(proto))}}
}

func etherIPv4() part { return ether(unix.ETH_P_IP) }
func etherARP() part  { return ether(unix.ETH_P_ARP) }

func pinnedIPv4(set string) part {
	return part{"iifname . ether saddr . ip saddr @" + set, []expr.Any{loadMeta(expr.MetaKeyIIFNAME, regWord),
		load(expr.PayloadBaseLLHeader, etherSource, 6, regWord+4), load(expr.PayloadBaseNetworkHeader, ipSource, 4, regWord+6),
		&expr.Lookup{SourceRegister: regWord, SetName: set}}}
}

// arpForIPv4 takes ARP for IPv4 over Ethernet only, in which the sender lies where pinnedARP looks.
func arpForIPv4() part {
	return part{"arp htype 1 arp ptype ip arp hlen 6 arp plen 4", []expr.Any{
		load(expr.PayloadBaseNetworkHeader, arpFormat, 4, reg), equals([]byte{0, 1, 8, 0}),
		load(expr.PayloadBaseNetworkHeader, arpLengths, 2, reg), equals([]byte{6, 4})}}
}

// pinnedARP wants both senders, the frame's and the one in the message, to be the VM.
func pinnedARP(set string) part {
	sender := func(base expr.PayloadBase, mac uint32) []expr.Any {
		return []expr.Any{loadMeta(expr.MetaKeyIIFNAME, regWord), load(base, mac, 6, regWord+4),
			load(expr.PayloadBaseNetworkHeader, arpIP, 4, regWord+6), &expr.Lookup{SourceRegister: regWord, SetName: set}}
	}
	return part{"iifname . ether saddr . arp saddr ip @" + set + " iifname . arp saddr ether . arp saddr ip @" + set,
		append(sender(expr.PayloadBaseLLHeader, etherSource), sender(expr.PayloadBaseNetworkHeader, arpMAC)...)}
}

// The types of concatenated keys and values; each part fills whole words of 4 bytes.
var (
	typeService      = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	typeGuestService = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	typeDestination  = typeGuestService
	typePin          = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr)
)

func word(a netip.Addr) []byte { b := a.As4(); return b[:] }

func portWord(port uint16) []byte { return append(binary.BigEndian.AppendUint16(nil, port), 0, 0) }

func gotoElement(a netip.Addr, chain string) element {
	return element{text: fmt.Sprintf("%v : goto %s", a, chain), key: word(a), chain: chain}
}

func resolverElement(a, to netip.Addr, port uint16) element {
	return element{text: fmt.Sprintf("%v : %v . %d", a, to, port), key: word(a), value: append(word(to), portWord(port)...)}
}

func serviceElement(a netip.Addr, proto uint8, port uint16) element {
	key := append(word(a), proto, 0, 0, 0)
	return element{text: fmt.Sprintf("%v . %s . %d", a, protocols[proto], port), key: append(key, portWord(port)...)}
}

func tapElement(tap string) element {
	return element{text: fmt.Sprintf("%q", tap), key: linkKey(tap)}
}

func pinElement(tap string, mac net.HardwareAddr, a netip.Addr) element {
	key := append(linkKey(tap), mac...)
	return element{text: fmt.Sprintf("%q . %v . %v", tap, mac, a), key: append(append(key, 0, 0), word(a)...)}
}
