package storage

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
)

// FuzzPasswd looks up users in the file that an image brings.
func FuzzPasswd(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/sh\napp:x:20001:20001::/home/app:/bin/sh\n", "app")
	f.Add("a:x:4294967295:1::/:\nb:x:-1:1::/:\n\x1b[2J:x:1:1::../..:\n", "7")
	f.Add(strings.Repeat("x", 70000), "x")
	f.Fuzz(func(t *testing.T, text, name string) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		uid, gid, home, err := (&Image{Root: dir}).LookupUser(name)
		if err != nil {
			if !errors.Is(err, ErrNoUser) {
				t.Errorf("%v", err)
			}
			if strings.ContainsFunc(err.Error(), unicode.IsControl) {
				t.Errorf("the refusal holds control characters: %q", err)
			}
			return
		}
		if uid < 0 || gid < 0 || uid >= maxID || gid >= maxID || !strings.HasPrefix(home, "/") {
			t.Errorf("user %q is %d:%d at %q", name, uid, gid, home)
		}
	})
}

// FuzzVirtiofsdVersion reads what a program that calls itself virtiofsd says.
func FuzzVirtiofsdVersion(f *testing.F) {
	for _, s := range []string{"virtiofsd 1.13.2\n", "virtiofsd version 7.2.22 (Debian 1:7.2)\n", "virtiofsd backend 1.10.0", "virtiofsd 99999999999999999999.1", "\x1b[2J"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, said string) {
		d, err := parseVersion("/usr/libexec/virtiofsd", said)
		if err != nil {
			if strings.ContainsFunc(err.Error(), unicode.IsControl) {
				t.Errorf("the refusal holds control characters: %q", err)
			}
			return
		}
		if strings.Trim(d.Version, "0123456789.") != "" {
			t.Errorf("version %q", d.Version)
		}
	})
}
