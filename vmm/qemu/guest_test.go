package qemu_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/vmm"
	"github.com/clawvm/clawvm/vmm/qemu"
)

// cacheEnv names the directory where tests keep what they download and prepare.
const cacheEnv = "CLAWVM_TEST_CACHE"

// guestLimit is how long an emulated guest may take for anything, on a host that does much else.
const guestLimit = 2 * time.Minute

// vmmUID is a user that no host has.
const vmmUID = 2000000001

// bootDocument is what the test's guests find as theirs.
const bootDocument = `{"version":1,"name":"test"}`

type bootFiles struct {
	vmlinux, initramfs string
	qemu               *qemu.QEMU
	skip               string
	err                error
}

// dir is where a test's files are that the VMM's user reads: t.TempDir is nobody's but root's.
func dir(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp("", "clawvm-qemu-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(d); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(d, 0o711); err != nil {
		t.Fatal(err)
	}
	return d
}

var bootOnce = sync.OnceValue(prepareBoot)

// boot is the kernel and the initramfs that all tests' guests boot; it skips the test where there are none.
func boot(t *testing.T) bootFiles {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest")
	}
	b := bootOnce()
	if b.skip != "" {
		t.Skip(b.skip)
	}
	if b.err != nil {
		t.Fatal(b.err)
	}
	return b
}

func prepareBoot() (b bootFiles) {
	if os.Getuid() != 0 {
		b.skip = "needs root, to run QEMU as another user"
		return b
	}
	facts := vmm.LookHost()
	if facts.QEMU == "" {
		b.skip = "needs qemu-system-x86_64"
		return b
	}
	b.qemu = qemu.New(facts.QEMU)
	b.qemu.KVM = facts.Hardware()
	cache := os.Getenv(cacheEnv)
	if cache == "" {
		cache = "/var/cache/clawvm-test"
	}
	store := filepath.Join(cache, "store")
	stored, err := kernel.List(store)
	if err != nil {
		b.err = err
		return b
	}
	if len(stored) == 0 {
		k, err := kernel.Pull(context.Background(), store, "", os.Stderr)
		if err != nil {
			b.skip = err.Error()
			return b
		}
		stored = []kernel.Kernel{*k}
	}
	b.vmlinux, b.initramfs, b.err = buildInitramfs(&stored[0], cache)
	return b
}

// built is where this run's init and initramfs are; other runs have their own.
var built string

func TestMain(m *testing.M) {
	code := m.Run()
	if built != "" {
		if err := os.RemoveAll(built); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func buildInitramfs(k *kernel.Kernel, cache string) (vmlinux, initramfs string, err error) {
	if built, err = os.MkdirTemp("", "clawvm-qemu-"); err != nil {
		return "", "", err
	}
	if err := os.Chmod(built, 0o755); err != nil {
		return "", "", err
	}
	init := filepath.Join(built, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", init, "./testdata/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("go build: %w: %s", err, out)
	}
	prepared, err := kernel.Prepare(context.Background(), k, init, filepath.Join(cache, "boot"))
	if err != nil {
		return "", "", err
	}
	if prepared.Packed != "" {
		return "", "", errors.New(prepared.Packed)
	}
	initramfs = filepath.Join(built, "initramfs")
	f, err := os.Create(initramfs)
	if err != nil {
		return "", "", err
	}
	err = kernel.WriteInitramfs(f, prepared.Initramfs, []byte(bootDocument))
	return prepared.Vmlinux, initramfs, errors.Join(err, f.Close())
}

// guest is a running machine and both ends that a test talks to.
type guest struct {
	t *testing.T
	vmm.Instance
	port    *os.File
	lines   *bufio.Reader
	console *console
}

// console collects what the guest prints.
type console struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

// start starts a machine, changed by change, and returns without waiting for the guest.
func start(t *testing.T, b bootFiles, change func(*vmm.Machine)) (*guest, error) {
	t.Helper()
	d := dir(t)
	logFile, err := os.Create(filepath.Join(d, "log"))
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	m := &vmm.Machine{
		Name: "test", VCPUs: 1, Memory: 256 << 20,
		Kernel: b.vmlinux, Initramfs: b.initramfs, Cmdline: kernel.Cmdline(kernel.CmdlineOptions{Emulated: !b.qemu.KVM}),
		Dir: d, UID: vmmUID, GID: vmmUID,
		Console: w, Log: logFile,
	}
	if group := vmm.LookHost().KVMGroup; b.qemu.KVM && group >= 0 {
		m.Groups = []int{group}
	}
	if change != nil {
		change(m)
	}
	if m.Agent, err = b.qemu.OpenChannel(m); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), guestLimit)
	defer cancel()
	instance, err := b.qemu.Start(ctx, m)
	if closeErr := errors.Join(w.Close(), logFile.Close()); closeErr != nil {
		t.Fatal(closeErr)
	}
	g := &guest{t: t, Instance: instance, port: m.Agent.Host, lines: bufio.NewReader(m.Agent.Host), console: &console{}}
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(g.console, r)
		copied <- errors.Join(err, r.Close())
	}()
	t.Cleanup(func() {
		if err == nil {
			if err := g.Kill(); err != nil {
				t.Error(err)
			}
			g.Wait()
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := m.Agent.Close(); err != nil {
			t.Error(err)
		}
		if err := <-copied; err != nil {
			t.Error(err)
		}
		if t.Failed() {
			if err == nil {
				t.Log("it ended: ", g.Wait())
			}
			said, readErr := os.ReadFile(filepath.Join(d, "log"))
			t.Logf("console:\n%s\nqemu:\n%s (%v)", g.console, said, readErr)
		}
	})
	return g, err
}

// run starts a machine and waits until its guest says on the port that it is ready.
func run(t *testing.T, b bootFiles, change func(*vmm.Machine)) *guest {
	t.Helper()
	begin := time.Now()
	g, err := start(t, b, change)
	if err != nil {
		t.Fatal(err)
	}
	started := time.Since(begin)
	g.want("ready")
	t.Logf("QEMU answers after %d ms, the guest after %d ms", started.Milliseconds(), time.Since(begin).Milliseconds())
	return g
}

func (g *guest) line() string {
	g.t.Helper()
	if err := g.port.SetDeadline(time.Now().Add(guestLimit)); err != nil {
		g.t.Fatal(err)
	}
	line, err := g.lines.ReadString('\n')
	if err != nil {
		g.t.Fatalf("cannot read from the guest: %v", err)
	}
	return strings.TrimSpace(line)
}

func (g *guest) want(want string) {
	g.t.Helper()
	if got := g.line(); got != want {
		g.t.Fatalf("the guest says %q, not %q", got, want)
	}
}

func (g *guest) tell(command string) {
	g.t.Helper()
	if _, err := io.WriteString(g.port, command+"\n"); err != nil {
		g.t.Fatal(err)
	}
}

// ends waits for the machine's end, and checks how it ended and what was told of it.
func (g *guest) ends(reason vmm.ExitReason, events ...vmm.EventKind) vmm.Exit {
	g.t.Helper()
	exit := make(chan vmm.Exit, 1)
	go func() { exit <- g.Wait() }()
	select {
	case x := <-exit:
		if x.Reason != reason {
			g.t.Errorf("the machine ended as %q, not as %q", x, reason)
		}
		var got []vmm.EventKind
		for e := range g.Events() {
			got = append(got, e.Kind)
		}
		if want := append([]vmm.EventKind{vmm.Booted}, events...); fmt.Sprint(got) != fmt.Sprint(want) {
			g.t.Errorf("events %v, not %v", got, want)
		}
		if again := g.Wait(); again != x {
			g.t.Errorf("Wait says %q, then %q", x, again)
		}
		return x
	case <-time.After(guestLimit):
		g.t.Fatal("the machine doesn't end")
		return vmm.Exit{}
	}
}

// poll asks until it is answered.
func poll(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(guestLimit); time.Now().Before(deadline); <-tick.C {
		if done() {
			return
		}
	}
	t.Fatalf("waited in vain for: %s", what)
}

// TestGuestEverything boots one guest with a device of each kind and looks at all of them.
func TestGuestEverything(t *testing.T) {
	b := boot(t)
	d := dir(t)
	disks := []vmm.Disk{
		{ID: "overlay", Path: filepath.Join(d, "disk,with comma")},
		{ID: "volume-0123456789abc", Path: filepath.Join(d, "volume"), ReadOnly: true},
	}
	for _, disk := range disks {
		if err := os.WriteFile(disk.Path, append([]byte(disk.ID[:7]), make([]byte, 1<<20-7)...), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(disk.Path, vmmUID, vmmUID); err != nil {
			t.Fatal(err)
		}
	}
	mac := net.HardwareAddr{2, 0x63, 10, 99, 0, 2}
	tap, udp := network(t)
	g := run(t, b, func(m *vmm.Machine) {
		m.VCPUs = 2
		m.Disks = disks
		m.TAPFile, m.MAC = tap, mac
		m.Shares = share(t, d)
	})

	g.tell("report")
	var report struct {
		Disks                                   map[string]string
		MAC, Document, Cmdline, Modules, Online string
	}
	if err := json.Unmarshal([]byte(g.line()), &report); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprint(map[string]string{"overlay": "vda ro=0 overlay", "volume-0123456789abc": "vdb ro=1 volume-"}); fmt.Sprint(report.Disks) != want {
		t.Errorf("disks %v, not %v", report.Disks, want)
	}
	if report.MAC != mac.String() {
		t.Errorf("eth0 has %q, not %s", report.MAC, mac)
	}
	if report.Document != bootDocument {
		t.Errorf("the boot document is %q, not %q", report.Document, bootDocument)
	}
	if report.Online != "0-1" {
		t.Errorf("processors %q, not 0-1", report.Online)
	}
	for _, name := range []string{"virtio_balloon", "virtio_rng", "pvpanic_pci", "overlay"} {
		if !strings.Contains(report.Modules, name+" ") {
			t.Errorf("module %s isn't loaded", name)
		}
	}

	t.Run("console", func(t *testing.T) {
		g.tell("print something on the console")
		g.want("printed")
		poll(t, "the console", func() bool {
			return strings.Contains(g.console.String(), "console says hello") && strings.Contains(g.console.String(), "something on the console")
		})
	})
	t.Run("bytes", func(t *testing.T) {
		sent := make([]byte, 1<<20)
		sum := 0
		for i := range sent {
			sent[i] = byte(i * 7 >> 3)
			sum += int(sent[i])
		}
		g.tell(fmt.Sprint("swallow ", len(sent)))
		if _, err := g.port.Write(sent); err != nil {
			t.Fatal(err)
		}
		back := make([]byte, len(sent))
		if _, err := io.ReadFull(g.lines, back); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(sent, back) {
			t.Error("other bytes came back than were sent")
		}
		g.want(fmt.Sprint("sum ", sum))
	})
	t.Run("network", func(t *testing.T) {
		g.tell("udp " + udp.LocalAddr().String())
		g.want("sent")
		if err := udp.SetReadDeadline(time.Now().Add(guestLimit)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		n, from, err := udp.ReadFrom(buf)
		if err != nil || string(buf[:n]) != "hello from the guest" || !strings.HasPrefix(from.String(), "10.99.0.2:") {
			t.Errorf("got %q from %v (%v)", buf[:n], from, err)
		}
	})
	t.Run("disk", func(t *testing.T) {
		g.tell("write-disk vda")
		g.want("written")
		g.tell("write-disk vdb")
		if got := g.line(); !strings.HasPrefix(got, "error: ") {
			t.Errorf("writing to a read-only disk: %q", got)
		}
	})
	t.Run("share", func(t *testing.T) {
		if _, err := os.Stat(legacyVirtiofsd); err != nil {
			t.Skip("needs " + legacyVirtiofsd)
		}
		g.tell("mount store")
		g.want("served by virtiofsd")
	})
	t.Run("process", func(t *testing.T) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.PID()))
		if err != nil {
			t.Fatal(err)
		}
		fields := map[string]string{}
		for line := range strings.Lines(string(status)) {
			key, value, _ := strings.Cut(line, ":")
			fields[key] = strings.Join(strings.Fields(value), " ")
		}
		for key, want := range map[string]string{
			"Uid": strings.TrimSpace(strings.Repeat(fmt.Sprint(vmmUID, " "), 4)), "CapEff": "0000000000000000",
			"CapPrm": "0000000000000000", "CapInh": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
		} {
			if fields[key] != want {
				t.Errorf("%s of QEMU is %q, not %q", key, fields[key], want)
			}
		}
		if !b.qemu.KVM && fields["Groups"] != "" {
			t.Errorf("QEMU is in groups %q", fields["Groups"])
		}
	})

	g.tell("poweroff")
	g.ends(vmm.ExitPoweredOff, vmm.PoweredOff)
	head, err := os.ReadFile(disks[0].Path)
	if err != nil || !bytes.HasPrefix(head, []byte("written by the guest")) {
		t.Errorf("the disk starts with %q (%v)", head[:min(len(head), 20)], err)
	}
}

// network makes a namespace with a TAP in it, and a socket there that the guest can reach. Nothing leaves it.
func network(t *testing.T) (*os.File, net.PacketConn) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	defer func() {
		if err := netns.Set(home); err != nil {
			t.Fatal(err)
		}
	}()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("needs /dev/net/tun: ", err)
	}
	tap := os.NewFile(uintptr(fd), "tap")
	t.Cleanup(func() {
		if err := tap.Close(); err != nil {
			t.Error(err)
		}
	})
	request, err := unix.NewIfreq("tap0")
	if err != nil {
		t.Fatal(err)
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("tap0")
	if err != nil {
		t.Fatal(err)
	}
	addr, err := netlink.ParseAddr("10.99.0.1/24")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link)); err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenPacket("udp4", "10.99.0.1:4000")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := udp.Close(); err != nil {
			t.Error(err)
		}
	})
	return tap, udp
}

// legacyVirtiofsd is the one that comes with QEMU 7.
const legacyVirtiofsd = "/usr/lib/qemu/virtiofsd"

// share serves a directory with one file, where the host has the means.
func share(t *testing.T, d string) []vmm.Share {
	t.Helper()
	if _, err := os.Stat(legacyVirtiofsd); err != nil {
		return nil
	}
	source := filepath.Join(d, "source")
	if err := os.Mkdir(source, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(source, "file"), []byte("served by virtiofsd\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(d, "share.sock")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(socket, vmmUID, vmmUID); err != nil {
		t.Fatal(err)
	}
	inherited, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	daemon := exec.Command(legacyVirtiofsd, "--fd=3", "-o", "source="+source, "-o", "sandbox=chroot")
	daemon.ExtraFiles = []*os.File{inherited}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(inherited.Close(), listener.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := daemon.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		if err := daemon.Wait(); err != nil {
			t.Log("virtiofsd: ", err)
		}
	})
	return []vmm.Share{{Tag: "store", Socket: socket}}
}

// TestGuestEnds lets guests end in each way.
func TestGuestEnds(t *testing.T) {
	b := boot(t)
	ctx := context.Background()
	for _, c := range []struct {
		name   string
		end    func(*guest) error
		reason vmm.ExitReason
		signal syscall.Signal
		events []vmm.EventKind
	}{
		{"reboot", func(g *guest) error { g.tell("reboot"); return nil }, vmm.ExitRebooted, 0, []vmm.EventKind{vmm.Rebooting}},
		{"panic", func(g *guest) error { g.tell("panic"); return nil }, vmm.ExitPanicked, 0, []vmm.EventKind{vmm.Panicked}},
		{"power button", func(g *guest) error {
			g.tell("button")
			g.want("listening")
			if err := g.PowerButton(ctx); err != nil {
				return err
			}
			g.want("pressed")
			g.tell("poweroff")
			return nil
		}, vmm.ExitPoweredOff, 0, []vmm.EventKind{vmm.PoweredOff}},
		{"stop", func(g *guest) error { return g.Stop(ctx) }, vmm.ExitKilled, 0, nil},
		{"kill", func(g *guest) error { return errors.Join(g.Kill(), g.Kill()) }, vmm.ExitKilled, syscall.SIGKILL, nil},
		{"killed by another", func(g *guest) error { return syscall.Kill(g.PID(), syscall.SIGKILL) }, vmm.ExitKilled, syscall.SIGKILL, nil},
		{"told to end by another", func(g *guest) error { return syscall.Kill(g.PID(), syscall.SIGTERM) }, vmm.ExitKilled, 0, nil},
		{"crash", func(g *guest) error { return syscall.Kill(g.PID(), syscall.SIGSEGV) }, vmm.ExitFailed, syscall.SIGSEGV, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := run(t, b, nil)
			if err := c.end(g); err != nil {
				t.Fatal(err)
			}
			x := g.ends(c.reason, c.events...)
			if x.Signal != c.signal {
				t.Errorf("ended by %v, not %v", x.Signal, c.signal)
			}
			t.Log(x)
			if c.name == "panic" && !strings.Contains(g.console.String(), "Kernel panic") {
				t.Errorf("the console has no panic: %s", g.console)
			}
			if err := g.Stop(ctx); err != nil {
				t.Errorf("stopping what has ended: %v", err)
			}
			if err := g.Kill(); err != nil {
				t.Errorf("killing what has ended: %v", err)
			}
			if err := g.PowerButton(ctx); err == nil {
				t.Error("pressed the button of what has ended")
			}
		})
	}
}

// TestGuestInstructionClock boots with the clock that runs by instructions, on one processor whatever is asked for.
func TestGuestInstructionClock(t *testing.T) {
	b := boot(t)
	b.qemu = qemu.New(b.qemu.Binary)
	g := run(t, b, func(m *vmm.Machine) {
		m.InstructionClock, m.VCPUs = true, 4
		m.Cmdline = kernel.Cmdline(kernel.CmdlineOptions{Emulated: true})
	})
	g.tell("report")
	if got := g.line(); !strings.Contains(got, `"online":"0"`) {
		t.Errorf("not one processor: %s", got)
	}
	g.tell("poweroff")
	g.ends(vmm.ExitPoweredOff, vmm.PoweredOff)
}

// TestGuestRefused asks for machines that QEMU can't start, and wants its reason.
func TestGuestRefused(t *testing.T) {
	b := boot(t)
	d := dir(t)
	foreign := filepath.Join(d, "foreign")
	if err := os.WriteFile(foreign, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*vmm.Machine)
		want   string
	}{
		{"missing disk", func(m *vmm.Machine) { m.Disks = []vmm.Disk{{ID: "a", Path: filepath.Join(d, "missing")}} }, "missing': No such file or directory"},
		{"foreign disk", func(m *vmm.Machine) { m.Disks = []vmm.Disk{{ID: "a", Path: foreign}} }, "foreign': Permission denied"},
		{"missing kernel", func(m *vmm.Machine) { m.Kernel = filepath.Join(d, "no-kernel") }, "no-kernel"},
		{"missing share", func(m *vmm.Machine) { m.Shares = []vmm.Share{{Tag: "a", Socket: filepath.Join(d, "no.sock")}} }, "no.sock"},
		{"more memory than there is", func(m *vmm.Machine) { m.Memory = 1 << 60 }, "emory"},
		{"odd memory", func(m *vmm.Machine) { m.Memory++ }, "no multiple of 1 MiB"},
		{"long disk id", func(m *vmm.Machine) { m.Disks = []vmm.Disk{{ID: "012345678901234567890", Path: foreign}} }, "not of 1 to 20 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := start(t, b, c.change)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "cannot start qemu: ") {
				t.Errorf("error %v, not one about %q", err, c.want)
			}
			t.Log(err)
		})
	}
	t.Run("no QEMU", func(t *testing.T) {
		b := b
		b.qemu = qemu.New(filepath.Join(d, "qemu"))
		if _, err := start(t, b, nil); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error %v", err)
		}
		if _, err := b.qemu.Version(context.Background()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("version", func(t *testing.T) {
		if v, err := b.qemu.Version(context.Background()); err != nil || !strings.Contains(v, ".") {
			t.Errorf("version %q: %v", v, err)
		}
	})
}

// TestGuestPause pauses a guest that says something ten times a second, and has disks and a share.
func TestGuestPause(t *testing.T) {
	b := boot(t)
	d := dir(t)
	g := run(t, b, func(m *vmm.Machine) { m.Shares = share(t, d) })
	g.tell("tick")
	ticks := make(chan struct{})
	go func() {
		defer close(ticks)
		for {
			if _, err := g.lines.ReadString('\n'); err != nil {
				return
			}
			ticks <- struct{}{}
		}
	}()
	next := func(limit time.Duration) bool {
		select {
		case _, ok := <-ticks:
			return ok
		case <-time.After(limit):
			return false
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), guestLimit)
	defer cancel()
	for round := range 2 {
		if !next(guestLimit) {
			t.Fatalf("round %d: no tick before the pause", round)
		}
		if err := errors.Join(g.Pause(ctx), g.Pause(ctx)); err != nil {
			t.Fatal(err)
		}
		for next(500 * time.Millisecond) { // those on their way
			continue
		}
		if next(2 * time.Second) {
			t.Errorf("round %d: the guest goes on", round)
		}
		if state := processState(t, g.PID()); state != "T" {
			t.Errorf("round %d: the VMM's process is in state %s, not stopped", round, state)
		}
		if err := errors.Join(g.Resume(ctx), g.Resume(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	if !next(guestLimit) {
		t.Fatal("no tick after the pause")
	}
	if err := g.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	for next(guestLimit) {
		continue
	}
	g.ends(vmm.ExitKilled)
}

// processState is a process's state as /proc/PID/stat has it: the field after the name in brackets.
func processState(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return rest[:1]
}
