package storage

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestImportTar(t *testing.T) {
	s := newStore(t)
	data := sampleTar(t)
	var notes []string
	image, err := s.ImportTar(t.Context(), bytes.NewReader(data), "sample", ImportOptions{Note: func(n string) { notes = append(notes, n) }})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := os.ReadFile(filepath.Join(filepath.Dir(image.Root), manifestFile))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "sample.manifest", manifest)
	golden(t, "sample.tree", []byte(describeTree(t, image.Root)))
	if len(notes) != 2 || !strings.Contains(strings.Join(notes, "\n"), "dev/null: device nodes aren't kept") {
		t.Errorf("notes: %q", notes)
	}
	if !image.XAttrs || image.Files != strings.Count(string(manifest), "\n")-1 || len(image.Names) != 1 {
		t.Errorf("the image is %+v", image)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(image.Root, "var/sparse"), &st); err != nil || st.Blocks*512 > 100_000 {
		t.Errorf("the sparse file takes %d bytes, %v", st.Blocks*512, err)
	}
	if err := s.Verify(t.Context(), "sample"); err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(s.Dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the store is %v, %v", info.Mode(), err)
	}
	inode := st.Ino
	for _, how := range []string{"gz", "zst", "xz"} {
		again, err := s.ImportTar(t.Context(), bytes.NewReader(compressed(t, how, data)), "sample-"+how, ImportOptions{Expect: image.Digest})
		if err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		if again.Digest != image.Digest || !again.Created.Equal(image.Created) {
			t.Errorf("%s: %+v", how, again)
		}
	}
	if err := syscall.Stat(filepath.Join(image.Root, "var/sparse"), &st); err != nil || st.Ino != inode {
		t.Errorf("the same content was written again")
	}
	nothingLeft(t, s)

	// The same tree from a directory is the same image, in any store.
	other := newStore(t)
	fromDir, err := other.ImportDir(t.Context(), image.Root, "copy", ImportOptions{Expect: image.Digest})
	if err != nil {
		t.Fatal(err)
	}
	if have, want := describeTree(t, fromDir.Root), describeTree(t, image.Root); have != want {
		t.Errorf("the copy is\n%s\ninstead of\n%s", have, want)
	}
	if err := syscall.Stat(filepath.Join(fromDir.Root, "var/sparse"), &st); err != nil || st.Blocks*512 > 100_000 {
		t.Errorf("the sparse file's copy takes %d bytes, %v", st.Blocks*512, err)
	}
}

func TestImportDirDropsWhatIsNoFile(t *testing.T) {
	s := newStore(t)
	source := smallFS(t, 1<<20)
	inner := filepath.Join(source, "mounted")
	if err := errors.Join(
		syscall.Mknod(filepath.Join(source, "null"), syscall.S_IFCHR|0o666, 1<<8|3),
		syscall.Mknod(filepath.Join(source, "socket"), syscall.S_IFSOCK|0o666, 0),
		os.Symlink("/etc", filepath.Join(source, "etc")),
		os.Mkdir(inner, 0o755), MountTmpfs(inner, 1<<20, 0o755), os.WriteFile(filepath.Join(inner, "file"), nil, 0o644),
	); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := Unmount(inner); err != nil {
			t.Error(err)
		}
	}()
	var notes []string
	image, err := s.ImportDir(t.Context(), source, "", ImportOptions{Note: func(n string) { notes = append(notes, n) }})
	if err != nil {
		t.Fatal(err)
	}
	have := strings.Join(notes, "\n")
	if len(notes) != 3 || !strings.Contains(have, "null: device") || !strings.Contains(have, "socket: sockets") || !strings.Contains(have, "mounted: another") {
		t.Errorf("notes: %q", notes)
	}
	if image.Files != 3 { // the root, etc, mounted
		t.Errorf("%d files:\n%s", image.Files, describeTree(t, image.Root))
	}
}

func TestHostileTar(t *testing.T) {
	needRoot(t)
	owner := dir("a")
	owner.header.Uid = 1<<32 - 1
	negative := dir("a")
	negative.header.Format, negative.header.Uid, negative.header.ModTime = tar.FormatGNU, -5, time.Unix(0, 0)
	var many []tarItem
	for i := range 40 {
		many = append(many, file("same", strings.Repeat("x", i)))
	}
	huge := file("huge", strings.Repeat("x", 20_000))
	attributes := file("x", "")
	attributes.header.PAXRecords = map[string]string{"SCHILY.xattr.user.large": strings.Repeat("x", maxXAttrs)}
	whole := makeTar(t, file("a", "content"), file("b", strings.Repeat("b", 5000)))
	cases := []struct {
		name string
		data []byte
		want string
	}{
		{"dotdot", makeTar(t, file("../evil", "x")), "leads out of the archive"},
		{"dotdot inside", makeTar(t, dir("a"), file("a/../../evil", "x")), "leads out of the archive"},
		{"absolute", makeTar(t, file("/etc/evil", "x")), "is absolute"},
		{"through a link", makeTar(t, link("a", "/tmp"), file("a/evil", "x")), "symbolic link"},
		{"through a relative link", makeTar(t, dir("d"), link("a", "d"), file("a/evil", "x")), "symbolic link"},
		{"through a link deeper", makeTar(t, link("a", "/tmp"), dir("a/b/c")), "symbolic link"},
		{"hard link out", makeTar(t, hard("a", "../../etc/passwd")), "leads out of the archive"},
		{"hard link absolute", makeTar(t, hard("a", "/etc/passwd")), "is absolute"},
		{"hard link through a link", makeTar(t, link("e", "/etc"), hard("a", "e/passwd")), "isn't there"},
		{"hard link to nothing", makeTar(t, hard("a", "b")), "isn't there"},
		{"hard link to a directory", makeTar(t, dir("b"), hard("a", "b")), "is a directory"},
		{"hard link to itself", makeTar(t, file("a", ""), hard("a", "a")), "link to itself"},
		{"below a file", makeTar(t, file("a", ""), file("a/b", "")), "no directory"},
		{"root is a file", makeTar(t, file(".", "x")), "root isn't a directory"},
		{"full directory replaced", makeTar(t, dir("a"), file("a/b", ""), file("a", "")), "comes twice"},
		{"owner", makeTar(t, owner), "isn't possible"},
		{"negative owner", makeTar(t, negative), "isn't possible"},
		{"entries", makeTar(t, many...), "more than 20 entries"},
		{"implied entries", makeTar(t, file(strings.Repeat("a/", 30)+"b", "")), "more than 20 entries"},
		{"bytes", makeTar(t, huge), "more than 10000 bytes"},
		{"attributes", makeTar(t, attributes), "bytes of extended attributes"},
		{"name", makeTar(t, file(strings.Repeat("n", 256), "")), "too long"},
		{"path", makeTar(t, file(strings.Repeat("nnnnnnn/", 600)+"n", "")), "too long"},
		{"cut off", whole[:1800], "cut off"},
		{"cut off between entries", whole[:1024], "cut off"},
		{"cut off gzip", compressed(t, "gz", whole)[:100], "cut off"},
		{"not a tar", bytes.Repeat([]byte("hello world\n"), 500), "can't be an image"},
		{"bzip2", []byte("BZh91AY&SY"), "bzip2"},
		{"empty", nil, "is empty"},
		{"only zeros", make([]byte, 10240), "no entries"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := newStore(t)
			_, err := s.ImportTar(t.Context(), bytes.NewReader(c.data), "evil", ImportOptions{MaxFiles: 20, MaxBytes: 10_000})
			if !errors.Is(err, ErrBadArchive) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the import gave %v, wanted %q", err, c.want)
			}
			nothingLeft(t, s)
			if images, err := s.List(); err != nil || len(images) != 0 {
				t.Errorf("%v, %v", images, err)
			}
		})
	}
}

// TestTarTwice imports an archive in which things come twice.
func TestTarTwice(t *testing.T) {
	s := newStore(t)
	image := importTar(t, s, "", makeTar(t,
		file("file", "first"), file("file", "second"), dir("empty"), file("empty", "now a file"),
		file("becomes-dir", "x"), dir("becomes-dir"), file("becomes-dir/inside", "y"),
		link("link", "file"), file("link", "written beside, not through, the link"),
		dir("dir"), file("dir/kept", ""), dir("dir"),
	))
	for path, want := range map[string]string{
		"file": "second", "empty": "now a file", "becomes-dir/inside": "y", "link": "written beside, not through, the link", "dir/kept": "",
	} {
		if have, err := os.ReadFile(filepath.Join(image.Root, path)); err != nil || string(have) != want {
			t.Errorf("%s: %q, %v", path, have, err)
		}
	}
}

func TestImportExpect(t *testing.T) {
	s := newStore(t)
	data := sampleTar(t)
	wrong := "sha256:" + strings.Repeat("0", 64)
	_, err := s.ImportTar(t.Context(), bytes.NewReader(data), "x", ImportOptions{Expect: wrong})
	if !errors.Is(err, ErrDigest) || !strings.Contains(err.Error(), wrong) {
		t.Errorf("another digest: %v", err)
	}
	if images, err := s.List(); err != nil || len(images) != 0 {
		t.Errorf("%v, %v", images, err)
	}
	nothingLeft(t, s)
	if _, err := s.ImportTar(t.Context(), bytes.NewReader(data), "x", ImportOptions{Expect: "sha256:12"}); err == nil {
		t.Error("half a digest is good")
	}
	if _, err := s.ImportTar(t.Context(), bytes.NewReader(data), "../x", ImportOptions{}); err == nil {
		t.Error("../x is a name")
	}
}

func TestImportNoSpace(t *testing.T) {
	small := smallFS(t, 1<<20)
	s := &Store{Dir: filepath.Join(small, "store")}
	random := strings.Repeat("0123456789abcdef", 1<<17)
	data := makeTar(t, file("small", "x"), file("large", random))
	_, err := s.ImportTar(t.Context(), bytes.NewReader(data), "x", ImportOptions{})
	if !errors.Is(err, ErrNoSpace) || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "are free now") {
		t.Errorf("a tar: %v", err)
	}
	t.Log(err)
	nothingLeft(t, s)
	source := t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "large"), []byte(random), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.ImportDir(t.Context(), source, "x", ImportOptions{})
	if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "2.0 MiB are needed") {
		t.Errorf("a directory: %v", err)
	}
	nothingLeft(t, s)
	if _, err := s.Open("x"); !errors.Is(err, ErrNoImage) {
		t.Errorf("Open: %v", err)
	}
	importTar(t, s, "x", makeTar(t, file("small", "x")))
}

func TestImportCancelled(t *testing.T) {
	s := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.ImportTar(ctx, bytes.NewReader(sampleTar(t)), "x", ImportOptions{Progress: func(int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	nothingLeft(t, s)
}

func TestImportConcurrently(t *testing.T) {
	s := newStore(t)
	data := sampleTar(t)
	var all sync.WaitGroup
	digests := make([]string, 6)
	for i := range digests {
		all.Go(func() {
			// Stores of different processes share nothing but the disk.
			store := &Store{Dir: s.Dir}
			image, err := store.ImportTar(t.Context(), bytes.NewReader(data), "same", ImportOptions{})
			if err != nil {
				t.Error(err)
				return
			}
			digests[i] = image.Digest
		})
	}
	all.Wait()
	images, err := s.List()
	if err != nil || len(images) != 1 {
		t.Fatalf("%v, %v", images, err)
	}
	for _, d := range digests {
		if d != images[0].Digest {
			t.Errorf("%s instead of %s", d, images[0].Digest)
		}
	}
	nothingLeft(t, s)
}

// TestAbandoned looks that what a killed import left goes with the next one,
// and that what another works on stays.
func TestAbandoned(t *testing.T) {
	s := newStore(t)
	if err := s.prepare(); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(s.Dir, tmpDir, "import-123")
	if err := os.MkdirAll(filepath.Join(left, rootfsDir), 0o700); err != nil {
		t.Fatal(err)
	}
	busy, err := s.newHalf("import-")
	if err != nil {
		t.Fatal(err)
	}
	importTar(t, s, "x", sampleTar(t))
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was abandoned is there: %v", err)
	}
	if _, err := os.Stat(busy.path); err != nil {
		t.Errorf("what another works on is gone: %v", err)
	}
	if err := busy.discard(); err != nil {
		t.Error(err)
	}
	nothingLeft(t, s)
}

// TestImportNotRoot runs itself as a user when it is root.
func TestImportNotRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestImportNotRoot$", "-test.v")
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), "TMPDIR=/tmp")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: testUID, Gid: testGID}}
		output, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(output), "--- PASS: TestImportNotRoot") {
			t.Errorf("as a user: %v: %s", err, output)
		}
		return
	}
	s := &Store{Dir: filepath.Join(t.TempDir(), "store")}
	_, err := s.ImportTar(t.Context(), bytes.NewReader(makeTar(t, file("a", ""))), "a", ImportOptions{})
	if !errors.Is(err, ErrNotRoot) {
		t.Errorf("the import gave %v", err)
	}
	if _, err := os.Lstat(s.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a store was made: %v", err)
	}
}
