package storage

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCorrupt(t *testing.T) {
	needRoot(t)
	const program = "usr/bin/passwd"
	cases := []struct {
		name, path string
		spoil      func(root string) error
		cheap      bool // Open finds it too
	}{
		{"mode", program, func(r string) error { return os.Chmod(filepath.Join(r, program), 0o755) }, true},
		{"owner", program, func(r string) error { return os.Lchown(filepath.Join(r, program), 1, 42) }, true},
		{"gone", program, func(r string) error { return os.Remove(filepath.Join(r, program)) }, true},
		{"another type", program, func(r string) error {
			return errors.Join(os.Remove(filepath.Join(r, program)), os.Mkdir(filepath.Join(r, program), 0o755))
		}, true},
		{"modified", program, func(r string) error { return os.WriteFile(filepath.Join(r, program), []byte("#!/bin/sh\n"), 0) }, true},
		{"capability", "a-first", func(r string) error {
			return unix.Removexattr(filepath.Join(r, "a-first"), "security.capability")
		}, true},
		{"hard link", "usr/bin/second", func(r string) error {
			p := filepath.Join(r, "usr/bin/second")
			return keepTimes(filepath.Dir(p), func() error {
				return errors.Join(os.Remove(p), os.WriteFile(p, []byte("server"), 0o755), os.Chtimes(p, old, old))
			})
		}, true},
		{"link", "bin", func(r string) error {
			return errors.Join(os.Remove(filepath.Join(r, "bin")), os.Symlink("usr/lib", filepath.Join(r, "bin")))
		}, true},
		{"added", "etc/added", func(r string) error {
			return keepTimes(filepath.Join(r, "etc"), func() error { return os.WriteFile(filepath.Join(r, "etc/added"), nil, 0o600) })
		}, false},
		{"byte flipped", program, func(r string) error {
			p := filepath.Join(r, program)
			return keepTimes(p, func() error {
				f, err := os.OpenFile(p, os.O_WRONLY, 0)
				if err != nil {
					return err
				}
				_, err = f.WriteAt([]byte("x"), 3)
				return errors.Join(err, f.Close())
			})
		}, false},
		{"manifest", "manifest", func(r string) error {
			p := filepath.Join(filepath.Dir(r), manifestFile)
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			return os.WriteFile(p, []byte(strings.Replace(string(data), " 6755 ", " 0755 ", 1)), 0o600)
		}, true},
		{"manifest gone", "manifest", func(r string) error { return os.Remove(filepath.Join(filepath.Dir(r), manifestFile)) }, true},
		{"root gone", "root file system", func(r string) error { return os.RemoveAll(r) }, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := newStore(t)
			image := importTar(t, s, "sample", sampleTar(t))
			if err := c.spoil(image.Root); err != nil {
				t.Fatal(err)
			}
			_, err := s.Open("sample")
			if c.cheap != errors.Is(err, ErrCorrupt) || !c.cheap && err != nil {
				t.Errorf("Open: %v", err)
			}
			verr := s.Verify(t.Context(), image.Digest)
			if !errors.Is(verr, ErrCorrupt) {
				t.Errorf("Verify: %v", verr)
			}
			for _, err := range []error{err, verr} {
				if err == nil {
					continue
				}
				// The first path: of a changed directory that is itself.
				if !strings.Contains(err.Error(), c.path) && !strings.Contains(err.Error(), parentOf(c.path)+`" was modified`) {
					t.Errorf("the message doesn't name %s: %v", c.path, err)
				}
				if !strings.Contains(err.Error(), "clawvm image rm ") {
					t.Errorf("the message doesn't say what to do: %v", err)
				}
			}
			if err := s.Remove("sample", nil); err != nil {
				t.Errorf("Remove: %v", err)
			}
			importTar(t, s, "sample", sampleTar(t))
		})
	}
}

// keepTimes does something to a file or directory and sets its times back.
func keepTimes(path string, do func() error) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	mode := info.Sys().(*syscall.Stat_t).Mode & 0o7777
	return errors.Join(do(), syscall.Chmod(path, mode), os.Chtimes(path, time.Now(), info.ModTime()))
}

func TestNamesAndRemove(t *testing.T) {
	s := newStore(t)
	if images, err := s.List(); err != nil || len(images) != 0 {
		t.Errorf("an empty store: %v, %v", images, err)
	}
	if _, err := s.Open("absent"); !errors.Is(err, ErrNoImage) || !strings.Contains(err.Error(), "clawvm image build") {
		t.Errorf("an absent image: %v", err)
	}
	for _, bad := range []string{"", "../x", "X", "sha256:12", "a/b", ".x"} {
		if _, err := s.Open(bad); !errors.Is(err, ErrNoImage) {
			t.Errorf("Open(%q): %v", bad, err)
		}
	}
	one := importTar(t, s, "one", sampleTar(t))
	importTar(t, s, "uno", sampleTar(t))
	two := importTar(t, s, "two", makeTar(t, file("a", "")))
	three := importTar(t, s, "", makeTar(t, file("b", "")))
	images, err := s.List()
	if err != nil || len(images) != 3 || images[0].Digest != three.Digest || images[2].Digest != one.Digest {
		t.Fatalf("%v, %v", images, err)
	}
	if !slices.Equal(images[2].Names, []string{"one", "uno"}) || len(images[0].Names) != 0 {
		t.Errorf("names: %v", images)
	}
	used := func(digest string) []string {
		if digest != one.Digest {
			t.Errorf("asked for %s", digest)
		}
		return []string{"gateway", "second"}
	}
	// The first name may go, the image stays; the last may not.
	if err := s.Remove("one", used); err != nil {
		t.Error(err)
	}
	if err := s.Remove("uno", used); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "gateway, second") {
		t.Errorf("in use: %v", err)
	}
	if err := s.Remove(one.Digest, used); !errors.Is(err, ErrInUse) {
		t.Errorf("in use: %v", err)
	}
	if _, err := s.Open("uno"); err != nil {
		t.Error(err)
	}
	if err := s.Remove("uno", nil); err != nil {
		t.Error(err)
	}
	if _, err := s.Open(one.Digest); !errors.Is(err, ErrNoImage) {
		t.Errorf("after Remove: %v", err)
	}
	if err := s.Remove("uno", nil); !errors.Is(err, ErrNoImage) {
		t.Errorf("Remove again: %v", err)
	}
	if err := s.Remove(two.Digest, nil); err != nil {
		t.Error(err)
	}
	if _, err := s.Open("two"); !errors.Is(err, ErrNoImage) {
		t.Errorf("a name of a removed image: %v", err)
	}
	// A name moves to another image.
	importTar(t, s, "three", makeTar(t, file("b", "")))
	moved := importTar(t, s, "three", makeTar(t, file("c", "")))
	if image, err := s.Open("three"); err != nil || image.Digest != moved.Digest {
		t.Errorf("%v, %v", image, err)
	}
	// A name whose image is gone can be removed.
	if err := os.RemoveAll(filepath.Dir(moved.Root)); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("three", nil); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s)
}

func TestLookupUser(t *testing.T) {
	s := newStore(t)
	image := importTar(t, s, "x", sampleTar(t))
	for name, want := range map[string]struct {
		uid, gid int
		home     string
	}{
		"root": {0, 0, "/root"}, "openclaw": {20001, 20002, "/home/openclaw"}, "20001": {20001, 20002, "/home/openclaw"},
		"relative": {7, 7, "/"}, "555": {555, 555, "/"},
	} {
		uid, gid, home, err := image.LookupUser(name)
		if err != nil || uid != want.uid || gid != want.gid || home != want.home {
			t.Errorf("%s: %d %d %q %v", name, uid, gid, home, err)
		}
	}
	for _, name := range []string{"absent", "", "-1", "4294967295", "99999999999"} {
		if _, _, _, err := image.LookupUser(name); !errors.Is(err, ErrNoUser) {
			t.Errorf("%q: %v", name, err)
		}
	}
	// A link out of the image leads back into it.
	escape := importTar(t, s, "y", makeTar(t, dir("etc"), link("etc/passwd", "/../../../../etc/hostname")))
	if _, _, _, err := escape.LookupUser("root"); !errors.Is(err, ErrNoUser) {
		t.Errorf("through a link: %v", err)
	}
	odd := importTar(t, s, "z", makeTar(t, dir("etc/passwd")))
	if _, _, _, err := odd.LookupUser("root"); err == nil {
		t.Error("a directory was read")
	}
	large := importTar(t, s, "large", makeTar(t, file("etc/passwd", strings.Repeat("#\n", maxPasswd))))
	if _, _, _, err := large.LookupUser("root"); err == nil {
		t.Error("too large a file was read")
	}
}
