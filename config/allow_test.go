package config

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestParseAllow(t *testing.T) {
	for text, want := range map[string]string{
		"example.com": "[example.com]", "EXAMPLE.com.": "[example.com]", "*.Example.COM.": "[*.example.com]", "faß.example": "[xn--fa-hia.example]",
		"ドメイン.example": "[xn--eckwd4c7c.example]", "a。example": "[a.example]", "xn--bcher-kva.example": "[xn--bcher-kva.example]",
		"example.com:443": "[example.com]", "example.com:80,443,80": "[example.com:80,443]", "example.com:443/udp": "[example.com:443/udp]",
		"example.com/udp": "[example.com:443/udp]", "example.com:123/udp": "[example.com:123/udp]", "example.com/tcp": "[example.com]",
		"203.0.113.7": "[203.0.113.7/32]", "203.0.113.0/24:80": "[203.0.113.0/24:80]", "203.0.113.0/24:53000/udp": "[203.0.113.0/24:53000/udp]",
		"10.0.0.0/8": "[10.0.0.0/8]", "*.github.io": "[*.github.io]", "*.corp.internal": "[*.corp.internal]",
		"telegram": "[api.telegram.org]", "debian": "[deb.debian.org:80,443 security.debian.org:80,443]",
	} {
		got, err := ParseAllow(text)
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("%q: %v, %v; want %s", text, got, err, want)
		}
	}
	if _, err := ParseAllow("https://example.com/x"); err == nil || !strings.HasSuffix(err.Error(), "; want example.com") {
		t.Error(err)
	}
	for _, b := range Bundles() {
		if all, err := ParseAllow(b); err != nil || len(all) == 0 {
			t.Errorf("%s: %v, %v", b, all, err)
		}
	}
}

func TestTenThousandAllowed(t *testing.T) {
	var b strings.Builder
	b.WriteString("image: tiny\negress:\n  allow:\n")
	for i := range maxAllow {
		fmt.Fprintf(&b, "    - host%d.example.com\n", i)
	}
	begun := time.Now()
	vm, err := Parse("x", "/x.yaml", []byte(b.String()), nil)
	if err != nil || len(vm.Egress.Allow) != maxAllow || vm.Egress.Allow[9999].Name != "host9999.example.com" {
		t.Fatalf("%v", err)
	}
	t.Logf("read in %s", time.Since(begun))
	b.WriteString("    - one.more.example.com\n")
	if _, err := Parse("x", "/x.yaml", []byte(b.String()), nil); err == nil || !strings.Contains(err.Error(), "egress.allow: are 10001; want 10000 at most") {
		t.Error(err)
	}
}

// FuzzAllow looks that what is taken for an entry prints as one that means the same, and holds nothing but what it may.
func FuzzAllow(f *testing.F) {
	for _, s := range []string{"example.com", "*.example.com:80,443/udp", "203.0.113.0/24:22", "bücher.example", "telegram", "https://x", "1.2.3.4", "[::1]:443", "a/b", ":", "*.", "a:/udp"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		all, err := ParseAllow(s)
		if err != nil {
			if unprintable(err.Error()) || len(err.Error()) > maxProblem {
				t.Errorf("the refusal of %q: %q", s, err)
			}
			return
		}
		for _, a := range all {
			again, err := ParseAllow(a.String())
			if err != nil || len(again) != 1 || !again[0].Equal(a) {
				t.Errorf("%q is %+v, which prints as %s and reads as %+v, %v", s, a, a, again, err)
			}
			name := strings.TrimPrefix(a.Name, "*.")
			if (a.Name == "") == (a.Prefix == netip.Prefix{}) || a.Name != "" && !isDomain(name) || len(a.Ports) == 0 || a.Name != "" && !strings.Contains(a.Name, ".") {
				t.Errorf("%q is %+v", s, a)
			}
		}
	})
}
