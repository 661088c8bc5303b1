package egress

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

func ipv4(proto byte, fragment uint16, payload ...byte) []byte {
	p := []byte{0x45, 0, 0, byte(20 + len(payload)), 0, 0, byte(fragment >> 8), byte(fragment), 64, proto, 0, 0, 192, 168, 83, 10, 149, 154, 167, 220}
	return append(p, payload...)
}

func TestParsePacket(t *testing.T) {
	options := ipv4(6, 0)
	options[0] = 0x46
	options = append(options, 1, 1, 1, 1, 0x9c, 0x40, 1, 0xbb)
	v6 := append([]byte{0x60, 0, 0, 0, 0, 8, 17, 64}, append(netip.MustParseAddr("fe80::1").AsSlice(), netip.MustParseAddr("ff02::2").AsSlice()...)...)
	for name, tc := range map[string]struct {
		etherType uint16
		packet    []byte
		want      string // proto source destination detail
		err       string
	}{
		"tcp":            {unix.ETH_P_IP, ipv4(6, 0, 0x9c, 0x40, 1, 0xbb), "tcp 192.168.83.10:40000 149.154.167.220:443 ", ""},
		"options":        {unix.ETH_P_IP, options, "tcp 192.168.83.10:40000 149.154.167.220:443 ", ""},
		"short tcp":      {unix.ETH_P_IP, ipv4(6, 0, 0x9c, 0x40, 1), "tcp 192.168.83.10 149.154.167.220 ", ""},
		"first fragment": {unix.ETH_P_IP, ipv4(17, 0x2000, 0, 53, 0, 53), "udp 192.168.83.10:53 149.154.167.220:53 ", ""},
		"later fragment": {unix.ETH_P_IP, ipv4(17, 5, 0, 53, 0, 53), "udp 192.168.83.10 149.154.167.220 ", ""},
		"ping":           {unix.ETH_P_IP, ipv4(1, 0, 8, 0), "icmp 192.168.83.10 149.154.167.220 8/0", ""},
		"gre":            {unix.ETH_P_IP, ipv4(47, 0, 1, 2, 3, 4), "47 192.168.83.10 149.154.167.220 ", ""},
		"udp6":           {unix.ETH_P_IPV6, append(v6, 0, 1, 0, 2), "udp [fe80::1]:1 [ff02::2]:2 ", ""},
		"arp":            {unix.ETH_P_ARP, make([]byte, 28), "", "28 bytes of ethertype 0x0806"},
		"nothing":        {unix.ETH_P_IP, nil, "", "0 bytes of ethertype 0x0800"},
		"cut":            {unix.ETH_P_IP, ipv4(6, 0)[:19], "", "19 bytes of ethertype 0x0800"},
		"long header":    {unix.ETH_P_IP, append([]byte{0x4f}, ipv4(6, 0)[1:]...), "", "an IPv4 header of 60 bytes"},
		"short header":   {unix.ETH_P_IP, append([]byte{0x44}, ipv4(6, 0)[1:]...), "", "an IPv4 header of 16 bytes"},
		"version":        {unix.ETH_P_IP, v6, "", "40 bytes of ethertype 0x0800"},
	} {
		t.Run(name, func(t *testing.T) {
			f, detail, err := parsePacket(tc.etherType, tc.packet)
			if tc.err != "" {
				if err == nil || err.Error() != tc.err {
					t.Fatalf("got %v, want %s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := protoName(f.proto) + " " + endpoint(f.source) + " " + endpoint(f.destination) + " " + detail; got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func FuzzParsePacket(f *testing.F) {
	f.Add(uint16(unix.ETH_P_IP), ipv4(6, 0, 1, 2, 3, 4))
	f.Add(uint16(unix.ETH_P_IPV6), make([]byte, 44))
	f.Fuzz(func(t *testing.T, etherType uint16, b []byte) {
		parsed, _, err := parsePacket(etherType, b)
		if err == nil && (!parsed.source.Addr().IsValid() || !parsed.destination.Addr().IsValid()) {
			t.Fatalf("%x: %v", b, parsed)
		}
	})
}

// FuzzDatagram feeds the netlink readers; messages come from the kernel, but what is in them doesn't.
func FuzzDatagram(f *testing.F) {
	f.Add([]byte{20, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0})
	f.Add(append([]byte{32, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 12, 0, 10, 0}, "microvm-"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		w := &Flows{Log: func(Event) {}, open: newLRU[flow, string](10, nil)}
		each(bytes.Clone(b), func(m netlink.Message) { w.packet(m); w.end(m) })
	})
}

func TestSequenceGaps(t *testing.T) {
	var l loss
	for _, tc := range []struct{ seq, missing uint32 }{{7, 0}, {8, 0}, {11, 2}, {5, 0}, {6, 0}, {1<<32 - 1, 0}, {1, 1}} {
		if tc.seq == 1<<32-1 {
			l.next = tc.seq
		}
		if got := l.gap(tc.seq); got != uint64(tc.missing) {
			t.Errorf("number %d: %d missing, want %d", tc.seq, got, tc.missing)
		}
	}
}
