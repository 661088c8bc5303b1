package egress

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// logged is the kernel's message of a packet that a rule logged.
func logged(prefix string, etherType uint16, sequence uint32, payload []byte) []byte {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Bytes(nfulaPacketHdr, binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, etherType), 0)[:4])
	ae.String(nfulaPrefix, prefix)
	ae.Bytes(nfulaPayload, payload)
	ae.Uint32(nfulaSeq, sequence)
	attributes, err := ae.Encode()
	if err != nil {
		return nil
	}
	b := binary.NativeEndian.AppendUint32(nil, uint32(netlinkHeaderSize+netfilterHeaderSize+len(attributes)))
	b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_ULOG<<8|nfulnlMsgPacket)
	b = append(b, make([]byte, netlinkHeaderSize-6+netfilterHeaderSize)...)
	return append(b, attributes...)
}

// FuzzLoggedPacket makes the kernel's message around what a guest puts on the wire, as often as it likes.
func FuzzLoggedPacket(f *testing.F) {
	f.Add(PrefixAllowed, uint16(unix.ETH_P_IP), uint32(1), ipv4(6, 0, 1, 2, 3, 4))
	f.Add(PrefixRefused+"host", uint16(unix.ETH_P_IP), uint32(9), ipv4(17, 0, 1, 2, 3, 4))
	f.Add(PrefixRefused+"v6", uint16(unix.ETH_P_IPV6), uint32(1<<31), make([]byte, 48))
	f.Add(PrefixRefused+"\x1b[2J", uint16(unix.ETH_P_ARP), uint32(0), []byte{})
	f.Fuzz(func(t *testing.T, prefix string, etherType uint16, sequence uint32, payload []byte) {
		if len(prefix) > 127 || len(payload) > copyRange {
			return // the kernel's own bounds
		}
		var events []Event
		w := &Flows{VM: "x", Address: netip.MustParseAddr("192.0.2.1"), Log: func(e Event) { events = append(events, e) }, open: newLRU[flow, string](10, nil)}
		for range 2 {
			each(logged(prefix, etherType, sequence, payload), func(m netlink.Message) { w.packets.add(w.packet(m)) })
		}
		w.reportLoss()
		for _, e := range events {
			line := string(e.appendJSON(nil))
			if strings.ContainsFunc(line, func(r rune) bool { return r < ' ' }) || len(line) > maxLine {
				t.Errorf("a line of %d bytes: %q", len(line), line)
			}
			if e.Kind == KindOpen && (e.Verdict != Allowed && e.Verdict != Refused) {
				t.Errorf("no verdict: %+v", e)
			}
			if time.Since(e.Time) > time.Hour {
				t.Errorf("no time: %+v", e)
			}
		}
	})
}
