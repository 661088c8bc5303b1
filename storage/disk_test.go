package storage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// The VMM's user of the tests.
const testUID, testGID = 30011, 30012

func needProgram(t testing.TB, name string) string {
	t.Helper()
	path, err := findProgram(name, "e2fsprogs")
	if err != nil {
		t.Skip(err)
	}
	return path
}

func newDisk(t *testing.T, size int64) Disk {
	t.Helper()
	needRoot(t)
	needProgram(t, "mke2fs")
	needProgram(t, "e2fsck")
	d := Disk{Path: filepath.Join(t.TempDir(), "volume-state.ext4"), Size: size, Label: "state"}
	created, err := EnsureDisk(t.Context(), d)
	if err != nil || !created {
		t.Fatal(created, err)
	}
	return d
}

func TestDisk(t *testing.T) {
	d := newDisk(t, 8<<30)
	var st syscall.Stat_t
	if err := syscall.Lstat(d.Path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != d.Size || st.Mode&0o7777 != 0o600 || st.Blocks*512 > 64<<20 {
		t.Errorf("size %d, mode %o, %d bytes allocated", st.Size, st.Mode, st.Blocks*512)
	}
	if created, err := EnsureDisk(t.Context(), d); err != nil || created {
		t.Errorf("again: %t, %v", created, err)
	}
	for range 2 { // the second finds it handed over already
		if err := CheckDisk(t.Context(), d, testUID, testGID); err != nil {
			t.Error(err)
		}
	}
	if err := syscall.Lstat(d.Path, &st); err != nil || st.Uid != testUID || st.Gid != testGID || st.Mode&0o7777 != 0o600 {
		t.Errorf("after the check it belongs to %d:%d, %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	larger := d
	larger.Size *= 2
	_, err := EnsureDisk(t.Context(), larger)
	if !errors.Is(err, ErrDiskSize) || !strings.Contains(err.Error(), "it has 8GiB, declared are 16GiB") {
		t.Errorf("another size: %v", err)
	}
	if left, err := filepath.Glob(d.Path + ".*"); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := CheckDisk(t.Context(), d, 0, 0); err == nil {
		t.Error("it was checked as root")
	}
}

func TestDiskRefused(t *testing.T) {
	d := newDisk(t, MinDiskSize)
	dir := filepath.Dir(d.Path)
	link := Disk{Path: filepath.Join(dir, "link"), Size: d.Size}
	fifo := Disk{Path: filepath.Join(dir, "fifo"), Size: d.Size}
	twin := Disk{Path: filepath.Join(dir, "twin"), Size: d.Size}
	directory := Disk{Path: dir, Size: d.Size}
	if err := errors.Join(os.Symlink(d.Path, link.Path), syscall.Mkfifo(fifo.Path, 0o600), os.Link(d.Path, twin.Path)); err != nil {
		t.Fatal(err)
	}
	for _, d := range []Disk{link, fifo, twin, directory} {
		if _, err := EnsureDisk(t.Context(), d); !errors.Is(err, ErrNotDisk) {
			t.Errorf("EnsureDisk(%s): %v", d.Path, err)
		}
		if err := HandOver(d, testUID, testGID); !errors.Is(err, ErrNotDisk) {
			t.Errorf("HandOver(%s): %v", d.Path, err)
		}
		if err := CheckDisk(t.Context(), d, testUID, testGID); !errors.Is(err, ErrNotDisk) {
			t.Errorf("CheckDisk(%s): %v", d.Path, err)
		}
	}
	for _, bad := range []Disk{
		{Path: filepath.Join(dir, "a"), Size: MinDiskSize - 4096},
		{Path: filepath.Join(dir, "b"), Size: MinDiskSize + 1},
		{Path: filepath.Join(dir, "c"), Size: MinDiskSize, Label: "more than 16 bytes"},
	} {
		if _, err := EnsureDisk(t.Context(), bad); err == nil {
			t.Errorf("%+v was made", bad)
		}
	}
}

func TestDiskFull(t *testing.T) {
	dir := smallFS(t, 256<<10)
	needProgram(t, "mke2fs")
	d := Disk{Path: filepath.Join(dir, "disk"), Size: 1 << 30}
	_, err := EnsureDisk(t.Context(), d)
	if !errors.Is(err, ErrFull) {
		t.Errorf("on a full file system: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// overwrite writes count bytes of a pattern into a file.
func overwrite(t *testing.T, path string, at int64, count int, with byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, count)
	for i := range data {
		data[i] = with
	}
	if _, err := f.WriteAt(data, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestDiskCorrupt(t *testing.T) {
	debugfs := ""
	spoil := map[string]func(t *testing.T, d Disk){
		"zeroed superblock": func(t *testing.T, d Disk) { overwrite(t, d.Path, 0, 4096, 0) },
		"overwritten whole": func(t *testing.T, d Disk) { overwrite(t, d.Path, 0, 8<<20, 0xa5) },
		"group descriptors": func(t *testing.T, d Disk) { overwrite(t, d.Path, 4096, 4096, 0xff) },
		"truncated":         func(t *testing.T, d Disk) { truncate(t, d, d.Size/2) },
		"empty":             func(t *testing.T, d Disk) { truncate(t, d, 0) },
		"found by the guest": func(t *testing.T, d Disk) {
			// What a guest's kernel leaves: the mark, and the damage.
			run(t, debugfs, "-w", "-R", "clri <11>", d.Path)
			run(t, debugfs, "-w", "-R", "set_super_value state 2", d.Path)
		},
	}
	for name, f := range spoil {
		t.Run(name, func(t *testing.T) {
			debugfs = needProgram(t, "debugfs")
			d := newDisk(t, 64<<20)
			f(t, d)
			err := CheckDisk(t.Context(), d, testUID, testGID)
			if !errors.Is(err, ErrCorruptDisk) {
				t.Fatalf("the check says %v", err)
			}
			want := fmt.Sprintf("`setpriv --reuid=%d --regid=%d --clear-groups e2fsck -f -y /proc/self/fd/3 3<>%s`", testUID, testGID, d.Path)
			if !strings.Contains(err.Error(), d.Path) || !strings.Contains(err.Error(), want) {
				t.Errorf("the message is %v", err)
			}
			t.Log(err)
		})
	}
}

func truncate(t *testing.T, d Disk, size int64) {
	t.Helper()
	if err := os.Truncate(d.Path, size); err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if output, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, output)
	}
}

// TestDiskKilled takes a copy of a disk that a kernel has mounted, with files
// that are open and have no name any more, as it is when a VM is killed.
func TestDiskKilled(t *testing.T) {
	d := newDisk(t, 256<<20)
	dir := t.TempDir()
	mount := exec.Command("mount", "-o", "loop", d.Path, dir)
	if output, err := mount.CombinedOutput(); err != nil {
		t.Skipf("no loop devices: %v: %s", err, output)
	}
	defer run(t, "umount", dir)
	var open []*os.File
	defer func() {
		for _, f := range open {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
	}()
	for i := range 200 {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint("file", i)))
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, f)
		if _, err := f.Write(make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := os.Remove(f.Name()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := open[1].Sync(); err != nil { // commits the journal, leaves the rest unwritten
		t.Fatal(err)
	}
	killed := Disk{Path: d.Path + ".killed", Size: d.Size}
	run(t, "cp", "--sparse=always", d.Path, killed.Path)
	f, err := openDisk(killed, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	dirty, wrong, err := readSuperblock(f)
	if err := errors.Join(err, f.Close()); err != nil || !dirty || wrong != "" {
		t.Fatalf("dirty: %t, %q, %v", dirty, wrong, err)
	}
	if err := CheckDisk(t.Context(), killed, testUID, testGID); err != nil {
		t.Error(err)
	}
}

// TestDiskDirtyJournal leaves a transaction in the journal, as a killed VM
// does.
func TestDiskDirtyJournal(t *testing.T) {
	debugfs := needProgram(t, "debugfs")
	d := newDisk(t, 64<<20)
	script := filepath.Join(t.TempDir(), "commands")
	block := filepath.Join(t.TempDir(), "block")
	if err := errors.Join(
		os.WriteFile(block, make([]byte, 4096), 0o600),
		os.WriteFile(script, []byte("journal_open\njournal_write -b 9000 "+block+"\njournal_close\nset_super_value state 0\n"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	run(t, debugfs, "-w", "-f", script, d.Path)
	dirty := func() bool {
		f, err := openDisk(d, os.O_RDONLY)
		if err != nil {
			t.Fatal(err)
		}
		dirty, wrong, err := readSuperblock(f)
		if err := errors.Join(err, f.Close()); err != nil || wrong != "" {
			t.Fatal(err, wrong)
		}
		return dirty
	}
	if !dirty() {
		t.Fatal("the journal isn't dirty")
	}
	if err := CheckDisk(t.Context(), d, testUID, testGID); err != nil {
		t.Fatal(err)
	}
	if dirty() {
		t.Error("the journal is still dirty")
	}
}
