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
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

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
	if n, err := CutFlows(guestAddr, nil); err != nil || n != 1 {
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

// What has arrived when Watch is told to end is still logged.
func TestWatchEndsWithWhatHasArrived(t *testing.T) {
	w := newWorld(t)
	flows, conntrack := openBoth(t)
	w.talk(t, 1, 1)
	if n, err := CutFlows(guestAddr, nil); err != nil || n != 1 {
		t.Fatalf("cut %d, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	rec := new(recorder)
	if err := (&Flows{VM: "claw", Address: guestAddr, Log: rec.log}).Watch(ctx, flows, conntrack); err != nil {
		t.Fatal(err)
	}
	for _, e := range rec.all() {
		if e.Kind == KindClose {
			return
		}
	}
	t.Errorf("logged %+v", rec.all())
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
	if _, err := CutFlows(guestAddr, nil); err != nil {
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
	if n, err := CutFlows(guestAddr, nil); err != nil || n != 1 {
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
	if _, err := CutFlows(guestAddr, nil); err != nil {
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
