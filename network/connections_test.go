package network

import (
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tracked is how many connections the namespace's kernel knows.
func tracked(t *testing.T) int {
	t.Helper()
	raw := get(os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count"))(t)
	return get(strconv.Atoi(strings.TrimSpace(string(raw))))(t)
}

// One VM can't fill the kernel's table of connections, which is the whole host's.
func TestConnectionsAreBounded(t *testing.T) {
	if !isolated(t) {
		return
	}
	const most = 64
	connectionsMax = most
	newUplink(t)
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	v := newVM(t, r, openGuest)
	other := newVM(t, r, Guest{VM: "other", Address: netip.MustParseAddr("192.168.83.20"), Egress: EgressOpen, LogGroup: 20})
	logged, _ := listenFlows(t, openGuest.LogGroup)
	v.answers(t, "tcp", server+":80", "server "+hostUplink)

	to := netip.MustParseAddr(server).As4()
	var fd int
	v.do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	defer unix.Close(fd)
	// In steps: of many at once some are lost on the way.
	for port := 1024; tracked(t) < most-10 && port < 1024+100*most; port++ {
		before := tracked(t)
		must(t, unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrInet4{Port: port, Addr: to}))
		soon(t, "the connection is tracked", func() bool { return tracked(t) > before })
	}
	for port := 10_000; port < 10_000+2*most; port++ {
		// One that was refused is told of by an error of a later one.
		for unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrInet4{Port: port, Addr: to}) != nil {
		}
	}
	soon(t, "one is refused, and logged", func() bool {
		_, _, err := v.dial("tcp", server+":80")
		return errors.Is(err, unix.ECONNREFUSED) && logged("microvm-refused: 6 "+server+":80")
	})
	if n := tracked(t); n < most-10 || n > most+10 {
		t.Errorf("%d connections are tracked, and a VM may have %d", n, most)
	}
	v.refuses(t, "tcp", server+":80")
	v.refuses(t, "tcp", "192.168.83.1:53") // its resolver's, too
	other.answers(t, "tcp", server+":80", "server "+hostUplink)
	// What is forgotten makes room.
	must(t, netlink.ConntrackTableFlush(netlink.ConntrackTable))
	soon(t, "the VM has room for a connection again", func() bool {
		answer, _, err := v.ask("tcp", server+":80")
		return err == nil && answer == "server "+hostUplink
	})
	counted := "192.168.83.10 ct count"
	if now := rulesNow(t); !strings.Contains(now, counted) {
		t.Errorf("nothing counts the VM's connections:\n%s", now)
	}
	must(t, r.Remove(openGuest.VM, openGuest.Address))
	if now := rulesNow(t); strings.Contains(now, counted) {
		t.Errorf("something still counts the connections of a VM that is gone:\n%s", now)
	}
}
