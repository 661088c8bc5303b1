package integration

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// copied is a VM to copy to and from: two of them need half of a small host.
const copied = `
image: small
vmm: %s
vcpus: 1
memory: 256MiB
overlay: {tmpfs: 96MiB}
volumes:
  - {name: state, mount: /var/lib/state, size: 64MiB}
run:
  argv: [sh, -c, "trap 'exit 0' TERM; while :; do sleep 1; done"]
  user: app
  stop: {timeout: 5s}
`

// treeFiles is how many files the tree of TestCopy has.
const treeFiles = 10_000

// makeTree makes a tree of so many small files in directories of 100, with modes,
// times and links of all kinds.
func makeTree(t *testing.T, dir string, files int) {
	t.Helper()
	old := time.Date(2011, 12, 13, 14, 15, 16, 171819202, time.UTC)
	for i := range files {
		sub := filepath.Join(dir, fmt.Sprintf("d%02d", i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(sub, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		name := filepath.Join(sub, fmt.Sprintf("file %d", i))
		if i%100 == 99 {
			if err := os.Symlink(fmt.Sprintf("file %d", i-1), name); err != nil {
				t.Fatal(err)
			}
			continue
		}
		mode := []os.FileMode{0o644, 0o600, 0o755, 0o440}[i%4]
		at := old.Add(time.Duration(i) * time.Minute)
		if err := errors.Join(os.WriteFile(name, []byte(strings.Repeat(fmt.Sprintln(i), i%50)), 0o600), os.Chmod(name, mode), os.Chtimes(name, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("/no/such", filepath.Join(dir, "dangling")), os.Mkdir(filepath.Join(dir, "empty"), 0o750),
		os.WriteFile(filepath.Join(dir, "terminal\x1b[2J\nname"), []byte("x"), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// listTree lists all beneath dir: names, modes, times, targets and checksums.
func listTree(t *testing.T, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%q %v", rel, info.Mode())
		switch {
		case info.Mode().IsRegular():
			raw, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s %x", info.ModTime().Format(time.RFC3339Nano), sha256.Sum256(raw))
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + target
		}
		list = append(list, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestCopy copies to, from and between running VMs.
func TestCopy(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	w.declare(t, "copy", fmt.Sprintf(copied, vmmName()))
	w.declare(t, "twin", fmt.Sprintf(copied, vmmName()))
	t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "copy", "twin") })
	w.must(t, "up", "copy", "twin")
	inside := func(t *testing.T, vm, script string) string {
		t.Helper()
		return strings.TrimSpace(w.must(t, "exec", "--root", vm, "--", "sh", "-c", script))
	}
	dir := t.TempDir()

	t.Run("ten thousand files", func(t *testing.T) {
		source := filepath.Join(dir, "tree")
		makeTree(t, source, treeFiles)
		began := time.Now()
		w.must(t, "cp", source, "copy:/tmp")
		into := time.Since(began)
		if got := strings.TrimSpace(w.must(t, "exec", "copy", "--", "sh", "-c", "find /tmp/tree | wc -l; stat -c '%U %a' '/tmp/tree/d00/file 3'")); got != fmt.Sprintf("%d\napp 440", treeFiles+treeFiles/100+5) {
			// The name with a line's end in it counts twice.
			t.Errorf("in the VM there is %q", got)
		}
		began = time.Now()
		back := filepath.Join(dir, "back")
		w.must(t, "cp", "copy:/tmp/tree", back)
		t.Logf("%d files in %.1f s into the VM and in %.1f s out of it", treeFiles, into.Seconds(), time.Since(began).Seconds())
		if got, want := listTree(t, back), listTree(t, source); !slices.Equal(got, want) {
			t.Errorf("%d entries came back of %d; the first difference is %s", len(got), len(want), firstDifference(got, want))
		}
	})
	t.Run("a file of 16 MiB", func(t *testing.T) {
		big := filepath.Join(dir, "big")
		out, err := os.Create(big)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.New()
		for i := range 16 << 10 {
			line := bytes.Repeat([]byte(fmt.Sprintf("%015d\n", i)), 64)
			sum.Write(line)
			if _, err := out.Write(line); err != nil {
				t.Fatal(err)
			}
		}
		if err := out.Close(); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		w.must(t, "cp", big, "copy:/var/lib/state/new name")
		t.Logf("16 MiB into the VM in %.1f s", time.Since(began).Seconds())
		if got, want := inside(t, "copy", "sha256sum </var/lib/state/new\\ name | cut -d' ' -f1"), fmt.Sprintf("%x", sum.Sum(nil)); got != want {
			t.Errorf("checksum %s, want %s", got, want)
		}
	})
	t.Run("as the workload, or as root", func(t *testing.T) {
		file := filepath.Join(dir, "file")
		if err := errors.Join(os.WriteFile(file, []byte("text\n"), 0o644), os.Chown(file, 1234, 1235), os.Chmod(file, 0o755|os.ModeSetuid)); err != nil {
			t.Fatal(err)
		}
		if r := w.clawvm(t, "cp", file, "copy:/srv"); r.code != 1 || !strings.Contains(r.stderr, "permission denied") {
			t.Errorf("into a directory of root's: %+v", r)
		}
		w.must(t, "cp", file, "copy:/tmp/mine")
		if got := strings.TrimSpace(w.must(t, "exec", "copy", "--", "stat", "-c", "%u:%g %a", "/tmp/mine")); got != "20001:20001 755" {
			t.Errorf("as the workload: %s", got)
		}
		w.must(t, "cp", "--root", file, "copy:/srv")
		w.must(t, "cp", "--root", "-a", file, "copy:/srv/kept")
		if got := inside(t, "copy", "stat -c '%u:%g %a' /srv/file /srv/kept"); got != "0:0 755\n1234:1235 4755" {
			t.Errorf("as root: %s", got)
		}
		to := filepath.Join(dir, "owners")
		w.must(t, "cp", "-a", "--root", "copy:/srv/kept", to)
		info, err := os.Stat(to)
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 1234 || st.Gid != 1235 || info.Mode() != 0o755 {
			t.Errorf("with -a on the host: %d:%d %v; never a setuid bit", st.Uid, st.Gid, info.Mode())
		}
		inside(t, "copy", "echo hidden >/srv/hidden; chmod 600 /srv/hidden")
		r := w.clawvm(t, "cp", "copy:/srv", filepath.Join(dir, "srv"))
		if r.code != 1 || !strings.Contains(r.stderr, "srv/hidden: permission denied") || !strings.Contains(r.stderr, "not all of it could be read") {
			t.Errorf("a file that can't be read: %+v", r)
		}
		if _, err := os.Stat(filepath.Join(dir, "srv/file")); err != nil {
			t.Errorf("the others are not there: %v", err)
		}
	})
	t.Run("streams", func(t *testing.T) {
		out := w.must(t, "cp", "copy:/srv/www", "-")
		list := exec.Command("tar", "-tf", "-")
		list.Stdin = strings.NewReader(out)
		if got, err := list.Output(); err != nil || string(got) != "www/\nwww/index.html\n" {
			t.Errorf("tar lists %q, %v", got, err)
		}
		var stream bytes.Buffer
		tw := tar.NewWriter(&stream)
		if err := errors.Join(tw.WriteHeader(&tar.Header{Name: "a/b", Size: 4, Mode: 0o640}), second(tw.Write([]byte("text"))),
			tw.WriteHeader(&tar.Header{Name: "a/c", Typeflag: tar.TypeLink, Linkname: "a/b"}), tw.Close()); err != nil {
			t.Fatal(err)
		}
		if r := w.clawvmIn(t, &stream, "cp", "-", "copy:/var/lib/state"); r.code != 0 {
			t.Fatalf("%+v", r)
		}
		if got := inside(t, "copy", "stat -c '%a %h' /var/lib/state/a/c; cat /var/lib/state/a/c"); got != "640 2\ntext" {
			t.Errorf("got %q", got)
		}
		if r := w.clawvmIn(t, strings.NewReader("no tar"), "cp", "-", "copy:/var/lib/state"); r.code != 1 || !strings.Contains(r.stderr, "cannot read the stream") {
			t.Errorf("what is no tar stream: %+v", r)
		}
	})
	t.Run("from one VM into another", func(t *testing.T) {
		w.must(t, "cp", "copy:/var/lib/state/a/.", "twin:/var/lib/state/new")
		if got := inside(t, "twin", "ls -la /var/lib/state/new | grep -c app; cat /var/lib/state/new/b"); !strings.HasSuffix(got, "\ntext") {
			t.Errorf("got %q", got)
		}
		if r := w.clawvm(t, "cp", "copy:/nothing", "twin:/tmp"); r.code != 1 || !strings.Contains(r.stderr, "VM copy: cannot read /nothing: no such file or directory") {
			t.Errorf("%+v", r)
		}
		if r := w.clawvm(t, "cp", "copy:/srv/www", "twin:/no/such/"); r.code != 1 || !strings.Contains(r.stderr, "VM twin: cannot write www/: there is no directory /no") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("a disk that is full", func(t *testing.T) {
		big := filepath.Join(dir, "big")
		inside(t, "copy", "rm /var/lib/state/new*; dd if=/dev/zero of=/var/lib/state/filler bs=1M 2>/dev/null; true")
		r := w.clawvm(t, "cp", big, "copy:/var/lib/state/second")
		if r.code != 1 || !strings.Contains(r.stderr, "the disk is full") {
			t.Errorf("%+v", r)
		}
		if got := inside(t, "copy", "ls -A /var/lib/state"); strings.Contains(got, "second") || strings.Contains(got, ".clawvm-cp") {
			t.Errorf("a part is left: %q", got)
		}
	})
}

func second[T any](_ T, err error) error { return err }

func firstDifference(got, want []string) string {
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(got):
			return "missing " + want[i]
		case i >= len(want):
			return "more: " + got[i]
		case got[i] != want[i]:
			return got[i] + "\n  instead of " + want[i]
		}
	}
	return "none"
}
