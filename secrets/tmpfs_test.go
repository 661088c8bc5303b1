package secrets

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The stage as a VM has it: a tmpfs, 0711, with a file for the guest's user that nobody else reads.
func TestStageOnTmpfs(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: it mounts a tmpfs and gives files away")
	}
	runtime.LockOSThread() // never unlocked: the thread keeps its mount namespace, and ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	s := stage(t)
	if err := unix.Mount("tmpfs", s.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0711,size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(s.Dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	const guest = 20001
	file := put(t, filepath.Join(t.TempDir(), "file"), content, 0o600)
	all := []Secret{
		{Name: "file", File: file, UID: guest, GID: guest, Mode: 0o400},
		{Name: "made", Generate: 1024, UID: guest, GID: guest, Mode: 0o400},
	}
	if err := s.Write(all); err != nil {
		t.Fatal(err)
	}
	for _, secret := range all {
		info, err := os.Stat(filepath.Join(s.Dir, secret.Name))
		if err != nil {
			t.Fatal(err)
		}
		stat := info.Sys().(*syscall.Stat_t)
		if stat.Uid != guest || stat.Gid != guest || info.Mode() != 0o400 || stat.Nlink != 1 {
			t.Errorf("%s belongs to %d:%d, mode %s, %d links", secret.Name, stat.Uid, stat.Gid, info.Mode(), stat.Nlink)
		}
	}
	// Another owner is another file, although nothing else changed.
	all[0].UID = guest + 1
	if err := s.Write(all); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(s.Dir, "file")); err != nil || info.Sys().(*syscall.Stat_t).Uid != guest+1 {
		t.Errorf("the new owner isn't there: %v, %v", info, err)
	}
	// Full: an error that says so, the old secret in its place, and nothing half-written left.
	put(t, file, strings.Repeat(content, 10_000), 0o600)
	err := s.Write(all)
	if err == nil || !strings.Contains(err.Error(), "secret file: cannot write file: ") || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("on a full stage the error is %v", err)
	}
	if err != nil && strings.Contains(err.Error(), content) {
		t.Error("the error has the content")
	}
	if got := read(t, filepath.Join(s.Dir, "file")); got != content {
		t.Errorf("the old secret is %d bytes", len(got))
	}
	entries, err := os.ReadDir(s.Dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("staged are %v, %v", entries, err)
	}
}
