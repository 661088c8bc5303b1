package boot

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// inSandbox runs a program in a new sandbox and returns its exit code and output.
func inSandbox(t *testing.T, box *sandbox, uid int, argv ...string) (int, string) {
	t.Helper()
	spec := &stageSpec{Argv: argv, Env: []string{"PATH=" + defaultPath}, UID: uid, GID: uid, Groups: []int{uid + 1}, Cwd: "/", Sandboxed: true}
	return runStageSpec(t, spec, box)
}

func runStageSpec(t *testing.T, spec *stageSpec, box *sandbox) (int, string) {
	t.Helper()
	cmd, files, err := stageCommand(spec, box, nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	if closeErr := closeFiles(files); closeErr != nil {
		t.Error(closeErr)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return outcomeOf(err).Code, string(out)
}

func newTestSandbox(t *testing.T) *sandbox {
	t.Helper()
	needsRoot(t)
	box, err := newSandbox()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := box.close(); err != nil {
			t.Error(err)
		}
	})
	return box
}

func TestSandboxGivesNoRights(t *testing.T) {
	box := newTestSandbox(t)
	for _, uid := range []int{0, 20001} {
		code, out := inSandbox(t, box, uid, "sh", "-c", "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status")
		for _, want := range []string{"CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000",
			"CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if code != 0 || !strings.Contains(out, want) {
				t.Errorf("uid %d: no %q in %d, %s", uid, want, code, out)
			}
		}
		if _, out := inSandbox(t, box, uid, "id", "-G"); uid != 0 && out != "20001 20002\n" {
			t.Errorf("groups %q", out)
		}
	}
}

func TestSandboxFileSystem(t *testing.T) {
	box := newTestSandbox(t)
	inside := t.TempDir() // below /tmp, so not to be seen
	for _, uid := range []int{0, 20001} {
		for _, script := range []string{"touch /usr/x", "touch /etc/x", "touch /dev/x", "echo 1 >/proc/sys/kernel/sysrq", "echo b >/proc/sysrq-trigger",
			"test -r /dev/mem", "ls /dev/vport* /dev/sd* /dev/vd*", "mkdir /sys/fs/cgroup/x", "mount -t tmpfs x /mnt", "umount /tmp", "test -s /proc/kcore",
			"mknod /tmp/null c 1 3", "test -e " + inside} {
			if code, out := inSandbox(t, box, uid, "sh", "-c", script); code == 0 {
				t.Errorf("uid %d: %s was possible: %s", uid, script, out)
			}
		}
		for _, script := range []string{"echo x >/tmp/mine && cat /tmp/mine && rm /tmp/mine", "echo x >/dev/null", "head -c 1 /dev/urandom >/dev/null", "test -d /dev/pts -a -d /dev/shm", "echo x >/dev/stdout"} {
			if code, out := inSandbox(t, box, uid, "sh", "-c", script); code != 0 {
				t.Errorf("uid %d: %s was not possible: %s", uid, script, out)
			}
		}
	}
	if code, out := inSandbox(t, box, 20001, "test", "-e", "/proc/1"); code == 0 {
		t.Errorf("another user's process is to be seen: %s", out)
	}
	// What was made read-only in there isn't here.
	probe := filepath.Join("/usr", ".clawvm-test")
	if err := os.WriteFile(probe, nil, 0o600); err != nil {
		t.Error(err)
	} else if err := os.Remove(probe); err != nil {
		t.Error(err)
	}
}

func TestSandboxIsSharedByThoseWhoEnterIt(t *testing.T) {
	box := newTestSandbox(t)
	if code, out := inSandbox(t, box, 20001, "sh", "-c", "echo kept >/tmp/file"); code != 0 {
		t.Fatal(out)
	}
	if _, out := inSandbox(t, box, 20001, "cat", "/tmp/file"); out != "kept\n" {
		t.Errorf("%q", out)
	}
	if _, err := os.Stat("/tmp/file"); err == nil {
		t.Error("the sandbox' /tmp is the machine's")
	}
}

func TestStageExitCodes(t *testing.T) {
	box := newTestSandbox(t)
	for want, argv := range map[int][]string{127: {"no-such-program"}, 126: {"/etc/passwd"}, 0: {"true"}, 143: {"sh", "-c", "kill -TERM $$"}} {
		if code, out := inSandbox(t, box, 20001, argv...); code != want {
			t.Errorf("%q: %d instead of %d: %s", argv, code, want, out)
		}
	}
	code, out := runStageSpec(t, &stageSpec{Argv: []string{"sh", "-c", "grep CapEff /proc/self/status; pwd"}, Home: "/usr"}, nil)
	if code != 0 || strings.Contains(out, "0000000000000000") || !strings.Contains(out, "/usr") {
		t.Errorf("as root: %d, %s", code, out)
	}
}

func TestSandboxSystemCalls(t *testing.T) {
	box := newTestSandbox(t)
	const python = "/usr/bin/python3"
	if _, err := os.Stat(python); err != nil {
		t.Skipf("no program to make system calls with: %v", err)
	}
	script := `
import ctypes, errno, mmap, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    ctypes.set_errno(0)
    r = libc.syscall(*args)
    print(name, "ok" if r >= 0 else errno.errorcode.get(ctypes.get_errno(), "?"))
for name, family, kind in (("unix", 1, 1), ("inet", 2, 1), ("inet6", 10, 1), ("netlink", 16, 3), ("alg", 38, 5), ("vsock", 40, 1), ("packet", 17, 3), ("bluetooth", 31, 1)):
    call(name, 41, family, kind, 0)
call("io_uring", 425, 1, 0)
call("userns", 272, 0x10000000)
call("clone3", 435, 0, 0)
call("bpf", 321, 0, 0, 0)
call("x32", 0x40000000 + 41, 40, 1, 0)
# int 0x80: socket(AF_VSOCK) by the 32-bit numbers, through code of our own
code = bytes([0x53, 0xb8, 0x67, 0x01, 0, 0, 0xbb, 40, 0, 0, 0, 0xb9, 1, 0, 0, 0, 0x31, 0xd2, 0xcd, 0x80, 0x5b, 0xc3])
m = mmap.mmap(-1, 4096, prot=7)
m.write(code)
f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
r = f()
print("int80", "ok" if r >= 0 else errno.errorcode.get(-r, "?"))
`
	if runtime.GOARCH != "amd64" {
		t.Skip("the numbers are amd64's")
	}
	code, out := inSandbox(t, box, 20001, python, "-c", script)
	want := "unix ok\ninet ok\ninet6 ok\nnetlink ok\nalg EAFNOSUPPORT\nvsock EAFNOSUPPORT\npacket EAFNOSUPPORT\nbluetooth EAFNOSUPPORT\n" +
		"io_uring ENOSYS\nuserns EPERM\nclone3 ENOSYS\nbpf EPERM\nx32 ENOSYS\nint80 ENOSYS\n"
	if code != 0 || out != want {
		t.Errorf("%d: %s", code, out)
	}
	plain, err := exec.Command(python, "-c", script).CombinedOutput()
	t.Logf("outside: %v, %s", err, bytes.ReplaceAll(plain, []byte("\n"), []byte("; ")))
}

// TestFilter runs the filter over calls without a kernel.
func TestFilter(t *testing.T) {
	raw, err := filter(unix.AUDIT_ARCH_X86_64, 0x40000000)
	if err != nil {
		t.Fatal(err)
	}
	prog, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("the filter can't be read back")
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	allowed := func(arch, nr, arg0 uint32) bool {
		// bpf.VM loads in network order, the kernel in the machine's.
		data := make([]byte, 64)
		for off, v := range map[int]uint32{dataNumber: nr, dataArch: arch, dataArg0: arg0} {
			data[off], data[off+1], data[off+2], data[off+3] = byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
		}
		n, err := vm.Run(data)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(n) == seccompAllow
	}
	for _, c := range []struct {
		name           string
		arch, nr, arg0 uint32
		want           bool
	}{
		{"read", unix.AUDIT_ARCH_X86_64, unix.SYS_READ, 0, true},
		{"netlink", unix.AUDIT_ARCH_X86_64, unix.SYS_SOCKET, unix.AF_NETLINK, true},
		{"unix pair", unix.AUDIT_ARCH_X86_64, unix.SYS_SOCKETPAIR, unix.AF_UNIX, true},
		{"vsock", unix.AUDIT_ARCH_X86_64, unix.SYS_SOCKET, unix.AF_VSOCK, false},
		{"vsock pair", unix.AUDIT_ARCH_X86_64, unix.SYS_SOCKETPAIR, unix.AF_VSOCK, false},
		{"alg", unix.AUDIT_ARCH_X86_64, unix.SYS_SOCKET, unix.AF_ALG, false},
		{"thread", unix.AUDIT_ARCH_X86_64, unix.SYS_CLONE, unix.CLONE_VM | unix.CLONE_THREAD, true},
		{"user namespace by clone", unix.AUDIT_ARCH_X86_64, unix.SYS_CLONE, unix.CLONE_NEWUSER, false},
		{"user namespace by unshare", unix.AUDIT_ARCH_X86_64, unix.SYS_UNSHARE, unix.CLONE_NEWUSER | unix.CLONE_NEWNS, false},
		{"io_uring", unix.AUDIT_ARCH_X86_64, unix.SYS_IO_URING_SETUP, 0, false},
		{"i386", unix.AUDIT_ARCH_I386, unix.SYS_READ, 0, false},
		{"x32", unix.AUDIT_ARCH_X86_64, 0x40000000 + unix.SYS_READ, 0, false},
		{"reboot", unix.AUDIT_ARCH_X86_64, unix.SYS_REBOOT, 0, false},
	} {
		if got := allowed(c.arch, c.nr, c.arg0); got != c.want {
			t.Errorf("%s: allowed %v", c.name, got)
		}
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"yes": 0o755, "no": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"PATH=relative::/nowhere:" + dir}
	if p, err := lookPath("yes", env); err != nil || p != filepath.Join(dir, "yes") {
		t.Errorf("%s, %v", p, err)
	}
	for _, name := range []string{"no", "absent", ".."} {
		if p, err := lookPath(name, env); !errors.Is(err, exec.ErrNotFound) {
			t.Errorf("%s: %s, %v", name, p, err)
		}
	}
	if p, err := lookPath("./x", env); err != nil || p != "./x" {
		t.Errorf("%s, %v", p, err)
	}
}
