package storage

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMountTmpfs(t *testing.T) {
	needRoot(t)
	dir := smallFS(t, 1<<20)
	if err := MountTmpfs(dir, 1<<20, 0o700); !errors.Is(err, ErrMounted) {
		t.Errorf("mounted twice: %v", err)
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if !strings.Contains(line, " "+dir+" ") {
			continue
		}
		for _, option := range []string{"nosuid", "nodev", "noexec", "size=1024k"} {
			if !strings.Contains(line, option) {
				t.Errorf("%s is missing in %s", option, line)
			}
		}
		t.Logf("Linux %s: %s", unix.ByteSliceToString(uts.Release[:]), line)
	}
	if err := os.WriteFile(filepath.Join(dir, "large"), make([]byte, 2<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("more than its size went in: %v", err)
	}
}

func TestUnmountNothing(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Join(dir, "absent")} {
		if err := Unmount(d); err != nil {
			t.Error(err)
		}
	}
}

func TestBindReadOnly(t *testing.T) {
	source := smallFS(t, 1<<20)
	below := filepath.Join(source, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := MountTmpfs(below, 1<<20, 0o755); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := Unmount(below); err != nil {
			t.Error(err)
		}
	}()
	target := t.TempDir()
	if err := BindReadOnly(source, target); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "below/file"} {
		if err := os.WriteFile(filepath.Join(target, name), nil, 0o600); !errors.Is(err, syscall.EROFS) {
			t.Errorf("writing %s: %v", name, err)
		}
		if err := os.WriteFile(filepath.Join(source, name), nil, 0o600); err != nil {
			t.Errorf("the source isn't writable any more: %v", err)
		}
		if _, err := os.Stat(filepath.Join(target, name)); err != nil {
			t.Error(err)
		}
	}
	if err := BindReadOnly(source, target); !errors.Is(err, ErrMounted) {
		t.Errorf("bound twice: %v", err)
	}
	if err := Unmount(target); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(target, "file")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Unmount: %v", err)
	}
}
