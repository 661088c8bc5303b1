package egress

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"
)

// A flow is what identifies a connection. Ports are 0 where the protocol has none, or the packet didn't show them.
type flow struct {
	proto       uint8
	source      netip.AddrPort
	destination netip.AddrPort
}

// parsePacket reads the addresses and ports of a packet that a guest made, from what was copied of it: its start, from the
// network header on. detail is an ICMP packet's type and code.
func parsePacket(etherType uint16, p []byte) (f flow, detail string, err error) {
	var payload []byte
	var from, to netip.Addr
	first := true
	switch {
	case etherType == unix.ETH_P_IP && len(p) >= 20 && p[0]>>4 == 4:
		header := int(p[0]&0xf) * 4
		if header < 20 || header > len(p) {
			return f, "", fmt.Errorf("an IPv4 header of %d bytes", header)
		}
		f.proto = p[9]
		from, to = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
		first = binary.BigEndian.Uint16(p[6:])&0x1fff == 0
		payload = p[header:]
	case etherType == unix.ETH_P_IPV6 && len(p) >= 40 && p[0]>>4 == 6:
		// Extension headers are not followed: IPv6 is refused whatever it carries.
		f.proto = p[6]
		from, to = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
		payload = p[40:]
	default:
		return f, "", fmt.Errorf("%d bytes of ethertype %#04x", len(p), etherType)
	}
	var sport, dport uint16
	if first {
		switch f.proto {
		case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, unix.IPPROTO_UDPLITE:
			if len(payload) >= 4 {
				sport, dport = binary.BigEndian.Uint16(payload), binary.BigEndian.Uint16(payload[2:])
			}
		case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
			if len(payload) >= 2 {
				detail = fmt.Sprintf("%d/%d", payload[0], payload[1])
			}
		}
	}
	f.source, f.destination = netip.AddrPortFrom(from, sport), netip.AddrPortFrom(to, dport)
	return f, detail, nil
}

func protoName(p uint8) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_ICMPV6:
		return "icmpv6"
	case unix.IPPROTO_SCTP:
		return "sctp"
	}
	return strconv.Itoa(int(p))
}

// endpoint writes address:port, or the address alone.
func endpoint(a netip.AddrPort) string {
	if a.Port() == 0 {
		return a.Addr().String()
	}
	return a.String()
}
