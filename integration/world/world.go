// Package world is where the tests of package integration and its neighbours
// run the built clawvm: namespaces of their own with a fake internet, a root with
// a small image and a kernel in it, and a look at what the host holds.
package world

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/guest/kernel"
)

// The fake internet: a second network namespace behind a veth pair, with a name
// server and a web server. The addresses are documentation's (RFC 5737), so that
// a packet which escaped would get nowhere.
var (
	Uplink   = netip.MustParsePrefix("203.0.113.2/24") // the host's
	Internet = netip.MustParsePrefix("203.0.113.1/24")
	Another  = netip.MustParsePrefix("203.0.113.3/24") // of the internet, too
)

// webName is what the fake name server knows.
const webName = "example.test."

// World is what the tests of a process share.
type World struct {
	Bin  string // the directory of clawvm and clawvm-init
	Root string // what clawvm gets as --root

	mu       sync.Mutex
	requests []string // what the fake web server was asked: "SOURCE PATH"
	records  []dns.RR // what the fake name server knows beside webName
}

// Know makes the fake name server know other records than its own, in a zone file's words.
func (w *World) Know(t testing.TB, records ...string) {
	t.Helper()
	var all []dns.RR
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, rr)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.records = all
}

// known are the records of a name, and of those that it is another name of.
func (w *World) known(name string) (found []dns.RR) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for range len(w.records) {
		next := name
		for _, rr := range w.records {
			if rr.Header().Name != name {
				continue
			}
			found = append(found, rr)
			if c, ok := rr.(*dns.CNAME); ok {
				next = c.Target
			}
		}
		if next == name {
			break
		}
		name = next
	}
	return found
}

var (
	shared     *World
	sharedOnce sync.Once
	sharedErr  error
)

// New makes the namespaces' network and builds the program, once a process.
func New(t testing.TB) *World {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: VMs need network devices and other users' processes")
	}
	sharedOnce.Do(func() {
		w := &World{}
		sharedErr = w.make()
		shared = w
	})
	if sharedErr != nil {
		t.Fatal(sharedErr)
	}
	return shared
}

func (w *World) make() error {
	// /proc and /sys of the new namespaces.
	for _, m := range []struct{ what, where string }{{"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m.what, m.where, m.what, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.where, err)
		}
	}
	// /run of a machine that has just started, and room for roots with short paths.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	// cgroups were mounted below the old /sys; the tests do without.
	w.Root = "/run/t"
	w.Bin = os.Getenv(envBin)
	if w.Bin == "" {
		w.Bin = "/run/bin"
		if err := build(w.Bin); err != nil {
			return err
		}
	}
	return w.connect()
}

// build builds the program as the Makefile does.
func build(dir string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-o", dir+"/", "github.com/clawvm/clawvm/cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build clawvm: %w\n%s", err, out)
	}
	return nil
}

// connect makes the fake internet and the host's route to it.
func (w *World) connect() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	ready := make(chan error, 1)
	nsCh := make(chan netns.NsHandle, 1)
	proceed := make(chan struct{})
	go func() {
		// The thread is the namespace's, and never anything else's again.
		runtime.LockOSThread()
		ns, err := netns.New()
		if err != nil {
			ready <- err
			return
		}
		nsCh <- ns
		<-proceed
		ready <- w.serveInternet()
		select {} // sockets live on; the thread keeps the namespace
	}()
	var ns netns.NsHandle
	select {
	case ns = <-nsCh:
	case err := <-ready:
		return err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "uplink"}, PeerName: "world", PeerNamespace: netlink.NsFd(int(ns))}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("cannot make the uplink: %w", err)
	}
	if err := AddAddress("uplink", Uplink); err != nil {
		return err
	}
	link, err := netlink.LinkByName("uplink")
	if err != nil {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IP(Internet.Addr().AsSlice())}); err != nil {
		return fmt.Errorf("cannot set the default route: %w", err)
	}
	close(proceed)
	return <-ready
}

// AddAddress gives a link an address and sets it up.
func AddAddress(name string, p netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(p.String())
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// serveInternet runs on a thread of the internet's namespace.
func (w *World) serveInternet() error {
	for _, a := range []netip.Prefix{Internet, Another} {
		if err := AddAddress("world", a); err != nil {
			return err
		}
	}
	at := netip.AddrPortFrom(Internet.Addr(), 53)
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	web, err := net.ListenTCP("tcp4", &net.TCPAddr{Port: 80})
	if err != nil {
		return err
	}
	answer := dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		if q.Question[0].Name == webName && q.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: webName, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60},
				A:   Internet.Addr().AsSlice(),
			})
		} else if m.Answer = w.known(q.Question[0].Name); len(m.Answer) == 0 && q.Question[0].Name != webName {
			m.Rcode = dns.RcodeNameError
		}
		if err := rw.WriteMsg(m); err != nil {
			fmt.Fprintln(os.Stderr, "the fake name server:", err)
		}
	})
	go (&dns.Server{PacketConn: udp, Handler: answer}).ActivateAndServe()
	go (&dns.Server{Listener: tcp, Handler: answer}).ActivateAndServe()
	go http.Serve(web, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		source, _, _ := net.SplitHostPort(r.RemoteAddr)
		w.mu.Lock()
		w.requests = append(w.requests, source+" "+r.URL.Path)
		w.mu.Unlock()
		fmt.Fprint(rw, "hello from the internet\n")
	}))
	return nil
}

// Asked is what the fake web server was asked so far: "SOURCE PATH".
func (w *World) Asked() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.requests...)
}

// Result is what a command came to.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// CommandLimit bounds one command: a start under emulation on a busy machine.
const CommandLimit = 6 * time.Minute

// Clawvm runs the program on the world's root.
func (w *World) Clawvm(t testing.TB, args ...string) Result {
	t.Helper()
	return w.ClawvmIn(t, nil, args...)
}

// ClawvmIn is Clawvm with a standard input.
func (w *World) ClawvmIn(t testing.TB, stdin io.Reader, args ...string) Result {
	t.Helper()
	return w.within(t, CommandLimit, stdin, args...)
}

func (w *World) within(t testing.TB, limit time.Duration, stdin io.Reader, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(w.Bin, "clawvm"), append([]string{"--root", w.Root}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("clawvm %s: %v", strings.Join(args, " "), err)
	}
	return Result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// Must is Clawvm for a command that works; it returns what it printed.
func (w *World) Must(t testing.TB, args ...string) string {
	t.Helper()
	return w.MustWithin(t, CommandLimit, args...)
}

// MustWithin is Must for a command that takes long.
func (w *World) MustWithin(t testing.TB, limit time.Duration, args ...string) string {
	t.Helper()
	r := w.within(t, limit, nil, args...)
	if r.Code != 0 {
		t.Fatalf("clawvm %s: exit code %d\n%s%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr, w.LastWords(args))
	}
	return r.Stdout
}

// LastWords is the end of the logs of the VM that a failed command named.
func (w *World) LastWords(args []string) string {
	var b strings.Builder
	for _, name := range args {
		for _, log := range []string{"supervisor.log", "gate.log", "vmm.log", "guest/console.log"} {
			path := filepath.Join(w.Root, "var/log/clawvm", name, log)
			if raw, err := os.ReadFile(path); err == nil && len(raw) > 0 {
				fmt.Fprintf(&b, "--- %s\n%s\n", path, raw[max(0, len(raw)-3000):])
			}
		}
	}
	return b.String()
}

// How often Eventually asks: not so often that what it waits for, such as a guest
// that boots on the same processor, has less than most of the time.
const (
	askAfter  = 50 * time.Millisecond
	askShare  = 5 // asking may take this part of the time
	askAtMost = 3 * time.Second
)

// Eventually waits for something to become true.
func Eventually(t testing.TB, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		began := time.Now()
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", limit, what)
		}
		<-time.After(min(max(askAfter, (askShare-1)*time.Since(began)), askAtMost))
	}
}

// VMM is the VMM that this process's tests run under.
func VMM() string {
	if v := os.Getenv(envVMM); v != "" {
		return v
	}
	return "qemu"
}

// PrepareStore gives the world's root an image and a kernel. The image holds more
// files where they are given, by their path.
func (w *World) PrepareStore(t testing.TB, more ...map[string]string) {
	t.Helper()
	kernels := os.Getenv(envKernels)
	if kernels == "" {
		kernels = filepath.Join(TestCache(), "store")
	}
	if _, err := kernel.Find("", kernels); err != nil {
		t.Skipf("no kernel for guests in %s (%v): scripts/setup test downloads one", kernels, err)
	}
	store := filepath.Join(w.Root, "var/lib/clawvm/store")
	w.Must(t, "image", "import", SmallImage(t, more...), "small")
	if _, err := os.Stat(filepath.Join(kernels, "kernels")); err != nil {
		return // the host's own kernel serves
	}
	if err := os.Symlink(filepath.Join(kernels, "kernels"), filepath.Join(store, "kernels")); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
}

// TestCache is where what tests download is kept.
func TestCache() string {
	if dir := os.Getenv("CLAWVM_TEST_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/clawvm-test"
}

// SmallImage makes a root file system of busybox: a shell, a web server and a
// user for them.
func SmallImage(t testing.TB, more ...map[string]string) string {
	t.Helper()
	busybox := lookBusybox(t)
	dir := t.TempDir()
	for _, d := range []string{"bin", "etc", "usr/bin", "proc", "sys", "dev", "run", "tmp", "var/lib/state", "srv/www"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"etc/passwd":         "root:x:0:0:root:/root:/bin/sh\napp:x:20001:20001:app:/var/lib/state:/bin/sh\n",
		"etc/group":          "root:x:0:\napp:x:20001:\n",
		"srv/www/index.html": "served by the guest\n",
		"usr/bin/marker":     "part of the image\n",
	}
	for _, m := range more {
		maps.Copy(files, m)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "bin/busybox"), raw, 0o755); err != nil {
		t.Fatal(err)
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func lookBusybox(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox-static is not installed: the tests' guests are made of it (scripts/setup test)")
	}
	return path
}

// Declare writes the declaration of a VM.
func (w *World) Declare(t testing.TB, name, text string) {
	t.Helper()
	dir := filepath.Join(w.Root, "etc/clawvm/vms")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Status is the JSON of `clawvm status`.
type Status struct {
	State   string `json:"state"`
	Health  string `json:"health"`
	Address string `json:"address"`
	VMM     string `json:"vmm"`
	PID     int    `json:"pid"`
	Reboots int    `json:"reboots"`
}

// Status asks for a VM's status.
func (w *World) Status(t testing.TB, name string) Status {
	t.Helper()
	r := w.Clawvm(t, "status", "--json", name)
	var s Status
	if err := json.Unmarshal([]byte(r.Stdout), &s); err != nil {
		t.Fatalf("clawvm status --json: %v\n%s%s", err, r.Stdout, r.Stderr)
	}
	return s
}

// Kill ends a process that the world's VMs run, by pid.
func Kill(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Fatalf("cannot kill process %d: %v", pid, err)
	}
}
