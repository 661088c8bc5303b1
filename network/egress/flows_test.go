package egress

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
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
		if _, err := CutFlows(guestAddr); err != nil {
			t.Error(err)
		}
	})
	if err := EnableAccounting(); err != nil {
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

func TestConnectionIsLogged(t *testing.T) {
	w := newWorld(t)
	flows, conntrack := openBoth(t)
	names, rec := new(Names), new(recorder)
	names.remember("api.telegram.org", []netip.Addr{serverAddr})
	stop := watch(t, &Flows{VM: "claw", Address: guestAddr, Names: names, Log: rec.log}, flows, conntrack)

	local := w.talk(t, 1000, 50_000)
	open := rec.wait(t, "the open event", func(e Event) bool { return e.Kind == KindOpen })
	want := Event{Time: open.Time, VM: "claw", Kind: KindOpen, Name: "api.telegram.org", Proto: "tcp", Source: local.String(), Destination: "10.88.0.2:8080", Verdict: Allowed}
	if fmt.Sprint(open) != fmt.Sprint(want) {
		t.Errorf("got  %+v\nwant %+v", open, want)
	}
	// The name that led there is the one of the beginning.
	names.remember("other.test", []netip.Addr{serverAddr})

	out, back := counted(t, local)
	if out < 1000 || back < 50_000 {
		t.Fatalf("the kernel counted %d and %d bytes", out, back)
	}
	if n, err := CutFlows(guestAddr); err != nil || n != 1 {
		t.Fatalf("cut %d, %v", n, err)
	}
	stop() // what the cut has reported must still be logged
	var closed []Event
	for _, e := range rec.all() {
		if e.Kind == KindClose {
			closed = append(closed, e)
		}
	}
	if len(closed) != 1 {
		t.Fatalf("%d close events: %+v", len(closed), rec.all())
	}
	e := closed[0]
	if e.Name != "api.telegram.org" || e.Source != open.Source || e.Destination != open.Destination || e.Proto != "tcp" || e.BytesOut != out || e.BytesIn != back || e.Seconds <= 0 {
		t.Errorf("got %+v, want %d and %d bytes", e, out, back)
	}
}

// The kernel forgets a closed connection by itself, here after a second.
func TestConnectionThatExpires(t *testing.T) {
	w := newWorld(t)
	sysctl(t, "net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1")
	sysctl(t, "net/netfilter/nf_conntrack_tcp_timeout_last_ack", "1")
	flows, conntrack := openBoth(t)
	rec := new(recorder)
	watch(t, &Flows{VM: "claw", Address: guestAddr, Log: rec.log}, flows, conntrack)
	local := w.talk(t, 10, 10)
	eventually(t, "the kernel to forget it", func() bool {
		all, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET) // a look at the table removes what has expired
		return err == nil && len(all) == 0
	})
	e := rec.wait(t, "the close event", func(e Event) bool { return e.Kind == KindClose })
	if e.Source != local.String() || e.BytesOut < 10 || e.Seconds < 0.9 {
		t.Errorf("got %+v", e)
	}
}

func TestRefusedConnectionIsLogged(t *testing.T) {
	w := newWorld(t)
	flows, conntrack := openBoth(t)
	rec := new(recorder)
	watch(t, &Flows{VM: "claw", Address: guestAddr, Log: rec.log}, flows, conntrack)
	in(t, w.guest, func() error {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(closedAddr, 22).String(), patience)
		if err == nil {
			return errors.Join(errors.New("the connection was not refused"), c.Close())
		}
		return nil
	})
	e := rec.wait(t, "the event", func(e Event) bool { return e.Kind == KindOpen && e.Verdict == Refused })
	if e.Reason != "another VM" || e.Destination != "10.88.0.3:22" || e.Proto != "tcp" || !strings.HasPrefix(e.Source, "10.77.0.2:") {
		t.Errorf("got %+v", e)
	}
}

// DNS to the gate is logged as queries only.
func TestQueriesAreNotLoggedAsConnections(t *testing.T) {
	w := newWorld(t)
	gate, err := net.ListenPacket("udp", netip.AddrPortFrom(gateAddr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer gate.Close()
	at := gate.LocalAddr().(*net.UDPAddr).AddrPort()
	flows, conntrack := openBoth(t)
	rec := new(recorder)
	stop := watch(t, &Flows{VM: "claw", Address: guestAddr, Resolver: at, Log: rec.log}, flows, conntrack)
	in(t, w.guest, func() error {
		for _, to := range []netip.AddrPort{at, netip.AddrPortFrom(gateAddr, at.Port()^1)} {
			c, err := net.Dial("udp", to.String())
			if err == nil {
				_, err = c.Write([]byte("x"))
				err = errors.Join(err, c.Close())
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	rec.wait(t, "the other packet", func(e Event) bool { return e.Kind == KindOpen && e.Proto == "udp" })
	if _, err := CutFlows(guestAddr); err != nil {
		t.Fatal(err)
	}
	stop()
	for _, e := range rec.all() {
		if e.Destination == at.String() {
			t.Errorf("logged %+v", e)
		}
	}
}

func TestOtherAddressesAreFilteredInTheKernel(t *testing.T) {
	w := newWorld(t)
	other, err := OpenConntrack(netip.MustParseAddr("10.77.0.9"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	own, err := OpenConntrack(guestAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	w.talk(t, 1, 1)
	if n, err := CutFlows(guestAddr); err != nil || n != 1 {
		t.Fatalf("cut %d, %v", n, err)
	}
	buf := make([]byte, datagramSize)
	if n, err := receiveNow(own.Fd(), buf); err != nil || n == 0 {
		t.Errorf("its own socket: %d bytes, %v", n, err)
	}
	if n, err := receiveNow(other.Fd(), buf); err != unix.EAGAIN {
		t.Errorf("another address's socket: %d bytes, %v", n, err)
	}
	if _, err := OpenConntrack(netip.MustParseAddr("fd00::1")); err == nil {
		t.Error("an IPv6 address was accepted")
	}
}

func TestGroupTaken(t *testing.T) {
	newWorld(t)
	first, err := OpenFlows(testGroup)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if f, err := OpenFlows(testGroup); !errors.Is(err, ErrGroupTaken) {
		t.Errorf("got %v, %v", f, err)
	} else if want := "cannot open log group 4711: another process reads this log group"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	other, err := OpenFlows(testGroup + 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(other.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}
	again, err := OpenFlows(testGroup)
	if err != nil {
		t.Fatalf("after the reader is gone: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

// What a small buffer loses is counted to the packet.
func TestLossIsCounted(t *testing.T) {
	w := newWorld(t)
	flows, conntrack := openBoth(t)
	if err := unix.SetsockoptInt(int(flows.Fd()), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4096); err != nil {
		t.Fatal(err)
	}
	sent := 0
	blast := func(n int) {
		in(t, w.guest, func() error {
			c, err := net.ListenPacket("udp4", ":0")
			if err != nil {
				return err
			}
			defer c.Close()
			for range n {
				// A port each: the second packet of a connection could be one of an answered one.
				sent++
				if _, err := c.WriteTo([]byte("x"), &net.UDPAddr{IP: serverAddr.AsSlice(), Port: 1000 + sent}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	blast(2000) // nobody reads
	rec := new(recorder)
	watch(t, &Flows{VM: "claw", Address: guestAddr, Log: rec.log}, flows, conntrack)
	tally := func() (opened, lost int, overran bool) {
		for _, e := range rec.all() {
			switch e.Kind {
			case KindOpen:
				opened++
			case KindLost:
				lost += int(e.Count)
				overran = overran || strings.HasSuffix(e.Reason, "the gate did not keep up")
			}
		}
		return
	}
	eventually(t, "the buffer to be read", func() bool { o, _, _ := tally(); return o > 0 })
	eventually(t, "every packet to be logged or counted", func() bool {
		blast(1) // its number shows the gap
		opened, lost, overran := tally()
		return lost > 0 && overran && opened+lost >= sent-1
	})
	eventually(t, "the last packets", func() bool { o, l, _ := tally(); return o+l >= sent })
	if opened, lost, _ := tally(); opened+lost != sent {
		t.Errorf("sent %d, logged %d, counted as lost %d", sent, opened, lost)
	}
}

// readInherited is the gate: a process without privilege that inherited the sockets. It logs to its standard output, and ends with its input.
func readInherited() int {
	flows, conntrack := os.NewFile(3, "flows"), os.NewFile(4, "conntrack")
	out := json.NewEncoder(os.Stdout)
	log := make(chan Event, 1000)
	written := make(chan error, 1)
	go func() {
		var err error
		for e := range log {
			err = errors.Join(err, out.Encode(e))
		}
		written <- err
	}()
	// Whether it could ask for what is still open: a dump on the inherited socket (IPCTNL_MSG_CT_GET).
	dump := []byte{20, 0, 0, 0, 1, unix.NFNL_SUBSYS_CTNETLINK, 1, 3, 1, 0, 0, 0, 0, 0, 0, 0, unix.AF_INET, 0, 0, 0}
	buf := make([]byte, datagramSize)
	err := unix.Sendto(3, dump, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil { // on the other socket the filter would hold back the answer
		_, _, err = unix.Recvfrom(3, buf, unix.MSG_DONTWAIT)
	}
	if err == nil && buf[4] == unix.NLMSG_ERROR {
		err = unix.Errno(-int32(binary.NativeEndian.Uint32(buf[netlinkHeaderSize:])))
	}
	log <- Event{Kind: "dump", Reason: fmt.Sprint(err), Count: uint64(os.Geteuid())}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		if err == nil {
			cancel()
		}
	}()
	err = (&Flows{VM: "claw", Address: guestAddr, Log: func(e Event) { log <- e }}).Watch(ctx, flows, conntrack)
	close(log)
	if err := errors.Join(err, <-written); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func TestUnprivilegedProcessReadsInheritedSockets(t *testing.T) {
	w := newWorld(t)
	flows, conntrack := openBoth(t)
	w.talk(t, 2, 2) // the kernel has something to dump
	raw, err := flows.SyscallConn()
	if err == nil {
		_, err = receive(raw, make([]byte, datagramSize)) // what was logged of it, so that the answer to the dump comes first
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), readerEnv+"=1")
	cmd.ExtraFiles = []*os.File{flows, conntrack}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	rec := new(recorder)
	read := make(chan error, 1)
	go func() {
		lines := bufio.NewScanner(output)
		var err error
		for lines.Scan() && err == nil {
			var e Event
			err = json.Unmarshal(lines.Bytes(), &e)
			rec.log(e)
		}
		read <- errors.Join(err, lines.Err())
	}()
	if e := rec.wait(t, "the reader", func(e Event) bool { return e.Kind == "dump" }); e.Count != 65534 {
		t.Errorf("the reader runs as uid %d", e.Count)
	} else {
		t.Logf("a dump on the inherited socket, without privilege: %s", e.Reason)
	}
	local := w.talk(t, 1000, 1000)
	rec.wait(t, "the open event", func(e Event) bool { return e.Kind == KindOpen && e.Source == local.String() })
	out, back := counted(t, local)
	if _, err := CutFlows(guestAddr); err != nil {
		t.Fatal(err)
	}
	if err := input.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-read, cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	rec.wait(t, "the close event", func(e Event) bool {
		return e.Kind == KindClose && e.Source == local.String() && e.BytesOut == out && e.BytesIn == back
	})
}
