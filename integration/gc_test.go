package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestGarbage makes left-overs by hand, and what looks like them and is not this
// root's: the first are shown and then removed, the second stay.
func TestGarbage(t *testing.T) {
	w := newHollowWorld(t, "/run/garbage", "bridge: garbagebr\naddress: 192.168.86.1/24\n")
	raw, err := os.ReadFile(filepath.Join(w.root, "var/lib/clawvm/root-id"))
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimSpace(string(raw))
	in := func(path string) string { return filepath.Join(w.root, path) }
	before := w.everything(t)

	// Not this root's: the same names with another mark, or none.
	keepLink(t, tap("garbagetap1"), "clawvm:0a1b2c3d:dead")
	keepLink(t, tap("garbagetap2"), "")
	other := marked(t, "clawvm:0a1b2c3d:dead")

	// Left-overs.
	addLink(t, tap("garbagetap0"), "clawvm:"+id+":dead")
	lost := marked(t, "clawvm:"+id+":killed")
	mkdir(t, in("run/clawvm/dead/secrets"), 0o755)
	if err := unix.Mount("clawvm", in("run/clawvm/dead/secrets"), "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	mkdir(t, in("var/lib/clawvm/store/tmp/import-dead"), 0o700)
	unused := in("var/lib/clawvm/boot/kernel-unused")
	mkdir(t, unused, 0o755)
	if err := os.WriteFile(in("var/lib/clawvm/boot/lock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	long := time.Now().Add(-30 * 24 * time.Hour)
	if err := os.Chtimes(unused, long, long); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nobody", in("var/lib/clawvm/leases/192.168.86.9")); err != nil {
		t.Fatal(err)
	}
	// Data of a VM that nothing declares, and what a killed process left of it.
	mkdir(t, in("var/lib/clawvm/vms/orphan/volumes"), 0o755)
	for _, f := range []string{"volumes/state.raw", "volumes/more.raw.new", "overlay.raw", ".last-end.json123"} {
		if err := os.WriteFile(in("var/lib/clawvm/vms/orphan/"+f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	full := w.everything(t)
	shown := w.must(t, "gc", "--dry-run")
	w.compare(t, full, w.everything(t))
	removed := w.must(t, "gc")
	if want := strings.ReplaceAll(shown, "would remove:", "removed:"); removed != want {
		t.Errorf("gc --dry-run says\n%s\nand gc\n%s", shown, removed)
	}
	for _, want := range []string{"garbagetap0", "1 processes of VM killed", "dead/secrets", "tmp/import-dead", "lease of VM nobody", "more.raw.new", ".last-end.json123", "boot/kernel-unused"} {
		if !strings.Contains(removed, "removed: ") || !strings.Contains(removed, want) {
			t.Errorf("gc does not name %s:\n%s", want, removed)
		}
	}
	for _, kept := range []string{"volumes/state.raw", "overlay.raw"} {
		if _, err := os.Stat(in("var/lib/clawvm/vms/orphan/" + kept)); err != nil {
			t.Errorf("a guest's data: %v", err)
		}
	}
	if !alive(other) || alive(lost) {
		t.Errorf("the other root's process lives: %v; the left-over: %v", alive(other), alive(lost))
	}
	w.must(t, "gc", "--overlays")
	if _, err := os.Stat(in("var/lib/clawvm/vms/orphan/overlay.raw")); err == nil {
		t.Error("gc --overlays left the overlay of a VM that nothing declares")
	}
	w.must(t, "rm", "--volumes", "orphan")
	for _, link := range []string{"garbagetap1", "garbagetap2"} {
		if out, err := exec.Command("ip", "link", "show", link).CombinedOutput(); err != nil {
			t.Errorf("%s is not this root's: %s", link, out)
		}
		exec.Command("ip", "link", "set", link, "alias", "").Run()
	}

	// What others mounted in a run directory is not looked into.
	mkdir(t, in("run/clawvm/dead/theirs"), 0o755)
	if err := unix.Mount(w.dir, in("run/clawvm/dead/theirs"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	r := w.clawvm(t, "gc")
	if r.code != 1 || !strings.Contains(r.stderr, "is mounted there, which is not clawvm's") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if _, err := os.Stat(filepath.Join(w.dir, "share")); err != nil {
		t.Errorf("what is mounted there: %v", err)
	}
	if err := unix.Unmount(in("run/clawvm/dead/theirs"), 0); err != nil {
		t.Fatal(err)
	}
	w.must(t, "gc")
	after := w.everything(t)
	for _, f := range before["files"] {
		if !strings.Contains(strings.Join(after["files"], "\n"), f) {
			t.Errorf("gone: %s", f)
		}
	}
}

// marked starts a process with a mark for the length of the test.
func marked(t *testing.T, mark string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.Env = []string{"CLAWVM_MARK=" + mark}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

// alive says whether a process is there and no zombie.
func alive(cmd *exec.Cmd) bool {
	if cmd.Process.Signal(syscall.Signal(0)) != nil {
		return false
	}
	for deadline := time.Now().Add(100 * time.Millisecond); time.Now().Before(deadline); {
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != nil || info.Signo != 0 {
			return false
		}
	}
	return true
}
