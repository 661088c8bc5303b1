package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/songgao/water"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// isolatedEnv names the test that runs in a network namespace of its own.
const isolatedEnv = "CLAWVM_NETWORK_TEST"

// isolated runs the test again, as a process in a network namespace of its own,
// so that any thread of it may touch the network and nothing of the machine's is
// touched. It returns true in the process that is to run the test's body.
func isolated(t *testing.T) bool {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	if os.Getenv(isolatedEnv) == t.Name() {
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.LinkSetUp(lo))
		return true
	}
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1", "-test.timeout=120s", fmt.Sprintf("-update=%v", *update))
	cmd.Env = append(os.Environ(), isolatedEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	// The signal comes when the thread ends that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in its namespace: %v\n%s", err, out)
	}
	if bytes.Contains(out, []byte("--- SKIP: "+t.Name())) {
		t.Skipf("%s", out)
	}
	t.Logf("%s", out)
	return false
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func get[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		must(t, err)
		return v
	}
}

// soon waits until f says true, at most five seconds.
func soon(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline, tick := time.After(5*time.Second), time.NewTicker(2*time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 5 s: %s", what)
		}
	}
}

// space is a network namespace; a thread of its own lives in it.
type space struct {
	t    *testing.T
	work chan func()
	fd   netns.NsHandle
}

func newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{t: t, work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		var err error
		s.fd, err = netns.New()
		ready <- err
		for f := range s.work {
			f()
		}
	}()
	must(t, <-ready)
	t.Cleanup(func() { close(s.work); must(t, s.fd.Close()) })
	s.do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return s
}

// try runs f within the namespace; sockets that it opens stay there.
func (s *space) try(f func() error) error {
	done := make(chan error)
	s.work <- func() { done <- f() }
	return <-done
}

func (s *space) do(f func() error) {
	s.t.Helper()
	must(s.t, s.try(f))
}

// dial connects from within the namespace (nil: the host's).
func (s *space) dial(network, to string) (c net.Conn, took time.Duration, err error) {
	f := func() error {
		begin := time.Now()
		c, err = rawDial(network, to)
		took = time.Since(begin)
		return err
	}
	if s == nil {
		err = f()
	} else {
		err = s.try(f)
	}
	return c, took, err
}

// rawDial makes the socket on the calling thread, whose namespace it gets;
// net.Dialer may use another's.
func rawDial(network, to string) (net.Conn, error) {
	a, err := netip.ParseAddrPort(to)
	if err != nil {
		return nil, err
	}
	typ := unix.SOCK_STREAM
	if network == "udp" {
		typ = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), network)
	defer f.Close()
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// serve answers on TCP with "NAME PEER\n" and on UDP with the same for each
// datagram, on the address, until the test ends.
func (s *space) serve(t *testing.T, name, at string) {
	t.Helper()
	var l net.Listener
	var p net.PacketConn
	f := func() (err error) {
		if l, err = net.Listen("tcp4", at); err != nil {
			return err
		}
		p, err = net.ListenPacket("udp4", at)
		return err
	}
	if s == nil {
		must(t, f())
	} else {
		s.do(f)
	}
	t.Cleanup(func() { l.Close(); p.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s %s\n", name, host(c.RemoteAddr()))
			c.Close()
		}
	}()
	go func() {
		b := make([]byte, 2000)
		for {
			_, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			if _, err := p.WriteTo([]byte(name+" "+host(from)+"\n"), from); err != nil {
				t.Logf("%s: %v", name, err)
			}
		}
	}()
}

func host(a net.Addr) string { return netip.MustParseAddrPort(a.String()).Addr().String() }

// ask dials, sends a byte on UDP, and returns what is answered.
func (s *space) ask(network, to string) (answer string, took time.Duration, err error) {
	begin := time.Now()
	c, _, err := s.dial(network, to)
	if err != nil {
		return "", time.Since(begin), err
	}
	defer c.Close()
	if network == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return "", time.Since(begin), err
		}
	}
	if err := c.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return "", 0, err
	}
	b := make([]byte, 200)
	n, err := c.Read(b)
	return strings.TrimSpace(string(b[:n])), time.Since(begin), err
}

// answers wants an answer; refuses wants a refusal, at once.
func (s *space) answers(t *testing.T, network, to, want string) {
	t.Helper()
	got, _, err := s.ask(network, to)
	if err != nil || got != want {
		t.Errorf("%s to %s: %q, %v; want %q", network, to, got, err, want)
	}
}

func (s *space) refuses(t *testing.T, network, to string) {
	t.Helper()
	got, took, err := s.ask(network, to)
	want := []error{unix.ECONNREFUSED}
	if network == "udp" {
		want = []error{unix.EHOSTUNREACH, unix.EACCES} // what ICMP admin-prohibited becomes
	}
	if !slices.ContainsFunc(want, func(e error) bool { return errors.Is(err, e) }) {
		t.Errorf("%s to %s: %q, %v after %v; want %v", network, to, got, err, took, want)
	}
	if took > 200*time.Millisecond {
		t.Errorf("%s to %s: refused after %v, not at once", network, to, took)
	}
}

// The host's uplink and what lies behind it.
const (
	hostUplink = "203.0.113.1"
	router     = "203.0.113.254"
	server     = "198.51.100.7"
	public     = "8.8.8.8"
	metadata   = "169.254.169.254"
	uplinkMTU  = 1400
)

var testBridge = Bridge{Name: "microbr", Address: netip.MustParsePrefix("192.168.83.1/24"), Owner: "0a1b2c3d"}

// newUplink gives the host an uplink with a default route; behind it are the
// addresses above, and a way back to the bridge's subnet, so that what isn't
// masqueraded or comes unasked would arrive.
func newUplink(t *testing.T) *space {
	t.Helper()
	s := newSpace(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "eth0", uplinkMTU
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "up0", PeerNamespace: netlink.NsFd(s.fd), PeerMTU: uplinkMTU}))
	must(t, setUpLink("eth0", hostUplink+"/24"))
	// The host answers with 6 ICMP errors at once and one a second then; the
	// tests ask for more.
	get(setSysctl("net/ipv4/icmp_ratelimit", "0"))(t)
	must(t, addRoute("0.0.0.0/0", router, "eth0"))
	s.do(func() error {
		return errors.Join(setUpLink("up0", router+"/24"), setUpLink("lo", server+"/32", public+"/32", metadata+"/32"),
			addRoute("192.168.0.0/16", hostUplink, "up0"))
	})
	s.serve(t, "server", server+":80")
	s.serve(t, "public", public+":53")
	s.serve(t, "metadata", metadata+":80")
	return s
}

func setUpLink(name string, addresses ...string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, addr); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

func addRoute(to, via, link string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	_, dst, err := net.ParseCIDR(to)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst}
	if via != "" {
		r.Gw = net.ParseIP(via)
		r.SetFlag(netlink.FLAG_ONLINK)
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	return netlink.RouteAdd(r)
}

// vm is a guest whose machine is a network namespace: its card is a TAP there,
// whose frames are carried to and from the VM's own TAP on the bridge, opened as
// a VMM opens it.
type vm struct {
	*space
	rules Rules
	guest Guest
	tap   *os.File

	mu   sync.Mutex
	seen func(frame []byte) // what the host sends to the guest
}

// vnetHeader is the length of the header before each frame on the VM's TAP.
const vnetHeader = 10

func testRules(t *testing.T, b Bridge) Rules {
	return Rules{Bridge: b, Lock: filepath.Join(t.TempDir(), "lock")}
}

func newVM(t *testing.T, r Rules, g Guest) *vm {
	t.Helper()
	if g.Egress == "" {
		g.Egress = EgressOpen
	}
	b := r.Bridge
	must(t, b.EnsurePort(Port{VM: g.VM, Address: g.Address, UID: 65534, GID: 65534}))
	must(t, r.Ensure(g))
	v := &vm{space: newSpace(t), rules: r, guest: g}
	v.tap = get(OpenTAP(TAPName(g.Address)))(t)
	var card *water.Interface
	v.do(func() (err error) {
		card, err = water.New(water.Config{DeviceType: water.TAP, PlatformSpecificParams: water.PlatformSpecificParams{Name: "eth0"}})
		if err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		gateway := b.Address.Addr().String()
		// A quiet guest: IPv6 would speak up by itself, and be counted.
		if _, err := setSysctl("net/ipv6/conf/eth0/disable_ipv6", "1"); err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetHardwareAddr(l, MAC(g.Address)), netlink.LinkSetMTU(l, uplinkMTU),
			setUpLink("eth0", g.Address.String()+"/32"), addRoute(gateway+"/32", "", "eth0"), addRoute("0.0.0.0/0", gateway, "eth0"))
	})
	t.Cleanup(func() { card.Close(); v.tap.Close() })
	go func() {
		b := make([]byte, 65536+vnetHeader)
		for {
			n, err := v.tap.Read(b)
			if err != nil {
				return
			}
			if n <= vnetHeader {
				continue
			}
			v.mu.Lock()
			if v.seen != nil {
				v.seen(bytes.Clone(b[vnetHeader:n]))
			}
			v.mu.Unlock()
			if _, err := card.Write(b[vnetHeader:n]); err != nil && !errors.Is(err, unix.EIO) {
				return
			}
		}
	}()
	go func() {
		b := make([]byte, 65536)
		for {
			n, err := card.Read(b)
			if err != nil {
				return
			}
			if err := v.inject(b[:n]); err != nil {
				return
			}
		}
	}()
	// The carrier comes a moment after the TAP is opened; what is sent before is lost.
	soon(t, "the guest's port forwards", func() bool {
		return slices.ContainsFunc(get(b.Ports())(t), func(p PortStatus) bool { return p.VM == g.VM && p.Running })
	})
	return v
}

// inject sends a frame as the guest.
func (v *vm) inject(frame []byte) error {
	_, err := v.tap.Write(append(make([]byte, vnetHeader), frame...))
	return err
}

// watch calls f with every frame that the host sends to the guest, until the test ends.
func (v *vm) watch(t *testing.T, f func([]byte)) {
	v.mu.Lock()
	v.seen = f
	v.mu.Unlock()
	t.Cleanup(func() { v.mu.Lock(); v.seen = nil; v.mu.Unlock() })
}

var gatewayMAC = MAC(testBridge.Address.Addr())

func etherFrame(from net.HardwareAddr, to net.HardwareAddr, typ uint16, payload []byte) []byte {
	f := append(bytes.Clone(to), from...)
	f = binary.BigEndian.AppendUint16(f, typ)
	return append(f, payload...)
}

// udpPacket is an IPv4 packet with a datagram without a checksum.
func udpPacket(from, to netip.Addr, sport, dport uint16, text string) []byte {
	u := binary.BigEndian.AppendUint16(nil, sport)
	u = binary.BigEndian.AppendUint16(u, dport)
	u = binary.BigEndian.AppendUint16(u, uint16(8+len(text)))
	u = append(u, 0, 0)
	u = append(u, text...)
	ip := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(u)))
	ip = append(append(ip, word(from)...), word(to)...)
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	return append(ip, u...)
}

func arpRequest(mac net.HardwareAddr, from, who netip.Addr) []byte {
	p := append([]byte{0, 1, 8, 0, 6, 4, 0, 1}, mac...)
	p = append(p, word(from)...)
	p = append(p, 0, 0, 0, 0, 0, 0)
	return append(p, word(who)...)
}

// nft runs the nft program; without it the test is skipped.
func nft(t *testing.T, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs the nft program")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		t.Fatalf("nft %v: %v: %s", args, err, complaint.String())
	}
	return out.String()
}
