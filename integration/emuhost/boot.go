package emuhost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost/wire"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/xtaci/smux"
	"golang.org/x/sys/unix"
)

// cmdline is the server kernel's. The unit that runs tests' commands is started by multi-user.target; a getty on
// the console would hang it up, and mitigations cost an emulated CPU most.
const cmdline = "console=ttyS0 panic=-1 quiet mitigations=off net.ifnames=0 systemd.show_status=0 rw " +
	"systemd.mask=serial-getty@ttyS0.service systemd.mask=getty@tty1.service systemd.unit=multi-user.target"

// slowClock, preloaded into QEMU, scales the clock that the server's timers go by. QEMU's own instruction clock
// (-icount) would do that too, but a KVM guest inside hangs under it after a second or two, in a spin lock that its only
// CPU seems to hold itself (QEMU 10.0); and with more than one CPU the server's kernel fell to a corrupted stack.
const slowClock = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"

// insideProgram is what runs in the host, built when the first host of a process is booted.
const insideProgram = "github.com/clawvm/clawvm/integration/emuhost/inside"

var initramfs = struct {
	sync.Mutex
	program []byte
}{}

// Boot starts an emulated server and returns when commands can be run in it: systemd has reached multi-user.target.
// The server ends with Close or Kill, or with this process.
func (b *Base) Boot(ctx context.Context, o Options) (*Host, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp("", "emuhost-")
	if err != nil {
		return nil, err
	}
	h, err := b.start(ctx, o, work)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(work))
	}
	if err := h.connect(ctx, o); err != nil {
		err = fmt.Errorf("the emulated host did not come up: %w; the end of its console:\n%s\nand QEMU said: %s", err, h.ConsoleTail(), h.stderr.String())
		return nil, errors.Join(err, h.Kill())
	}
	return h, nil
}

func (b *Base) start(ctx context.Context, o Options, work string) (*Host, error) {
	initrd := filepath.Join(work, "initrd")
	kernel, modules, err := kernelFiles(b.KernelDir())
	if err != nil {
		return nil, err
	}
	if err := writeInitramfs(ctx, initrd, modules); err != nil {
		return nil, err
	}
	if o.Disk != "" {
		if err := ensureCopy(ctx, o.Disk, filepath.Join(b.dir, rootDisk)); err != nil {
			return nil, err
		}
	}
	conn, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	h := &Host{work: work, conn: conn, stderr: &tail{limit: 4 << 10}, console: &tail{limit: 64 << 10, to: o.Console}, done: make(chan struct{})}
	cmd := b.command(o, kernel, initrd)
	cmd.Stdout = h.console
	cmd.Stderr = h.stderr
	cmd.ExtraFiles = []*os.File{theirs} // controlFD
	if o.Loss != nil {
		served, theirs, err := h.attachDisk(o)
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		defer theirs.Close()
		// It ends with QEMU, also with one that doesn't start: theirs is closed then.
		go h.disk.serve(served)
		cmd.ExtraFiles = append(cmd.ExtraFiles, theirs) // diskFD
	}
	started := make(chan error)
	// The parent-death signal comes when the thread that started the process ends, so this one stays.
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			h.waited = cmd.Wait()
			close(h.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, errors.Join(fmt.Errorf("cannot start QEMU: %w", err), conn.Close())
	}
	h.process = cmd.Process
	return h, nil
}

// attachDisk gives the host its disk with a write cache, and the two ends of its connection.
func (h *Host) attachDisk(o Options) (ours net.Conn, theirs *os.File, err error) {
	if h.disk, err = openWriteCache(o.Disk); err != nil {
		return nil, nil, err
	}
	h.loss = o.Loss
	if ours, theirs, err = socketpair(); err != nil {
		return nil, nil, errors.Join(err, h.disk.file.Close())
	}
	return ours, theirs, nil
}

// What QEMU is given as descriptors: the first ones after the standard streams.
const (
	controlFD = 3
	diskFD    = 4
)

// drive is QEMU's options for the server's disk.
func (b *Base) drive(o Options) []string {
	switch {
	case o.Loss != nil:
		return []string{"-blockdev", fmt.Sprintf("driver=nbd,node-name=disk,server.type=fd,server.str=%d", diskFD),
			"-device", "virtio-blk-pci,drive=disk,write-cache=on"}
	case o.Disk != "":
		return []string{"-drive", "file=" + o.Disk + ",format=raw,if=virtio,cache=unsafe,discard=unmap"}
	}
	return []string{"-drive", "file=" + filepath.Join(b.dir, rootDisk) + ",format=raw,if=virtio,cache=unsafe,discard=unmap,snapshot=on"}
}

// command is QEMU with the root's own libraries and firmware.
func (b *Base) command(o Options, kernel, initrd string) *exec.Cmd {
	qemu := b.qemu()
	env := []string{"LANG=C", "PATH=/usr/bin:/bin", "TMPDIR=/var/tmp", "QEMU_MODULE_DIR=" + filepath.Join(qemu, "lib")}
	var preload []string
	kernelOptions := cmdline
	if o.Slow != 0 {
		preload = []string{"--preload", slowClock}
		env = append(env, fmt.Sprintf("FAKETIME=+0 x%g", 1/float64(o.Slow)), "FAKETIME_NO_CACHE=1")
		kernelOptions += " no_timer_check" // the check counts on the TSC, which libfaketime leaves as fast as it is
	}
	args := append(preload, "--library-path", filepath.Join(qemu, "lib"), filepath.Join(qemu, "qemu-system-x86_64"),
		"-L", filepath.Join(qemu, "firmware"), "-name", "emuhost", "-M", "q35", "-cpu", "EPYC,+svm",
		"-smp", strconv.Itoa(o.VCPUs), "-m", strconv.Itoa(o.MemoryMB),
		"-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", kernel, "-initrd", initrd, "-append", kernelOptions,
		"-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci", "-chardev", fmt.Sprintf("socket,id=control,fd=%d", controlFD),
		"-device", "virtserialport,chardev=control,name="+wire.PortName,
		"-accel", "tcg,thread=multi")
	args = append(args, b.drive(o)...)
	cmd := exec.Command(filepath.Join(qemu, "lib", loader), args...)
	cmd.Env = env
	// A group of its own, for a terminal's ^C is not the server's; and no session, which the kernel would schedule
	// as one more among all that run here, whatever priority the tests were given (sched(7), autogroup).
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// writeInitramfs writes the archive that holds the program that is init here and serves there, and the modules.
func writeInitramfs(ctx context.Context, path string, modules []string) error {
	program, err := buildInside(ctx)
	if err != nil {
		return err
	}
	records := []cpio.Record{cpio.Directory("modules", 0o755), cpio.StaticFile("init", string(program), 0o755)}
	for i, m := range modules {
		content, err := os.ReadFile(m)
		if err != nil {
			return err
		}
		records = append(records, cpio.StaticFile(fmt.Sprintf("modules/%02d-%s", i, filepath.Base(m)), string(content), 0o644))
	}
	var archive bytes.Buffer
	w := cpio.Newc.Writer(&archive)
	if err := cpio.WriteRecords(w, records); err != nil {
		return fmt.Errorf("cannot write the initramfs: %w", err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return fmt.Errorf("cannot write the initramfs: %w", err)
	}
	return os.WriteFile(path, archive.Bytes(), 0o600)
}

// buildInside builds the program that runs in the host, once a process.
func buildInside(ctx context.Context) ([]byte, error) {
	initramfs.Lock()
	defer initramfs.Unlock()
	if initramfs.program != nil {
		return initramfs.program, nil
	}
	dir, err := os.MkdirTemp("", "emuhost-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "inside")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, insideProgram)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if said, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("cannot build what runs in the emulated host: %w: %s", err, said)
	}
	initramfs.program, err = os.ReadFile(out)
	return initramfs.program, err
}

// ensureCopy makes a sparse copy of the root unless there is one.
func ensureCopy(ctx context.Context, to, from string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	if out, err := run(ctx, "cp", "--sparse=always", "--reflink=auto", from, to+".part"); err != nil {
		return fmt.Errorf("cannot copy the root: %w: %s", err, lastLines(out, 3))
	}
	return os.Rename(to+".part", to)
}

// connect waits for the host's hello and begins the session.
func (h *Host) connect(ctx context.Context, o Options) error {
	limit := BootLimit * time.Duration(max(o.Slow, 1))
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { h.conn.Close() })
	hello := make([]byte, len(wire.Hello))
	if _, err := io.ReadFull(h.conn, hello); err != nil {
		if !stop() {
			return fmt.Errorf("nothing in %s: %w", limit, ctx.Err())
		}
		return fmt.Errorf("QEMU hung up: %w", err)
	}
	if !stop() {
		return ctx.Err()
	}
	if string(hello) != wire.Hello {
		return fmt.Errorf("it said %q", hello)
	}
	session, err := smux.Client(h.conn, wire.Config())
	h.session = session
	return err
}

func socketpair() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a socket pair: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "test's end")
	theirs = os.NewFile(uintptr(fds[1]), "QEMU's end")
	ours, err = net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return ours, theirs, nil
}

// shutdownLimit bounds an orderly poweroff; killLimit what a killed QEMU takes to end.
const (
	shutdownLimit = 45 * time.Second
	killLimit     = 10 * time.Second
)
