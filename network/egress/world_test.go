package egress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

var (
	guestAddr  = netip.MustParseAddr("10.77.0.2")
	gateAddr   = netip.MustParseAddr("10.77.0.1")
	serverAddr = netip.MustParseAddr("10.88.0.2")
	closedAddr = netip.MustParseAddr("10.88.0.3")
)

const testGroup = 4711

// A world is a guest, a host that forwards and masquerades (the test's own namespace), and a server outside.
type world struct{ guest, outside netns.NsHandle }

func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	needLoopback(t)
	w := &world{guest: newNamespace(t), outside: newNamespace(t)}
	w.link(t, "guest0", w.guest, gateAddr, guestAddr)
	w.link(t, "outside0", w.outside, netip.MustParseAddr("10.88.0.1"), serverAddr)
	sysctl(t, "net/ipv4/ip_forward", "1")
	rules := fmt.Sprintf(`
table ip egress_test {
	chain passing { type filter hook forward priority 0;
		ip daddr %s log prefix "microvm-refused: another VM" group %d
		ip daddr %[1]s meta l4proto tcp reject with tcp reset
		ct state new log prefix "microvm-egress: " group %[2]d
	}
	chain coming { type filter hook input priority 0;
		iifname "guest0" ct state new log prefix "microvm-egress: " group %[2]d
	}
	chain leaving { type nat hook postrouting priority 100;
		oifname "outside0" masquerade
	}
}`, closedAddr, testGroup)
	nft := exec.Command("nft", "-f", "-")
	nft.Stdin = strings.NewReader(rules)
	if out, err := nft.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("nft", "delete", "table", "ip", "egress_test").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if _, err := CutFlows(guestAddr, nil); err != nil {
			t.Error(err)
		}
	})
	if _, err := EnableAccounting(); err != nil {
		t.Fatal(err)
	}
	return w
}

func sysctl(t *testing.T, key, value string) {
	t.Helper()
	path := "/proc/sys/" + key
	old, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, []byte(value), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, old, 0); err != nil {
			t.Error(err)
		}
	})
}

func newNamespace(t *testing.T) netns.NsHandle {
	t.Helper()
	type result struct {
		ns  netns.NsHandle
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ns, err := netns.New()
		made <- result{ns, err}
	}()
	r := <-made
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.ns.Close() })
	return r.ns
}

// in runs f in a namespace.
func in(t *testing.T, ns netns.NsHandle, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// link connects a namespace with the test's own.
func (w *world) link(t *testing.T, name string, ns netns.NsHandle, here, there netip.Addr) {
	t.Helper()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(ns))}); err != nil {
		t.Fatal(err)
	}
	up := func(name string, a netip.Addr) (netlink.Link, error) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return nil, err
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(24, 32)}}
		return l, errors.Join(netlink.AddrAdd(l, addr), netlink.LinkSetUp(l))
	}
	l, err := up(name, here)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(l); err != nil {
			t.Error(err)
		}
	})
	in(t, ns, func() error {
		if _, err := up("eth0", there); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Gw: here.AsSlice()})
	})
}

// talk makes one connection from the guest to the server outside: so many bytes there, so many back. It returns the guest's end.
func (w *world) talk(t *testing.T, out, back int) netip.AddrPort {
	t.Helper()
	var l net.Listener
	in(t, w.outside, func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(serverAddr, 8080).String())
		return err
	})
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		_, err = io.ReadFull(c, make([]byte, out))
		if err == nil {
			_, err = c.Write(make([]byte, back))
		}
		served <- errors.Join(err, c.Close())
	}()
	var local netip.AddrPort
	in(t, w.guest, func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), patience)
		if err != nil {
			return err
		}
		local = c.LocalAddr().(*net.TCPAddr).AddrPort()
		if _, err := c.Write(make([]byte, out)); err != nil {
			return err
		}
		n, err := io.Copy(io.Discard, c)
		if err == nil && n != int64(back) {
			err = fmt.Errorf("%d bytes came back", n)
		}
		return errors.Join(err, c.Close())
	})
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	return local
}

// counted is what the kernel has counted of a connection.
func counted(t *testing.T, from netip.AddrPort) (out, back uint64) {
	t.Helper()
	all, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.Forward.SrcIP.String() == from.Addr().String() && f.Forward.SrcPort == from.Port() {
			return f.Forward.Bytes, f.Reverse.Bytes
		}
	}
	t.Fatalf("the kernel knows no connection of %s", from)
	return 0, 0
}

func openBoth(t *testing.T) (flows, conntrack *os.File) {
	t.Helper()
	flows, err := OpenFlows(testGroup)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { flows.Close() })
	conntrack, err = OpenConntrack(guestAddr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conntrack.Close() })
	return flows, conntrack
}

// watch runs f; the returned function ends it.
func watch(t *testing.T, f *Flows, flows, conntrack *os.File) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Watch(ctx, flows, conntrack) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Error("Watch does not end")
		}
	}
	t.Cleanup(stop)
	return stop
}
