package integration

import (
	"testing"

	"github.com/vishvananda/netlink"
)

func tap(name string) netlink.Link {
	return &netlink.Tuntap{LinkAttrs: linkAttrs(name), Mode: netlink.TUNTAP_MODE_TAP}
}

func bridge(name string) netlink.Link { return &netlink.Bridge{LinkAttrs: linkAttrs(name)} }

func linkAttrs(name string) netlink.LinkAttrs {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return attrs
}

// addLink makes a link, which what is tested is to remove.
func addLink(t *testing.T, link netlink.Link, alias string) {
	t.Helper()
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	if alias != "" {
		if err := netlink.LinkSetAlias(link, alias); err != nil {
			t.Fatal(err)
		}
	}
}

// keepLink makes a link for the length of the test, which has to be there at its end.
func keepLink(t *testing.T, link netlink.Link, alias string) {
	t.Helper()
	addLink(t, link, alias)
	t.Cleanup(func() {
		if err := netlink.LinkDel(link); err != nil {
			t.Error(err)
		}
	})
}
