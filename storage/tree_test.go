package storage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// capNetBind is security.capability for cap_net_bind_service=ep.
const capNetBind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// old is a time with all its digits.
var old = time.Unix(1234567890, 123456789)

// tarEntry makes a header with everything but its type filled in.
func tarEntry(name string, kind byte, mode int64) *tar.Header {
	return &tar.Header{Name: name, Typeflag: kind, Mode: mode, ModTime: old, Format: tar.FormatPAX}
}

type tarItem struct {
	header  *tar.Header
	content string
}

func file(name, content string) tarItem {
	h := tarEntry(name, tar.TypeReg, 0o644)
	h.Size = int64(len(content))
	return tarItem{h, content}
}

func dir(name string) tarItem { return tarItem{tarEntry(name, tar.TypeDir, 0o755), ""} }

func link(name, target string) tarItem {
	h := tarEntry(name, tar.TypeSymlink, 0o777)
	h.Linkname = target
	return tarItem{h, ""}
}

func hard(name, target string) tarItem {
	h := tarEntry(name, tar.TypeLink, 0o644)
	h.Linkname = target
	return tarItem{h, ""}
}

func makeTar(t testing.TB, items ...tarItem) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		if err := w.WriteHeader(i.header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, i.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sampleTar is an archive with an entry of every kind.
func sampleTar(t testing.TB) []byte {
	program := file("./usr/bin/passwd", "#!/bin/sh\n")
	program.header.Mode, program.header.Gid = 0o6755, 42
	server := file("./usr/bin/server", "server")
	server.header.Mode = 0o755
	server.header.PAXRecords = map[string]string{
		"SCHILY.xattr.security.capability": capNetBind, "SCHILY.xattr.user.note": "a=b c",
		"SCHILY.xattr.trusted.overlay.opaque": "y",
	}
	home := dir("./home/openclaw")
	home.header.Mode, home.header.Uid, home.header.Gid = 0o2750, 20001, 20001
	home.header.PAXRecords = map[string]string{"SCHILY.xattr.user.kind": "home"}
	state := file("./home/openclaw/état %2D\n", "x")
	state.header.Uid, state.header.Gid, state.header.Mode = 20001, 20001, 0
	fifo := tarItem{tarEntry("./run/initctl", tar.TypeFifo, 0o600), ""}
	null := tarItem{tarEntry("./dev/null", tar.TypeChar, 0o666), ""}
	return makeTar(t,
		dir("./"), dir("./usr/"), dir("./usr/bin/"), program, server,
		hard("./usr/bin/second", "./usr/bin/server"), hard("./a-first", "usr/bin/server"),
		link("./bin", "usr/bin"), link("./absolute", "/etc/passwd"), hard("./bin2", "bin"),
		dir("./home"), home, state, dir("./run"), fifo, dir("./dev"), null,
		file("./etc/passwd", "root:x:0:0::/root:/bin/sh\nopenclaw:x:20001:20002::/home/openclaw:/bin/sh\nrelative:x:7:7::home:/bin/sh\n"),
		file("./etc/.wh.gone", ""), file("./etc/-", "dash"),
		file("./var/sparse", "begin"+string(make([]byte, 1<<20))+"end"+string(make([]byte, 100_000))),
		dir("./tmp"), file("./usr-file", "sorts between usr and usr/"),
	)
}

func newStore(t testing.TB) *Store {
	t.Helper()
	needRoot(t)
	return &Store{Dir: filepath.Join(t.TempDir(), "store")}
}

func importTar(t testing.TB, s *Store, name string, data []byte) *Image {
	t.Helper()
	image, err := s.ImportTar(t.Context(), bytes.NewReader(data), name, ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// half fails when something half-made is in a store.
func nothingLeft(t testing.TB, s *Store) {
	t.Helper()
	left, err := os.ReadDir(filepath.Join(s.Dir, tmpDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("left in the store: %v", left)
	}
}

func compressed(t testing.TB, how string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch how {
	case "gz":
		w = gzip.NewWriter(&b)
	case "zst":
		w, err = zstd.NewWriter(&b)
	case "xz":
		w, err = xz.NewWriter(&b)
	default:
		return data
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// describeTree prints what a tree is, independently of the code that is tested.
func describeTree(t testing.TB, root string) string {
	t.Helper()
	var b bytes.Buffer
	err := filepath.Walk(root, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%q %o %d:%d %d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		if !info.IsDir() {
			fmt.Fprintf(&b, " %d bytes, %d names", st.Size, st.Nlink)
		}
		if info.Mode()&os.ModeSymlink != 0 {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %q", target)
		} else {
			for _, name := range []string{"user.note", "user.kind", "security.capability", "trusted.overlay.opaque"} {
				value := make([]byte, 100)
				if n, err := unix.Lgetxattr(path, name, value); err == nil {
					fmt.Fprintf(&b, " %s=%q", name, value[:n])
				}
			}
		}
		fmt.Fprintln(&b)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// golden compares with a file in testdata, or rewrites it.
func golden(t testing.TB, name string, have []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, have, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, want) {
		t.Errorf("%s differs; it is now:\n%s\nand was:\n%s", path, have, want)
	}
}
