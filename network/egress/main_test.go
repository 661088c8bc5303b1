package egress

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	namespaceEnv  = "CLAWVM_TEST_NAMESPACE"
	readerEnv     = "CLAWVM_TEST_READER"
	comparisonEnv = "CLAWVM_TEST_COMPARISON" // address, name server, log file
	patience      = 10 * time.Second
)

// TestMain runs the tests, as root, in a network namespace of their own, so that nothing they send leaves it: the resolver's sockets
// are made by whatever thread it runs on.
func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(readerEnv) != "" {
		os.Exit(readInherited())
	}
	if args := strings.Fields(os.Getenv(comparisonEnv)); len(args) == 3 {
		if err := serveForComparison(args[0], args[1], args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() != 0 || os.Getenv(namespaceEnv) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // the child dies with this thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), namespaceEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

var loopback = sync.OnceValue(func() error {
	if os.Getenv(namespaceEnv) == "" {
		return nil // the machine's own
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
})

func needLoopback(t testing.TB) {
	t.Helper()
	if err := loopback(); err != nil {
		t.Fatal(err)
	}
}

// listenBoth listens on one port of the loopback address over UDP and over TCP. The kernel picks a port that is free for UDP;
// over TCP an earlier test's connection may still hold it, so another one is tried then.
func listenBoth(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	needLoopback(t)
	const tries = 100
	for try := 1; ; try++ {
		udp, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		tcp, err := net.Listen("tcp", udp.LocalAddr().String())
		if err == nil {
			return udp, tcp
		}
		if err := udp.Close(); err != nil {
			t.Fatal(err)
		}
		if !errors.Is(err, syscall.EADDRINUSE) || try == tries {
			t.Fatal(err)
		}
	}
}

// eventually polls until ok, or fails the test.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// A recorder collects events.
type recorder struct {
	mu     sync.Mutex
	events []Event
}

func (r *recorder) log(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

func (r *recorder) all() []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Event(nil), r.events...)
}

// wait returns the first event that matches, once it is there.
func (r *recorder) wait(t testing.TB, what string, match func(Event) bool) Event {
	t.Helper()
	var found Event
	defer func() {
		if t.Failed() {
			for _, e := range r.all() {
				t.Logf("%+v", e)
			}
		}
	}()
	eventually(t, what, func() bool {
		for _, e := range r.all() {
			if match(e) {
				found = e
				return true
			}
		}
		return false
	})
	return found
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", path, got, want)
	}
}

// A clock stands still until it is moved.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Unix(1_700_000_000, 0)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}
