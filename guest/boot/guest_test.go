package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/u-root/u-root/pkg/cpio"
)

// Guest tests boot this init under QEMU's emulation, with the kernel that is below CLAWVM_TEST_CACHE
// (/var/cache/clawvm-test), or is downloaded there.

// testModules are what a guest under QEMU needs of a Debian cloud kernel, dependencies aside.
var testModules = []string{"virtio_pci", "virtiofs", "overlay", "virtio_net", "virtio_blk", "virtio_console", "button", "evdev"}

// testGuest is a running guest.
type testGuest struct {
	t       *testing.T
	client  *agent.Client
	console *bytes.Buffer
	dir     string
	exited  chan error
	started time.Time
}

func needsGuest(t *testing.T) *kernel.Kernel {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for virtiofsd and disks")
	}
	for _, p := range []string{"qemu-system-x86_64", "busybox", "mkfs.ext4"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s isn't there", p)
		}
	}
	if _, err := os.Stat(legacyVirtiofsd); err != nil {
		t.Skipf("no virtiofsd: %v", err)
	}
	cache := os.Getenv("CLAWVM_TEST_CACHE")
	if cache == "" {
		cache = "/var/cache/clawvm-test"
	}
	store := filepath.Join(cache, "store")
	stored, err := kernel.List(store)
	if err != nil {
		t.Fatal(err)
	}
	if len(stored) > 0 {
		return &stored[0]
	}
	k, err := kernel.Pull(t.Context(), store, "", os.Stderr)
	if err != nil {
		t.Skip(err)
	}
	return k
}

const legacyVirtiofsd = "/usr/lib/qemu/virtiofsd"

// buildInit builds the init as a guest gets it.
func buildInit(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "clawvm-init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/clawvm/clawvm/cmd/clawvm-init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// modulePaths lists the modules in the order of loading.
func modulePaths(t *testing.T, modules string, names []string) (ordered []string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(modules, "modules.order"))
	if err != nil {
		t.Fatal(err)
	}
	path := map[string]string{}
	for _, p := range strings.Fields(string(data)) {
		path[strings.ReplaceAll(strings.TrimSuffix(filepath.Base(p), ".ko"), "-", "_")] = filepath.Join(modules, p)
	}
	seen := map[string]bool{}
	var add func(name string)
	add = func(name string) {
		name = strings.ReplaceAll(name, "-", "_")
		p, ok := path[name]
		if seen[name] || !ok {
			return
		}
		seen[name] = true
		out, err := exec.Command("modinfo", "-F", "depends", p).Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range strings.FieldsFunc(strings.TrimSpace(string(out)), func(r rune) bool { return r == ',' }) {
			add(d)
		}
		ordered = append(ordered, p)
	}
	for _, n := range names {
		add(n)
	}
	return ordered
}

func writeInitramfs(t *testing.T, path, init, modules string, d *guest.Document) {
	t.Helper()
	doc, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	binary, err := os.ReadFile(init)
	if err != nil {
		t.Fatal(err)
	}
	records := []cpio.Record{cpio.StaticFile("init", string(binary), 0o755), cpio.Directory("clawvm", 0o755)}
	var list strings.Builder
	for _, m := range modulePaths(t, modules, testModules) {
		data, err := os.ReadFile(m)
		if err != nil {
			t.Fatal(err)
		}
		name := "clawvm/" + filepath.Base(m)
		records = append(records, cpio.StaticFile(name, string(data), 0o644))
		fmt.Fprintln(&list, "/"+name)
	}
	records = append(records, cpio.StaticFile(guest.ModulesPath[1:], list.String(), 0o644), cpio.StaticFile(guest.DocumentPath[1:], string(doc), 0o644))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := cpio.Newc.Writer(f)
	if err := cpio.WriteRecords(w, records); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// busyboxRoot makes a small image.
func busyboxRoot(t *testing.T, dir string) string {
	t.Helper()
	root := filepath.Join(dir, "root")
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"usr/bin", "etc", "home/work", "tmp", "var"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "usr/bin/busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, l := range []string{"bin", "sbin"} {
		if err := os.Symlink("usr/bin", filepath.Join(root, l)); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range strings.Fields("sh ls cat id touch sleep nohup setsid reboot poweroff hostname ip ping httpd grep mount ps stty echo kill stat dd wc date unshare nslookup head test true false") {
		if err := os.Symlink("busybox", filepath.Join(root, "usr/bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/sh\nwork:x:20001:20001::/home/work:/bin/sh\n",
		"group":  "root:x:0:\nwork:x:20001:\nextra:x:20002:work\n",
	} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/run/elsewhere/resolv.conf", filepath.Join(root, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(root, "home/work"), 20001, 20001); err != nil {
		t.Fatal(err)
	}
	return root
}

// share serves a directory over virtiofs until the test ends and returns its socket.
func share(t *testing.T, dir, tag, source string) string {
	t.Helper()
	socket := filepath.Join(dir, tag+".sock")
	cmd := exec.Command(legacyVirtiofsd, "--socket-path="+socket, "-o", "source="+source, "-o", "cache=auto", "-f")
	start(t, cmd)
	err := waitFor(10*time.Second, func() error {
		_, err := os.Stat(socket)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return socket
}

func start(t *testing.T, cmd *exec.Cmd) (exited chan error) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited = make(chan error, 1)
	done := make(chan struct{})
	go func() {
		exited <- cmd.Wait()
		close(done)
	}()
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		<-done
	})
	return exited
}

// disk makes an ext4 disk.
func disk(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name+".img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(64<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// bootGuest boots a guest with all layers and connects to its agent.
func bootGuest(t *testing.T, d *guest.Document, dir string, disks ...string) *testGuest {
	t.Helper()
	k := needsGuest(t)
	modules := k.Modules
	initramfs := filepath.Join(dir, "initramfs")
	writeInitramfs(t, initramfs, buildInit(t, dir), modules, d)
	root := busyboxRoot(t, dir)
	secretsDir := filepath.Join(dir, "secrets")
	if err := os.MkdirAll(secretsDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(secretsDir, "key"), []byte("s3cret\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(secretsDir, "key"), 20001, 20001); err != nil {
		t.Fatal(err)
	}
	store, secrets := share(t, dir, "store", root), share(t, dir, "secrets", secretsDir)

	conn, theirs := socketPair(t)
	args := []string{
		"-M", "q35,sata=off,usb=off,smbus=off,hpet=off,vmport=off", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "256M", "-nodefaults", "-display", "none", "-no-reboot",
		"-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-numa", "node,memdev=mem",
		"-kernel", k.Image, "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1 cryptomgr.notests mitigations=off no_timer_check tsc=reliable",
		"-serial", "stdio",
		"-chardev", "socket,id=fs0,path=" + store, "-device", "vhost-user-fs-pci,chardev=fs0,tag=store",
		"-chardev", "socket,id=fs1,path=" + secrets, "-device", "vhost-user-fs-pci,chardev=fs1,tag=secrets",
		"-chardev", "socket,id=agent,fd=3", "-device", "virtio-serial-pci,max_ports=4", "-device", "virtserialport,chardev=agent,name=agent,nr=1",
		"-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-pci,netdev=net0,mac=02:63:c0:a8:53:0a,romfile=",
	}
	for i, p := range disks {
		serial := strings.TrimSuffix(filepath.Base(p), ".img")
		args = append(args, "-drive", fmt.Sprintf("if=none,id=d%d,format=raw,file=%s", i, p), "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d,serial=%s", i, serial))
	}
	g := &testGuest{t: t, console: &bytes.Buffer{}, dir: dir, started: time.Now()}
	qemu := exec.Command("qemu-system-x86_64", args...)
	qemu.Stdout, qemu.Stderr, qemu.ExtraFiles = g.console, g.console, []*os.File{theirs}
	g.exited = start(t, qemu)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", g.console)
		}
	})
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	client, err := agent.Connect(ctx, conn, true)
	if err != nil {
		t.Fatalf("%v\n%s", err, g.console)
	}
	g.client = client
	t.Logf("agent after %.2f s", time.Since(g.started).Seconds())
	return g
}

// until waits for an event of the kind.
func (g *testGuest) until(events <-chan agent.Event, kind agent.EventKind) agent.Event {
	g.t.Helper()
	limit := time.After(2 * time.Minute)
	for {
		select {
		case e, ok := <-events:
			if !ok {
				g.t.Fatalf("the events ended before %s\n%s", kind, g.console)
			}
			g.t.Logf("%.2f s: %+v", time.Since(g.started).Seconds(), e)
			if e.Kind == kind {
				return e
			}
			if e.Kind == agent.Ending {
				g.t.Fatalf("the guest ended before %s", kind)
			}
		case <-limit:
			g.t.Fatalf("no %s event", kind)
		}
	}
}

// exec runs a command in the guest through a gate's proxy.
func (g *testGuest) exec(req agent.ExecRequest) (code int, out, errOut string) {
	g.t.Helper()
	srv := httptest.NewServer(g.client.Proxy())
	defer srv.Close()
	dial := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", srv.Listener.Addr().String())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var o, e bytes.Buffer
	begun := time.Now()
	code, err := agent.Exec(ctx, dial, req, agent.Stdio{Out: &o, Err: &e, Signals: make(chan os.Signal)})
	if err != nil {
		g.t.Fatalf("%q: %v", req.Argv, err)
	}
	g.t.Logf("%q: %d, %.200q, %q in %v", req.Argv, code, o.String(), e.String(), time.Since(begun).Round(time.Millisecond))
	return code, o.String(), e.String()
}

func (g *testGuest) shell(script string) (code int, out, errOut string) {
	g.t.Helper()
	return g.exec(agent.ExecRequest{Argv: []string{"sh", "-c", script}})
}

func testDocument() *guest.Document {
	return &guest.Document{
		Version: guest.DocumentVersion, Name: "demo", Hostname: "demo", Transport: guest.TransportSerial,
		Network: &guest.Network{MAC: "02:63:c0:a8:53:0a", Address: netip.MustParseAddr("192.168.83.10"), Gateway: netip.MustParseAddr("192.168.83.1"),
			Nameservers: []netip.Addr{netip.MustParseAddr("192.168.83.1")}, MTU: 1400},
		Root: guest.Root{Lower: guest.Lower{Share: "store"}, Upper: guest.Upper{Tmpfs: 64 << 20}},
		Mounts: []guest.Mount{
			{Kind: guest.MountVolume, Source: "state", Target: "/var/lib/state", NoSUID: true, NoDev: true, Owner: &guest.Owner{UID: 20001, GID: 20001}},
			{Kind: guest.MountSecrets, Source: "secrets", Target: guest.SecretsTarget},
		},
		Files: []guest.File{{Path: "/etc/demo/config", Content: []byte("hello\n")}},
		Workload: &guest.Workload{
			Argv: []string{"sh", "-c", "echo out; echo err >&2; exec httpd -f -p 127.0.0.1:8080 -h /home/work"}, Env: map[string]string{"DEMO": "yes"}, User: "work",
			Ready: guest.Ready{TCP: 8080}, Restart: guest.RestartOnFailure,
		},
	}
}

func TestGuestBootsToReadyAndExecutes(t *testing.T) {
	needsGuest(t)
	dir := t.TempDir()
	g := bootGuest(t, testDocument(), dir, disk(t, dir, "state"))
	ctx := context.Background()
	events, failure, err := g.client.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	g.until(events, agent.Ready)

	for _, c := range []struct{ script, want string }{
		{"id -u; id -G", "20001\n20001 20002\n"},
		{"echo $HOME $USER $DEMO; pwd", "/home/work work yes\n/home/work\n"},
		{"cat /etc/demo/config /etc/hostname /etc/resolv.conf", "hello\ndemo\nnameserver 192.168.83.1\n"},
		{"cat /run/secrets/key; ls -ln /run/secrets/key | cut -c1-10", "s3cret\n-r--------\n"},
		{"grep -E 'NoNewPrivs|CapEff|CapBnd|Seccomp:' /proc/self/status", "CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n"},
		{"touch /var/lib/state/kept && stat -c %u /var/lib/state", "20001\n"},
		{"ip -4 -o addr show eth0 | grep -o 'inet [0-9./]*'; ip route; cat /sys/class/net/eth0/mtu", "inet 192.168.83.10/32\ndefault via 192.168.83.1 dev eth0 onlink \n1400\n"},
		{"ls -d /proc/1", ""},
		{"echo $(ls /dev)", "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero\n"},
	} {
		code, out, _ := g.shell(c.script)
		if out != c.want {
			t.Errorf("%s: %d, %q instead of %q", c.script, code, out, c.want)
		}
	}
	for _, script := range []string{"touch /usr/x", "touch /etc/x", "touch /sys/fs/cgroup/x", "echo 1 >/run/secrets/new", "cat /dev/vport0p1 </dev/null", "unshare -U true", "kill -0 1"} {
		if code, out, _ := g.shell(script); code == 0 {
			t.Errorf("%s was possible: %q", script, out)
		}
	}
	if code, out, _ := g.exec(agent.ExecRequest{Argv: []string{"sh", "-c", "id -u; ls -d /sys/fs/cgroup/workload"}, Root: true}); code != 0 || out != "0\n/sys/fs/cgroup/workload\n" {
		t.Errorf("as root: %d, %q", code, out)
	}
	if code, out, _ := g.exec(agent.ExecRequest{Argv: []string{"stty", "size"}, TTY: true, Rows: 33, Cols: 77}); code != 0 || strings.TrimSpace(out) != "33 77" {
		t.Errorf("on a terminal: %d, %q", code, out)
	}
	for _, tty := range []bool{false, true} {
		code, out, _ := g.exec(agent.ExecRequest{Argv: []string{"sh", "-c", "test -t 1 && stty -opost; head -c 10485760 /dev/zero"}, TTY: tty})
		if code != 0 || len(out) != 10<<20 {
			t.Errorf("ten megabytes, terminal %v: %d, %d bytes", tty, code, len(out))
		}
	}
	logs, err := g.client.Logs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < 2; n++ {
		p, err := logs.Next()
		if err != nil {
			t.Fatal(err)
		}
		if want := map[agent.Stream]string{agent.Stdout: "out\n", agent.Stderr: "err\n"}[p.Stream]; string(p.Data) != want {
			t.Errorf("log: %d, %q", p.Stream, p.Data)
		}
	}
	if err := g.client.SetClock(ctx, time.Unix(2e9, 0)); err != nil {
		t.Error(err)
	}
	if _, out, _ := g.shell("date +%s"); !strings.HasPrefix(out, "20000000") {
		t.Errorf("the clock was not set: %s", out)
	}
	if err := g.client.Ping(ctx); err != nil {
		t.Error(err)
	}
	if err := g.client.Shutdown(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if e := g.until(events, agent.Ending); e.Reason != agent.ReasonPowerOff {
		t.Errorf("ended by %s", e.Reason)
	}
	select {
	case err := <-g.exited:
		if err != nil {
			t.Errorf("qemu: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the guest did not power off")
	}
	for range events { // what failure says is settled when they have ended
	}
	t.Logf("off after %.2f s; events: %v", time.Since(g.started).Seconds(), failure())
	out, err := exec.Command("debugfs", "-R", "features", filepath.Join(dir, "state.img")).CombinedOutput()
	if err != nil || strings.Contains(string(out), "needs_recovery") {
		t.Errorf("the volume was not unmounted: %v, %s", err, out)
	}
	if strings.Contains(g.console.String(), "clawvm-init:") {
		t.Errorf("the init complained:\n%s", g.console)
	}
}

// socketPair returns the two ends of a socketpair.
func socketPair(t *testing.T) (ours net.Conn, theirs *os.File) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "host")
	ours, err = net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return ours, os.NewFile(uintptr(fds[1]), "guest")
}

// connectTo connects a client to a server without a guest.
func connectTo(t *testing.T, s *agent.Server) *agent.Client {
	t.Helper()
	ours, file := socketPair(t)
	theirs, err := net.FileConn(file)
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.ServeConn(context.Background(), theirs, true) }()
	c, err := agent.Connect(context.Background(), ours, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err == nil {
			t.Error("ServeConn ended without saying why")
		}
	})
	return c
}

// TestGuestRestartsReportsAndReboots has its overlay on a disk, a workload that fails once, and ends by busybox' reboot.
func TestGuestRestartsReportsAndReboots(t *testing.T) {
	needsGuest(t)
	dir := t.TempDir()
	d := testDocument()
	d.Root.Upper = guest.Upper{Disk: "overlay"}
	d.Workload.Argv = []string{"sh", "-c", "test -e /tmp/again && exec sleep 1000; touch /tmp/again; exit 3"}
	d.Workload.Ready = guest.Ready{Exec: []string{"test", "-e", "/tmp/again"}}
	g := bootGuest(t, d, dir, disk(t, dir, "state"), disk(t, dir, "overlay"))
	events, _, err := g.client.Events(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for {
		if e := g.until(events, agent.WorkloadStarted); e.Restarts == 1 {
			break
		}
	}
	g.until(events, agent.Ready)
	// What a program leaves behind is reaped.
	if code, _, _ := g.shell("for i in 1 2 3 4 5; do setsid sh -c 'sleep 0.1 & exit' & done; wait; sleep 0.5"); code != 0 {
		t.Errorf("ended with %d", code)
	}
	if _, out, _ := g.exec(agent.ExecRequest{Argv: []string{"sh", "-c", "cat /proc/[0-9]*/stat | grep -c ') Z '"}, Root: true}); out != "0\n" {
		t.Errorf("%s zombies", out)
	}
	if code, out, _ := g.exec(agent.ExecRequest{Argv: []string{"sh", "-c", "echo disk >/kept && sync && reboot"}, Root: true}); code != 0 && code != 143 {
		t.Errorf("reboot: %d, %s", code, out)
	}
	if e := g.until(events, agent.Ending); e.Reason != agent.ReasonReboot {
		t.Errorf("%+v", e)
	}
	select {
	case err := <-g.exited:
		if err != nil {
			t.Errorf("qemu: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the guest did not reboot")
	}
	for _, name := range []string{"state", "overlay"} {
		out, err := exec.Command("debugfs", "-R", "features", filepath.Join(dir, name+".img")).CombinedOutput()
		if err != nil || strings.Contains(string(out), "needs_recovery") {
			t.Errorf("%s was not unmounted: %v, %s", name, err, out)
		}
	}
	if strings.Contains(g.console.String(), "clawvm-init:") {
		t.Errorf("the init complained:\n%s", g.console)
	}
}

// TestGuestThatCannotBeSetUpSaysWhy declares a volume whose disk isn't there.
func TestGuestThatCannotBeSetUpSaysWhy(t *testing.T) {
	needsGuest(t)
	dir := t.TempDir()
	g := bootGuest(t, testDocument(), dir)
	events, _, err := g.client.Events(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if e := g.until(events, agent.Ending); e.Reason != agent.ReasonFailed || !strings.Contains(e.Detail, "there is no disk with the serial state") {
		t.Errorf("%+v", e)
	}
	<-g.exited
}
