package storage

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseVersion(t *testing.T) {
	for output, want := range map[string]string{
		"virtiofsd 1.13.2\n":         "1.13.2",
		"virtiofsd backend 1.10.0\n": "1.10.0",
		"virtiofsd 1.14.0-dev\n":     "1.14.0",
		"virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nusing FUSE kernel interface version 7.36\n": "7.2.22 legacy",
		"virtiofsd 1.9.0\n":                    "older than 1.10.0",
		"virtiofsd version 5.2.0\n":            "older than 7.0.0",
		"virtiofsd version \n":                 "which version",
		"":                                     "which version",
		"virtiofsd 99999999999999999999.1.1\n": "impossible",
	} {
		v, err := parseVersion("/x", output)
		have := ""
		if err != nil {
			have = err.Error()
		} else if have = v.Version; v.Legacy {
			have += " legacy"
		}
		if !strings.Contains(have, want) || err == nil && have != want {
			t.Errorf("%q: %s", output, have)
		}
	}
}

// fakeVirtiofsd is a script that says a version.
func fakeVirtiofsd(t *testing.T, says string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "virtiofsd")
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho '"+says+"'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFindVirtiofsd(t *testing.T) {
	usual := virtiofsdPaths
	defer func() { virtiofsdPaths = usual }()
	t.Setenv("PATH", "/nowhere")
	t.Setenv(VirtiofsdVariable, "")
	rust, older := fakeVirtiofsd(t, "virtiofsd 1.13.2"), fakeVirtiofsd(t, "virtiofsd 1.8.0")
	legacy := fakeVirtiofsd(t, "virtiofsd version 7.2.0")

	virtiofsdPaths = []string{"/nowhere/virtiofsd", older, legacy, rust}
	if v, err := FindVirtiofsd(t.Context()); err != nil || v.Path != rust || v.Legacy {
		t.Errorf("of all: %+v, %v", v, err)
	}
	virtiofsdPaths = []string{older, legacy}
	if v, err := FindVirtiofsd(t.Context()); err != nil || v.Path != legacy || !v.Legacy {
		t.Errorf("without Rust's: %+v, %v", v, err)
	}
	virtiofsdPaths = []string{older}
	if _, err := FindVirtiofsd(t.Context()); !errors.Is(err, ErrNoVirtiofsd) || !strings.Contains(err.Error(), "1.8.0, older than 1.10.0; install") {
		t.Errorf("with an old one: %v", err)
	}
	virtiofsdPaths = nil
	if _, err := FindVirtiofsd(t.Context()); !errors.Is(err, ErrNoVirtiofsd) || !strings.Contains(err.Error(), "qemu-system-common (Debian 12)") {
		t.Errorf("with none: %v", err)
	}
	t.Setenv("PATH", filepath.Dir(rust))
	if v, err := FindVirtiofsd(t.Context()); err != nil || v.Path != rust {
		t.Errorf("on the PATH: %+v, %v", v, err)
	}
	t.Setenv(VirtiofsdVariable, legacy)
	if v, err := FindVirtiofsd(t.Context()); err != nil || v.Path != legacy {
		t.Errorf("named: %+v, %v", v, err)
	}
	t.Setenv(VirtiofsdVariable, "/nowhere/virtiofsd")
	if _, err := FindVirtiofsd(t.Context()); !errors.Is(err, ErrNoVirtiofsd) || !strings.Contains(err.Error(), VirtiofsdVariable) {
		t.Errorf("named wrongly: %v", err)
	}
}

func testVersion(t *testing.T, output string) *Virtiofsd {
	t.Helper()
	v, err := parseVersion("/usr/libexec/virtiofsd", output)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVirtiofsdArgs(t *testing.T) {
	store := Share{Tag: "store", ReadOnly: true, Cache: CacheAlways}
	labelled := store
	labelled.XAttr = true
	secrets := Share{Tag: "secrets", ReadOnly: true, Cache: CacheNever}
	inbox := Share{Tag: "inbox", Cache: CacheAuto, SquashUID: 1000, SquashGID: 1001, GuestUID: 20001, GuestGID: 20002}
	var b strings.Builder
	for _, version := range []string{"virtiofsd 1.10.1", "virtiofsd 1.13.2", "virtiofsd version 7.2.22"} {
		v := testVersion(t, version)
		for _, s := range []Share{store, labelled, secrets, inbox} {
			if v.checkShare(s) != nil {
				continue
			}
			b.WriteString(version + ", " + s.Tag + ":")
			if v.bindNeeded(s) {
				b.WriteString(" (of a read-only mount)")
			}
			b.WriteString("\n\t" + strings.Join(v.args(s, "/source,\\directory", 1000), "\n\t") + "\n")
		}
	}
	golden(t, "virtiofsd.args", []byte(b.String()))
}

func TestShareRefused(t *testing.T) {
	writable := Share{Tag: "inbox", Source: "/srv/inbox", Cache: CacheAuto, SquashUID: 1000, SquashGID: 1000}
	rooted, group, cache := writable, writable, writable
	rooted.SquashUID = 0
	group.SquashGID = 0
	cache.Cache, cache.ReadOnly = "", true
	for _, c := range []struct {
		version string
		share   Share
		want    string
	}{
		{"virtiofsd 1.13.0", writable, ""},
		{"virtiofsd 1.13.0", rooted, "belongs to root"},
		{"virtiofsd 1.13.0", group, "belongs to root"},
		{"virtiofsd 1.12.0", writable, "install virtiofsd 1.13.0 or newer"},
		{"virtiofsd version 7.2.22", writable, "install virtiofsd 1.13.0 or newer"},
		{"virtiofsd 1.13.0", cache, "unknown cache mode"},
	} {
		err := testVersion(t, c.version).checkShare(c.share)
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, ErrShare) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s, %+v: %v", c.version, c.share, err)
		}
	}
}

func TestServeRefused(t *testing.T) {
	needRoot(t)
	v := testVersion(t, "virtiofsd 1.13.2")
	base := t.TempDir()
	ok := Share{Tag: "x", Source: base, Socket: filepath.Join(base, "s"), ReadOnly: true, Cache: CacheAuto}
	absent, notDir, long, inTheWay := ok, ok, ok, ok
	absent.Source = filepath.Join(base, "absent")
	notDir.Source = "/etc/passwd"
	long.Socket = filepath.Join(base, strings.Repeat("x", 100))
	inTheWay.Socket = filepath.Join(base, "file")
	if err := os.WriteFile(inTheWay.Socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		share Share
		want  string
	}{
		{absent, "it isn't there; make the directory"},
		{notDir, "no directory"},
		{long, "more than 107 bytes"},
		{inTheWay, "isn't a socket"},
		{ok, "cannot start"}, // there is no such virtiofsd
	} {
		v := *v
		v.Path = "/nowhere/virtiofsd"
		if _, err := v.Serve(t.Context(), c.share); !errors.Is(err, ErrShare) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("wanted %q: %v", c.want, err)
		}
	}
	if _, err := os.Lstat(inTheWay.Socket); err != nil {
		t.Errorf("what was in the way: %v", err)
	}
	if _, err := os.Lstat(ok.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}
