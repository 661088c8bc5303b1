package config

import (
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
	"golang.org/x/net/publicsuffix"
)

// Allow is something that a VM may reach: a name, all names below one, or addresses. Exactly one of Name and Prefix is set.
type Allow struct {
	Name     string       `json:"name,omitempty"` // lower case, ASCII, without the final dot; "*.example.com": all names below example.com
	Prefix   netip.Prefix `json:"prefix,omitzero"`
	Protocol string       `json:"protocol"` // ProtocolTCP or ProtocolUDP
	Ports    []uint16     `json:"ports"`    // sorted, at least one
}

// What Allow.Protocol may say.
const (
	ProtocolTCP = "tcp"
	ProtocolUDP = "udp"
)

// String is the entry in its shortest form, as the declaration has it.
func (a Allow) String() string {
	s := a.Name
	if s == "" {
		s = a.Prefix.String()
	}
	common := slices.Equal(a.Ports, []uint16{portHTTPS})
	if !common || a.Protocol == ProtocolUDP {
		for i, n := range a.Ports {
			sign := ","
			if i == 0 {
				sign = ":"
			}
			s += sign + strconv.Itoa(int(n))
		}
	}
	if a.Protocol == ProtocolUDP {
		s += "/udp"
	}
	return s
}

// Equal says whether both are the same.
func (a Allow) Equal(b Allow) bool {
	return a.Name == b.Name && a.Prefix == b.Prefix && a.Protocol == b.Protocol && slices.Equal(a.Ports, b.Ports)
}

const (
	portDNS        = 53
	portHTTPS      = 443
	portDNSOverTLS = 853

	maxAllow      = 10_000 // a list of all that somebody's programs ever reached; more is a block list turned inside out
	maxAllowPorts = 16     // each takes a place in the packet filter's set for each address of the name
	maxDomain     = 253    // RFC 1035, written
	minPrefix     = 8      // IANA gives out no more at once; what is wider is a way to write "everything"
)

// bundles are what the services of a name are reached by: for their API, not for people's browsers.
var bundles = map[string][]string{
	"anthropic":  {"api.anthropic.com"},
	"debian":     {"deb.debian.org:80,443", "security.debian.org:80,443"},
	"github":     {"github.com", "api.github.com", "codeload.github.com", "uploads.github.com", "*.githubusercontent.com"},
	"npm":        {"registry.npmjs.org"},
	"openai":     {"api.openai.com"},
	"openrouter": {"openrouter.ai"},
	"telegram":   {"api.telegram.org"},
}

// Bundles are the names of the bundles, sorted.
func Bundles() []string { return slices.Sorted(maps.Keys(bundles)) }

const wantAllow = `a name such as api.example.com, all names below one (*.example.com), an address or a network, with its ports where they aren't 443 (example.com:80,443), or a bundle`

// ParseAllow reads one entry of egress.allow in its text form. A bundle makes several. What is wrong with it, and what would be
// right, are in the error.
func ParseAllow(s string) ([]Allow, error) {
	all, wrong, want := parseAllow(s)
	if wrong != "" {
		if want != "" {
			wrong += "; want " + want
		}
		return nil, fmt.Errorf("%s", wrong)
	}
	return all, nil
}

// parseAllow is ParseAllow for who has the two apart.
func parseAllow(s string) (all []Allow, wrong, want string) {
	if texts, ok := bundles[s]; ok {
		for _, t := range texts {
			one, wrong, want := parseTarget(t, nil, "")
			if wrong != "" {
				return nil, wrong, want
			}
			all = append(all, one)
		}
		return all, "", ""
	}
	one, wrong, want := parseTarget(s, nil, "")
	if wrong != "" {
		return nil, wrong, want
	}
	return []Allow{one}, "", ""
}

// parseTarget reads HOST[:PORT,…][/PROTOCOL]. Ports and a protocol that are declared beside it leave none to be in the text.
func parseTarget(s string, ports []uint16, protocol string) (a Allow, wrong, want string) {
	if wrong, want := notATarget(s); wrong != "" {
		return a, wrong, want
	}
	host := s
	a.Protocol = ProtocolTCP
	if i := strings.LastIndexByte(host, '/'); i >= 0 && (host[i+1:] == ProtocolTCP || host[i+1:] == ProtocolUDP) {
		a.Protocol = host[i+1:]
		if host = host[:i]; protocol != "" {
			return a, quoted(s) + " has a protocol, and so has its entry", "one of the two"
		}
	}
	if protocol != "" {
		a.Protocol = protocol
	}
	a.Ports = []uint16{portHTTPS}
	host, list, given := strings.Cut(host, ":")
	switch {
	case given && ports != nil:
		return a, quoted(s) + " has a port, and so has its entry", "one of the two"
	case given:
		a.Ports = nil
		for text := range strings.SplitSeq(list, ",") {
			n, ok := portNumber(text)
			if !ok {
				return a, quoted(text) + " is no port", host + ":PORT, from 1 to 65535"
			}
			a.Ports = append(a.Ports, n)
		}
	case ports != nil:
		a.Ports = slices.Clone(ports)
	}
	if a.Ports, wrong, want = checkAllowPorts(a.Ports); wrong != "" {
		return a, wrong, want
	}
	if p, err := netip.ParsePrefix(host); err == nil {
		a.Prefix, wrong, want = checkNetwork(p)
		return a, wrong, want
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		a.Prefix, wrong, want = checkNetwork(netip.PrefixFrom(addr, addr.BitLen()))
		return a, wrong, want
	}
	a.Name, wrong, want = domain(host)
	return a, wrong, want
}

// notATarget recognises what people write where a name is wanted.
func notATarget(s string) (wrong, want string) {
	switch {
	case s == "" || !utf8.ValidString(s) || unprintable(s) || strings.ContainsAny(s, " \t"):
		return quoted(s) + " is neither a name nor an address", wantAllow
	case s == "*" || s == "*.*":
		return quoted(s) + " would allow everything", "mode: open, which allows everything and logs it"
	case strings.Contains(s, "://"):
		u, err := url.Parse(s)
		if err != nil || u.Hostname() == "" {
			return quoted(s) + " is a URL", wantAllow
		}
		meant := u.Hostname()
		switch {
		case u.Port() != "" && u.Port() != "443":
			meant += ":" + u.Port()
		case u.Port() == "" && u.Scheme == "http":
			meant += ":80"
		}
		return quoted(s) + " is a URL; what leaves a VM is known by name and port", plainWant(meant, wantAllow)
	case strings.ContainsAny(s, "@?#"):
		return quoted(s) + " is neither a name nor an address", wantAllow
	case strings.HasPrefix(s, "["), strings.Count(s, ":") > 1:
		return quoted(s) + " is an IPv6 address, and a VM has no IPv6", "a name, or an IPv4 address"
	}
	return "", ""
}

// plainWant is what was meant, if it can be shown.
func plainWant(want, instead string) string {
	if unprintable(want) || len(want) > maxDomain {
		return instead
	}
	return want
}

func checkAllowPorts(ports []uint16) (sorted []uint16, wrong, want string) {
	sorted = slices.Compact(slices.Sorted(slices.Values(ports)))
	switch {
	case len(sorted) == 0:
		return nil, "has no ports", "one at least, or no ports, which means 443"
	case len(sorted) > maxAllowPorts:
		return nil, fmt.Sprintf("has %d ports", len(sorted)), fmt.Sprintf("%d at most", maxAllowPorts)
	case slices.Contains(sorted, portDNS):
		return nil, "has the port 53, which leads to the VM's own resolver whatever the address", "no port 53: allowed names are answered anyway"
	case slices.Contains(sorted, portDNSOverTLS):
		return nil, "has the port 853, and DNS over TLS would go past the VM's own resolver", "no port 853: allowed names are answered anyway"
	}
	return sorted, "", ""
}

const wantPrivate = "egress.allowPrivate: true beside it"

// private says what is private about the entry's addresses, or nothing.
func (a Allow) private() string {
	if what, private := specialAddress(a.Prefix); a.Name == "" && private {
		return what
	}
	return ""
}

// CheckPrivate is an error when the entry is of private addresses, and those aren't allowed.
func (a Allow) CheckPrivate(allowed bool) error {
	if what := a.private(); what != "" && !allowed {
		return fmt.Errorf("%s is %s; want %s", a.Prefix, what, wantPrivate)
	}
	return nil
}

// checkNetwork looks at addresses that are to be allowed; private ones are crossCheck's, which knows allowPrivate.
func checkNetwork(p netip.Prefix) (netip.Prefix, string, string) {
	switch {
	case !p.Addr().Is4():
		return p, p.String() + " is of IPv6, and a VM has no IPv6", "an IPv4 network"
	case p.Masked() != p:
		return p, p.String() + " has bits after its mask", p.Masked().String()
	case p.Bits() < minPrefix:
		return p, p.String() + " is a large part of the internet", "networks of 8 bits at least, or mode: open, which allows everything and logs it"
	}
	if what, private := specialAddress(p); what != "" && !private {
		return p, p.String() + " is " + what + ", which no VM reaches", "a public or private network"
	}
	return p, "", ""
}

// specialAddress says what is special about a network, all of whose addresses are so, or nothing.
func specialAddress(p netip.Prefix) (what string, private bool) {
	for _, s := range SpecialNetworks() {
		if s.Prefix.Bits() <= p.Bits() && s.Prefix.Contains(p.Addr()) {
			return s.What, s.Private
		}
	}
	return "", false
}

// toASCII maps a name as browsers do (UTS 46), but lets the underscore be, which some hosts have.
var toASCII = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.StrictDomainName(false), idna.Transitional(false))

// domain reads a name, or all names below one.
func domain(s string) (name, wrong, want string) {
	const lastResort = "a name such as api.example.com"
	below, isSuffix := strings.CutPrefix(s, "*.")
	if strings.Contains(below, "*") {
		want := lastResort + ", or *.example.com"
		if i := strings.LastIndexByte(below, '*'); strings.HasPrefix(below[i+1:], ".") {
			want = "*" + below[i+1:] + " for all names below it"
		}
		return "", quoted(s) + " has a * that isn't the whole first part", plainWant(want, lastResort)
	}
	if strings.HasPrefix(s, ".") {
		return "", quoted(s) + " begins with a dot", plainWant("*"+s+" for all names below it", lastResort)
	}
	if strings.Contains(s, "/") {
		host, _, _ := strings.Cut(s, "/")
		if _, err := netip.ParseAddr(host); err == nil {
			return "", quoted(s) + " is no network", "an address, and the bits of its mask from 8 to 32"
		}
		return "", quoted(s) + " has a path", plainWant(host+", as what leaves a VM is known by name and port", lastResort)
	}
	ascii, err := toASCII.ToASCII(below)
	ascii = strings.ToLower(strings.TrimSuffix(ascii, "."))
	if again, aerr := toASCII.ToASCII(ascii); err != nil || aerr != nil || again != ascii || !isDomain(ascii) {
		return "", quoted(s) + " is no name", lastResort
	}
	labels := strings.Split(ascii, ".")
	if strings.Trim(labels[len(labels)-1], "0123456789") == "" {
		return "", quoted(s) + " is neither a name nor an address", "four numbers from 0 to 255 for an address"
	}
	if len(labels) == 1 && !isSuffix {
		want := "a name with a dot, or one of the bundles " + strings.Join(Bundles(), ", ")
		if meant := nearest(ascii, Bundles()); meant != "" {
			want = meant + ", most likely"
		}
		return "", quoted(s) + " is no bundle, and no whole name", want
	}
	if isSuffix {
		if suffix, icann := publicsuffix.PublicSuffix(ascii); icann && suffix == ascii {
			return "", quoted(s) + " would allow a part of the internet that anybody can have a name in", "the names below one owner's, such as *.example." + ascii
		}
		if ascii = "*." + ascii; len(ascii) > maxDomain {
			return "", quoted(s) + " is too long for a name", lastResort
		}
	}
	return ascii, "", ""
}

// isDomain says whether s can be asked of name servers as a host's name.
func isDomain(s string) bool {
	if s == "" || len(s) > maxDomain {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > maxLabel || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return true
}
