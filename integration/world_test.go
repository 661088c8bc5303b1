package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	uplink   = netip.MustParsePrefix("203.0.113.2/24") // the host's
	internet = netip.MustParsePrefix("203.0.113.1/24")
)

// webName is what the fake name server knows.
const webName = "example.test."

// world is what the tests of a process share.
type world struct {
	bin  string // directory of clawvm
	root string

	mu       sync.Mutex
	requests []string // what the fake web server was asked: "SOURCE PATH"
}

var (
	theWorld  *world
	worldOnce sync.Once
	worldErr  error
)

// newWorld makes the namespaces' network and builds the program, once a process.
func newWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: VMs need network devices and other users' processes")
	}
	worldOnce.Do(func() {
		w := &world{}
		worldErr = w.make()
		theWorld = w
	})
	if worldErr != nil {
		t.Fatal(worldErr)
	}
	return theWorld
}

func (w *world) make() error {
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
	w.root = "/run/t"
	w.bin = os.Getenv(envBin)
	if w.bin == "" {
		w.bin = "/run/bin"
		if err := build(w.bin); err != nil {
			return err
		}
	}
	return w.connect()
}

// build builds the program as the Makefile does.
func build(dir string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-o", dir+"/", "../cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build clawvm: %w\n%s", err, out)
	}
	return nil
}

// connect makes the fake internet and the host's route to it.
func (w *world) connect() error {
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
	if err := addAddress("uplink", uplink); err != nil {
		return err
	}
	link, err := netlink.LinkByName("uplink")
	if err != nil {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IP(internet.Addr().AsSlice())}); err != nil {
		return fmt.Errorf("cannot set the default route: %w", err)
	}
	close(proceed)
	return <-ready
}

func addAddress(name string, p netip.Prefix) error {
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
func (w *world) serveInternet() error {
	if err := addAddress("world", internet); err != nil {
		return err
	}
	at := netip.AddrPortFrom(internet.Addr(), 53)
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	web, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(internet.Addr(), 80)))
	if err != nil {
		return err
	}
	answer := dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		if q.Question[0].Name == webName && q.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: webName, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60},
				A:   internet.Addr().AsSlice(),
			})
		} else if q.Question[0].Name != webName {
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

func (w *world) asked() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.requests...)
}

// result is what a command came to.
type result struct {
	stdout, stderr string
	code           int
}

// commandLimit bounds one command: a start under emulation on a busy machine.
const commandLimit = 6 * time.Minute

// clawvm runs the program on the world's root.
func (w *world) clawvm(t *testing.T, args ...string) result {
	t.Helper()
	return w.clawvmIn(t, nil, args...)
}

func (w *world) clawvmIn(t *testing.T, stdin io.Reader, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(w.bin, "clawvm"), append([]string{"--root", w.root}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("clawvm %s: %v", strings.Join(args, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// must is clawvm for a command that works; it returns what it printed.
func (w *world) must(t *testing.T, args ...string) string {
	t.Helper()
	r := w.clawvm(t, args...)
	if r.code != 0 {
		t.Fatalf("clawvm %s: exit code %d\n%s%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr, w.lastWords(args))
	}
	return r.stdout
}

// lastWords is the end of the logs of the VM that a failed command named.
func (w *world) lastWords(args []string) string {
	var b strings.Builder
	for _, name := range args {
		for _, log := range []string{"supervisor.log", "gate.log", "vmm.log", "guest/console.log"} {
			path := filepath.Join(w.root, "var/log/clawvm", name, log)
			if raw, err := os.ReadFile(path); err == nil && len(raw) > 0 {
				fmt.Fprintf(&b, "--- %s\n%s\n", path, raw[max(0, len(raw)-3000):])
			}
		}
	}
	return b.String()
}

// eventually waits for something to become true.
func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		if ok() {
			tick.Stop()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", limit, what)
		}
		<-tick.C
	}
}

// vmmName is the VMM that this process's tests run under.
func vmmName() string {
	if v := os.Getenv(envVMM); v != "" {
		return v
	}
	return "qemu"
}

// prepareStore gives the world's root an image and a kernel.
func (w *world) prepareStore(t *testing.T) {
	t.Helper()
	kernels := os.Getenv(envKernels)
	if kernels == "" {
		kernels = filepath.Join(testCache(), "store")
	}
	if _, err := kernel.Find("", kernels); err != nil {
		t.Skipf("no kernel for guests in %s (%v): scripts/setup test downloads one", kernels, err)
	}
	store := filepath.Join(w.root, "var/lib/clawvm/store")
	w.must(t, "image", "import", smallImage(t), "small")
	if _, err := os.Stat(filepath.Join(kernels, "kernels")); err != nil {
		return // the host's own kernel serves
	}
	if err := os.Symlink(filepath.Join(kernels, "kernels"), filepath.Join(store, "kernels")); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
}

// testCache is where what tests download is kept.
func testCache() string {
	if dir := os.Getenv("CLAWVM_TEST_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/clawvm-test"
}

// smallImage makes a root file system of busybox: a shell, a web server and a
// user for them.
func smallImage(t *testing.T) string {
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

func lookBusybox(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox-static is not installed: the tests' guests are made of it (scripts/setup test)")
	}
	return path
}

// declare writes the declaration of a VM.
func (w *world) declare(t *testing.T, name, text string) {
	t.Helper()
	dir := filepath.Join(w.root, "etc/clawvm/vms")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// status is the JSON of `clawvm status`.
type status struct {
	State   string `json:"state"`
	Health  string `json:"health"`
	Address string `json:"address"`
	VMM     string `json:"vmm"`
	PID     int    `json:"pid"`
	Reboots int    `json:"reboots"`
}

func (w *world) status(t *testing.T, name string) status {
	t.Helper()
	r := w.clawvm(t, "status", "--json", name)
	var s status
	if err := json.Unmarshal([]byte(r.stdout), &s); err != nil {
		t.Fatalf("clawvm status --json: %v\n%s%s", err, r.stdout, r.stderr)
	}
	return s
}

// kill ends a process that the world's VMs run, by pid.
func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Fatalf("cannot kill process %d: %v", pid, err)
	}
}
