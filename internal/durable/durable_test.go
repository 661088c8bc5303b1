package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "state.json")
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	for _, text := range []string{"first", "second, and longer", ""} {
		if err := WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != text {
			t.Errorf("got %q, %v", got, err)
		}
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o644 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	}
	if names := list(t, dir); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
}

// TestWriteFileFullDisk keeps the old content where there is no room for the new.
func TestWriteFileFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, for a file system of its own")
	}
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	file := filepath.Join(dir, "state.json")
	if err := WriteFile(file, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := WriteFile(file, make([]byte, 1<<20), 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a full disk: %v", err)
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "old" {
		t.Errorf("got %q, %v", got, err)
	}
	if names := list(t, dir); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
}

func TestWriteFileAtOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := WriteFile(file, []byte(strings.Repeat(string(rune('a'+i)), 10_000)), 0o600); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got, err := os.ReadFile(file)
	if err != nil || len(got) != 10_000 || strings.Count(string(got), string(got[:1])) != 10_000 {
		t.Errorf("%d bytes that are not one writer's, %v", len(got), err)
	}
	if names := list(t, filepath.Dir(file)); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
}

// TestUnfinished looks at what a killed writer leaves, which a directory in the
// file's place makes of a living one.
func TestUnfinished(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "last-end.json")
	if err := os.MkdirAll(filepath.Join(file, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(file, []byte("x"), 0o600); err == nil {
		t.Error("a directory was replaced by a file")
	}
	for name, want := range map[string]bool{
		".last-end.json123456": true, ".last-end.json": false, ".last-end.jsonx1": false, "last-end.json1": false, ".other1": false,
	} {
		if IsUnfinished(name, "last-end.json") != want {
			t.Errorf("%s: want %v", name, want)
		}
	}
}

func TestNames(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a/b/c")
	for range 2 {
		if err := MkdirAll(deep, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(deep, "link")
	if err := Symlink("first", link); err != nil {
		t.Fatal(err)
	}
	if err := Symlink("second", link); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a link that is there: %v", err)
	}
	if err := Rename(link, filepath.Join(dir, "moved")); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(filepath.Join(dir, "moved")); err != nil || to != "first" {
		t.Errorf("%q, %v", to, err)
	}
	file := filepath.Join(dir, "file")
	if err := WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Link(file, filepath.Join(dir, "second")); err != nil {
		t.Fatal(err)
	}
	if err := Link(file, filepath.Join(dir, "second")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a name that is there: %v", err)
	}
	if err := MkdirAll(filepath.Join(file, "below"), 0o700); err == nil {
		t.Error("a directory was made below a file")
	}
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
