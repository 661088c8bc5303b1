package tree

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// snapshot lists all that is beneath a directory: names, modes, owners, times, targets and contents.
func snapshot(t *testing.T, root string) string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(p)
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		line := fmt.Sprintf("%q %v %d %s", rel, info.Mode(), info.Sys().(*syscall.Stat_t).Uid, info.ModTime().Format(time.RFC3339Nano))
		switch {
		case info.Mode().IsRegular():
			raw, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %x", sha256.Sum256(raw))
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + target
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

// sample makes a tree with all that is kept.
func sample(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "sample")
	old := time.Date(2001, 2, 3, 4, 5, 6, 789012345, time.UTC)
	for _, d := range []string{"", "empty", "deep/er/and/deeper", "read-only"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	files := map[string]os.FileMode{
		"plain": 0o644, "script": 0o755, "secret": 0o600, "deep/er/and/deeper/file": 0o640, "read-only/file": 0o444,
		"with space": 0o644, "line\nend": 0o644, "escape\x1b[2J": 0o644, "not-utf8-\xff\xfe": 0o644, "ünïcode": 0o644, strings.Repeat("l", 255): 0o644, "zero": 0,
	}
	for name, mode := range files {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(p, []byte("this is "+name), 0o600), os.Chmod(p, mode), os.Chtimes(p, old, old)); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"link": "plain", "dangling": "/no/such", "up": "../..", "to-dir": "deep"} {
		p := filepath.Join(dir, name)
		ts := unix.NsecToTimespec(old.UnixNano())
		if err := errors.Join(os.Symlink(target, p), unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)); err != nil {
			t.Fatal(err)
		}
	}
	big, err := os.Create(filepath.Join(dir, "deep/big"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100_000 {
		fmt.Fprintln(big, i)
	}
	if err := big.Close(); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"read-only", "deep/er", "empty"} {
		p := filepath.Join(dir, d)
		if err := errors.Join(os.Chmod(p, 0o555), os.Chtimes(p, old, old)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// carry packs source and unpacks it at destination.
func carry(t *testing.T, source, destination string, hostile bool) error {
	t.Helper()
	r, w := io.Pipe()
	go func() { w.CloseWithError(Pack(w, source, PackOptions{Warn: func(err error) { t.Error(err) }})) }()
	err := Unpack(r, destination, UnpackOptions{Name: TopName(source), Hostile: hostile})
	r.CloseWithError(errors.New("unpacked"))
	return err
}

func TestATreeArrivesAsItWas(t *testing.T) {
	source := sample(t)
	to := t.TempDir()
	if err := carry(t, source, to, true); err != nil {
		t.Fatal(err)
	}
	if got, want := snapshot(t, filepath.Join(to, "sample")), snapshot(t, source); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	// Again over what is there, and by another name.
	if err := carry(t, source, to, true); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if err := carry(t, source, filepath.Join(to, "other"), true); err != nil {
		t.Fatal(err)
	}
	if got, want := snapshot(t, filepath.Join(to, "other")), snapshot(t, source); got != want {
		t.Errorf("by another name\n%s\nwant\n%s", got, want)
	}
}

// TestWhereACopyGoes holds the rules of docker cp.
func TestWhereACopyGoes(t *testing.T) {
	for _, c := range []struct{ source, destination, want, refused string }{
		{"file", "new", "new", ""},
		{"file", "dir", "dir/file", ""},
		{"file", "dir/", "dir/file", ""},
		{"file", "dir/.", "dir/file", ""},
		{"file", "there", "there", ""},
		{"file", "link-to-there", "there", ""},
		{"file", "link-to-dir", "dir/file", ""},
		{"file", "new/", "", "there is no directory"},
		{"file", "no/new", "", "there is no directory"},
		{"file", "there/", "", "not a directory"},
		{"file", "pipe", "", "neither a file nor a directory"},
		{"file", "dangling", "", "a link to something that isn't there"},
		{"file", "/dev/null", "", "neither a file nor a directory"},
		{"tree", "new", "new/inner", ""},
		{"tree", "new/", "new/inner", ""},
		{"tree", "dir", "dir/tree/inner", ""},
		{"tree/", "dir", "dir/tree/inner", ""},
		{"tree/.", "dir", "dir/inner", ""},
		{"tree/.", "new", "new/inner", ""},
		{"tree", "there", "", "a directory can't take its place"},
		{"symlink", "dir", "dir/symlink", ""},
		{"symlink", "new", "new", ""},
		{"file/.", "new", "", "not a directory"},
		{"nothing", "new", "", "no such file"},
		{"tree/pipe", "new", "", "neither a file nor a directory"},
	} {
		t.Run(c.source+" to "+strings.ReplaceAll(c.destination, "/", "|"), func(t *testing.T) {
			dir := t.TempDir()
			for _, d := range []string{"from/tree", "to/dir"} {
				if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(os.WriteFile(dir+"/from/file", []byte("x"), 0o644), os.WriteFile(dir+"/from/tree/inner", []byte("x"), 0o644),
				os.WriteFile(dir+"/to/there", []byte("before"), 0o644), os.Symlink("there", dir+"/to/link-to-there"), os.Symlink("dir", dir+"/to/link-to-dir"),
				os.Symlink("nowhere", dir+"/to/dangling"), os.Symlink("file", dir+"/from/symlink"), unix.Mkfifo(dir+"/to/pipe", 0o600)); err != nil {
				t.Fatal(err)
			}
			if c.source == "tree/pipe" {
				if err := unix.Mkfifo(dir+"/from/tree/pipe", 0o600); err != nil {
					t.Fatal(err)
				}
			}
			destination := dir + "/to/" + c.destination
			if strings.HasPrefix(c.destination, "/") {
				destination = c.destination
			}
			before := snapshot(t, dir+"/to")
			err := carry(t, dir+"/from/"+c.source, destination, true)
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("got %v, want a refusal with %q", err, c.refused)
				}
				if after := snapshot(t, dir+"/to"); after != before {
					t.Errorf("a refused copy changed\n%s\nto\n%s", before, after)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(dir + "/to/" + c.want); err != nil {
				t.Errorf("%v; there is\n%s", err, snapshot(t, dir+"/to"))
			}
			if raw, err := os.ReadFile(dir + "/to/there"); err != nil || (string(raw) == "x") != (c.want == "there") {
				t.Errorf("the file that was there holds %q, %v", raw, err)
			}
		})
	}
}

// forge makes a stream of headers; what is not a directory or link has four bytes in it.
func forge(t *testing.T, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if h.Mode == 0 && h.Typeflag != tar.TypeXGlobalHeader {
			h.Mode = 0o644
		}
		if h.Typeflag == tar.TypeReg && h.Size == 0 {
			h.Size = 4
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte("evil")); err != nil && h.Size == 4 {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		b.Write(make([]byte, 1024))
	}
	return b.Bytes()
}

// TestAHostileStreamWritesNothingOutside looks, after each, that nothing but the target has changed.
func TestAHostileStreamWritesNothingOutside(t *testing.T) {
	top := tar.Header{Typeflag: tar.TypeDir, Name: "x/", Mode: 0o755}
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
	link := func(name, target string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
	}
	for name, c := range map[string]struct {
		stream  []byte
		refused string // "": the stream is taken
	}{
		"dots":                       {forge(t, top, file("x/../../outside/file")), ".. in it"},
		"dots at the end":            {forge(t, top, file("x/..")), ".. in it"},
		"dots first":                 {forge(t, file("../outside/file")), ".. in it"},
		"absolute":                   {forge(t, file("/etc/clawvm-was-here")), "absolute path"},
		"another name":               {forge(t, file("y")), "which was asked for"},
		"another name later":         {forge(t, top, file("y")), "which was asked for"},
		"a longer name":              {forge(t, top, file("xy")), "which was asked for"},
		"the top in the middle":      {forge(t, file("x/file")), "does not begin with what was asked for"},
		"through a link up":          {forge(t, top, link("x/l", ".."), file("x/l/outside/file")), "not a directory"},
		"through an absolute link":   {forge(t, top, link("x/l", "OUTSIDE"), file("x/l/file")), "not a directory"},
		"a directory over a link":    {forge(t, top, link("x/l", "OUTSIDE"), tar.Header{Typeflag: tar.TypeDir, Name: "x/l/", Mode: 0o777}), "not a directory"},
		"the top is a link":          {forge(t, link("x", "OUTSIDE"), file("x/file")), "a directory is there"},
		"a file over a link":         {forge(t, top, link("x/l", "OUTSIDE/file"), file("x/l")), ""},
		"a link over a file":         {forge(t, top, file("x/l"), link("x/l", "OUTSIDE/file"), file("x/l")), ""},
		"through a link there":       {forge(t, top, file("x/there-link/file")), "not a directory"},
		"over a link there":          {forge(t, top, file("x/there-file-link")), ""},
		"a hard link outside":        {forge(t, top, tar.Header{Typeflag: tar.TypeLink, Name: "x/h", Linkname: "../outside/file"}, file("x/h")), "hard link"},
		"an absolute hard link":      {forge(t, top, tar.Header{Typeflag: tar.TypeLink, Name: "x/h", Linkname: "OUTSIDE/file"}), "hard link"},
		"a hard link inside":         {forge(t, top, file("x/f"), tar.Header{Typeflag: tar.TypeLink, Name: "x/h", Linkname: "x/f"}), "hard link"},
		"a character device":         {forge(t, top, tar.Header{Typeflag: tar.TypeChar, Name: "x/null", Devmajor: 1, Devminor: 3}), "device"},
		"a block device":             {forge(t, top, tar.Header{Typeflag: tar.TypeBlock, Name: "x/disk", Devmajor: 8}), "device"},
		"a pipe":                     {forge(t, top, tar.Header{Typeflag: tar.TypeFifo, Name: "x/pipe"}), "pipe"},
		"a setuid file":              {forge(t, top, tar.Header{Typeflag: tar.TypeReg, Name: "x/su", Mode: 0o6755}), ""},
		"a sticky setgid directory":  {forge(t, tar.Header{Typeflag: tar.TypeDir, Name: "x/", Mode: 0o7777}, tar.Header{Typeflag: tar.TypeDir, Name: "x/d/", Mode: 0o7777}), ""},
		"twice":                      {forge(t, top, file("x/f"), file("x/f")), ""},
		"a file, then a directory":   {forge(t, top, file("x/f"), tar.Header{Typeflag: tar.TypeDir, Name: "x/f/", Mode: 0o755}), "not a directory"},
		"a directory, then a file":   {forge(t, top, tar.Header{Typeflag: tar.TypeDir, Name: "x/f/", Mode: 0o755}, file("x/f")), "a directory is there"},
		"the top twice":              {forge(t, top, top), "twice"},
		"beneath a file":             {forge(t, top, file("x/f"), file("x/f/g")), "not a directory"},
		"eight exabytes":             {forge(t, top, tar.Header{Typeflag: tar.TypeReg, Name: "x/f", Size: 1<<63 - 1}), "kept for the host"},
		"a long name":                {forge(t, top, file("x/"+strings.Repeat("n", 256))), "more than 255 bytes"},
		"a long path":                {forge(t, top, file("x/"+strings.Repeat("n/", 3000)+"f")), "more than 4095 bytes"},
		"a deep path":                {forge(t, top, file("x/"+strings.Repeat("n/", 600)+"f")), "in one another"},
		"a long link":                {forge(t, top, link("x/l", strings.Repeat("n", 5000))), "can't be"},
		"nothing":                    {forge(t), "nothing in the stream"},
		"no tar":                     {bytes.Repeat([]byte("no tar "), 1000), "cannot read the stream"},
		"cut off":                    {forge(t, top, tar.Header{Typeflag: tar.TypeReg, Name: "x/f", Size: 100 << 10})[:4096], "ends in the middle"},
		"more behind the end":        {append(forge(t, top, file("x/f")), make([]byte, 2*maxRest)...), "something follows"},
		"a comment":                  {forge(t, tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, top), "cannot write"},
		"a sparse file":              {sparse(t), "sparse"},
		"a time that can't be":       {forge(t, top, tar.Header{Typeflag: tar.TypeReg, Name: "x/f", Format: tar.FormatPAX, ModTime: time.Unix(1<<60, 0)}), ""},
		"the first letter of a name": {forge(t, tar.Header{Typeflag: tar.TypeDir, Name: "x\x1b[2J/", Mode: 0o755}), `"x\x1b[2J/"`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			outside := filepath.Join(dir, "outside")
			target := filepath.Join(dir, "target")
			if err := errors.Join(os.Mkdir(outside, 0o700), os.MkdirAll(target+"/x", 0o755), os.WriteFile(outside+"/file", []byte("the host's"), 0o600),
				os.Symlink(outside, target+"/x/there-link"), os.Symlink(outside+"/file", target+"/x/there-file-link")); err != nil {
				t.Fatal(err)
			}
			before := snapshot(t, outside)
			stream := c.stream
			if bytes.Contains(stream, []byte("OUTSIDE")) {
				stream = retarget(t, stream, outside)
			}
			err := Unpack(bytes.NewReader(stream), target, UnpackOptions{Name: "x", Hostile: true, Owners: true})
			switch {
			case c.refused == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)):
				t.Errorf("got %v, want a refusal with %q", err, c.refused)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\x1b\n") {
				t.Errorf("the message has control characters: %q", err)
			}
			if after := snapshot(t, outside); after != before {
				t.Errorf("outside there was\n%s\nand is\n%s", before, after)
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
				t.Errorf("beside the target there is %v, %v", entries, err)
			}
			if _, err := os.Lstat("/etc/clawvm-was-here"); err == nil {
				t.Error("an absolute path was written")
			}
			inspect(t, target)
		})
	}
}

// inspect looks that nothing in a target is dangerous, or left over.
func inspect(t *testing.T, target string) {
	t.Helper()
	err := filepath.WalkDir(target, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(p)
		if err != nil {
			return err
		}
		if info.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky|fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0 {
			t.Errorf("%q is %v", p, info.Mode())
		}
		if strings.Contains(p, ".clawvm-cp-") {
			t.Errorf("%q is left", p)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// retarget writes a forged stream anew with OUTSIDE as the directory that it stands for.
func retarget(t *testing.T, stream []byte, outside string) []byte {
	t.Helper()
	var headers []tar.Header
	r := tar.NewReader(bytes.NewReader(stream))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return forge(t, headers...)
		}
		if err != nil {
			t.Fatal(err)
		}
		headers = append(headers, tar.Header{Typeflag: h.Typeflag, Name: h.Name, Mode: h.Mode, Linkname: strings.ReplaceAll(h.Linkname, "OUTSIDE", outside)})
	}
}

// sparse is a stream with a file of 1 TiB that has no bytes: package tar writes none.
func sparse(t *testing.T) []byte {
	t.Helper()
	raw := forge(t, tar.Header{Typeflag: tar.TypeDir, Name: "x/", Mode: 0o755})
	raw = raw[:512]
	h := make([]byte, 512)
	copy(h, "x/sparse")
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], "00000000000\x0000000000000\x00")
	h[156] = 'S'
	copy(h[257:], "ustar  \x00")
	copy(h[386:], "00000000000\x0000000000000\x00") // one hole that ends at its size
	copy(h[483:], "\x80\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00")
	copy(h[148:], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(append(raw, h...), make([]byte, 1024)...)
}

// TestAnEndlessStreamLeavesTheReserve fills a small disk with a file of a size that fits, and with endless small ones.
func TestAnEndlessStreamLeavesTheReserve(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a small disk")
	}
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=16m,nr_inodes=2000"); err != nil {
		t.Skipf("cannot mount a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for name, size := range map[string]int64{"bytes": 100 << 10, "files": 1} {
		r, w := io.Pipe()
		go func() {
			out := tar.NewWriter(w)
			body := make([]byte, size)
			_ = out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "x/", Mode: 0o755})
			for i := 0; ; i++ {
				if out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("x/%d", i), Mode: 0o644, Size: size}) != nil {
					return
				}
				if _, err := out.Write(body); err != nil {
					return
				}
			}
		}()
		err := Unpack(r, disk, UnpackOptions{Name: "x", Hostile: true})
		r.Close()
		if err == nil || !strings.Contains(err.Error(), "kept for the host") {
			t.Errorf("%s: %v", name, err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(disk, &st); err != nil {
			t.Fatal(err)
		}
		if st.Bavail < st.Blocks/20-1 || st.Ffree < st.Files/20-2 {
			t.Errorf("%s: %d of %d blocks and %d of %d files are left", name, st.Bavail, st.Blocks, st.Ffree, st.Files)
		}
		if err := os.RemoveAll(disk + "/x"); err != nil {
			t.Fatal(err)
		}
	}
	// Without the reserve the disk itself is the end, and the half file is gone.
	h := forge(t, tar.Header{Typeflag: tar.TypeReg, Name: "x", Size: 64 << 20})
	err := Unpack(io.MultiReader(bytes.NewReader(h[:512]), io.LimitReader(zeros{}, 64<<20)), disk, UnpackOptions{Name: "x"})
	if err == nil || !strings.Contains(err.Error(), "the disk is full") {
		t.Errorf("a full disk: %v", err)
	}
	if entries, err := os.ReadDir(disk); err != nil || len(entries) != 0 {
		t.Errorf("on the full disk there is %v, %v", entries, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestAStreamOfTheUsersOwn takes what other programs make: no directories of their own, hard links, a comment.
func TestAStreamOfTheUsersOwn(t *testing.T) {
	to := t.TempDir()
	stream := forge(t, tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}},
		tar.Header{Typeflag: tar.TypeReg, Name: "./a/b/c"}, tar.Header{Typeflag: tar.TypeLink, Name: "a/h", Linkname: "./a/b/c"}, tar.Header{Typeflag: tar.TypeReg, Name: "z"})
	if err := Unpack(bytes.NewReader(stream), to, UnpackOptions{}); err != nil {
		t.Fatal(err)
	}
	one, err1 := os.Stat(to + "/a/b/c")
	two, err2 := os.Stat(to + "/a/h")
	if err := errors.Join(err1, err2); err != nil || !os.SameFile(one, two) {
		t.Errorf("no hard link: %v", err)
	}
	for _, target := range []string{"../outside", "/etc/passwd", "a/l/x"} {
		stream := forge(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "a/l", Linkname: "/etc"}, tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: target})
		if err := Unpack(bytes.NewReader(stream), to, UnpackOptions{}); err == nil {
			t.Errorf("a hard link to %s was made", target)
		}
	}
	if err := Unpack(bytes.NewReader(stream), to+"/new", UnpackOptions{}); err == nil {
		t.Error("a stream went into a directory that isn't there")
	}
}

// TestWhatCannotBeReadIsSaid packs a tree with a socket, and one file that becomes shorter.
func TestWhatCannotBeReadIsSaid(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(dir+"/file", nil, 0o644), unix.Mkfifo(dir+"/pipe", 0o600)); err != nil {
		t.Fatal(err)
	}
	var warnings []string
	var b bytes.Buffer
	err := Pack(&b, dir+"/.", PackOptions{Warn: func(err error) { warnings = append(warnings, err.Error()) }})
	if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], "./pipe") {
		t.Errorf("%v, %q", err, warnings)
	}
	var count Count
	if err := Pack(io.Discard, "/proc/self", PackOptions{Follow: true, Count: &count}); err != nil || count.Entries() != 1 {
		t.Errorf("/proc: %v, %d entries", err, count.Entries())
	}
}

func FuzzUnpack(f *testing.F) {
	var b bytes.Buffer
	dir := f.TempDir()
	if err := errors.Join(os.WriteFile(dir+"/file", []byte("x"), 0o644), os.Symlink("file", dir+"/link"), os.Mkdir(dir+"/d", 0o755)); err != nil {
		f.Fatal(err)
	}
	if err := Pack(&b, dir+"/.", PackOptions{}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, stream []byte) {
		dir := t.TempDir()
		target := filepath.Join(dir, "target")
		if err := os.Mkdir(target, 0o700); err != nil {
			t.Fatal(err)
		}
		_ = Unpack(bytes.NewReader(stream), target, UnpackOptions{Name: ".", Hostile: true})
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("beside the target there is %v, %v", entries, err)
		}
		inspect(t, target)
	})
}
