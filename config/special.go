package config

import "net/netip"

// SpecialNetwork is a part of the address space that isn't the public internet's.
type SpecialNetwork struct {
	Prefix  netip.Prefix
	What    string // what its addresses are
	Private bool   // egress.allowPrivate opens it
}

// SpecialNetworks are the IPv4 part of IANA's special-purpose registry (RFC 6890), but for the networks of documentation, which
// lead nowhere, and those of relays and anycast, which are public.
func SpecialNetworks() []SpecialNetwork {
	return []SpecialNetwork{
		{netip.MustParsePrefix("10.0.0.0/8"), "private", true},
		{netip.MustParsePrefix("172.16.0.0/12"), "private", true},
		{netip.MustParsePrefix("192.168.0.0/16"), "private", true},
		{netip.MustParsePrefix("100.64.0.0/10"), "of a provider's inner network (CGNAT)", true},
		{netip.MustParsePrefix("169.254.0.0/16"), "link-local, as metadata services are", false},
		{netip.MustParsePrefix("127.0.0.0/8"), "loopback", false},
		{netip.MustParsePrefix("0.0.0.0/8"), "no host's", false},
		{netip.MustParsePrefix("192.0.0.0/24"), "reserved", false},
		{netip.MustParsePrefix("198.18.0.0/15"), "for benchmarks", false},
		{netip.MustParsePrefix("224.0.0.0/4"), "multicast", false},
		{netip.MustParsePrefix("240.0.0.0/4"), "reserved", false},
	}
}
