package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// elfFile makes a small ELF file with one section and one note segment.
func elfFile(t testing.TB, section, content string, note []byte) []byte {
	t.Helper()
	const headerSize, progSize, sectionSize = 64, 56, 64
	names := "\x00" + section + "\x00.shstrtab\x00"
	data := content + names
	notesAt := uint64(headerSize + progSize)
	dataAt := notesAt + uint64(len(note))
	out := &bytes.Buffer{}
	write := func(v any) {
		if err := binary.Write(out, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	write(elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1,
		Phoff: headerSize, Shoff: dataAt + uint64(len(data)),
		Ehsize: headerSize, Phentsize: progSize, Phnum: 1, Shentsize: sectionSize, Shnum: 3, Shstrndx: 2,
	})
	write(elf.Prog64{Type: uint32(elf.PT_NOTE), Off: notesAt, Filesz: uint64(len(note)), Memsz: uint64(len(note))})
	out.Write(note)
	out.WriteString(data)
	write(elf.Section64{})
	write(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: dataAt, Size: uint64(len(content))})
	write(elf.Section64{Name: uint32(len(section)) + 2, Type: uint32(elf.SHT_STRTAB), Off: dataAt + uint64(len(content)), Size: uint64(len(names))})
	return out.Bytes()
}

// note makes an ELF note with a description of 8 bytes.
func note(name string, kind uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(name)))
	b = binary.LittleEndian.AppendUint32(b, 8)
	b = binary.LittleEndian.AppendUint32(b, kind)
	b = append(b, name...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return append(b, make([]byte, 8)...)
}

// testVmlinux is large enough for its compressed forms to be real ones.
func testVmlinux(t *testing.T) []byte {
	return elfFile(t, ".text", strings.Repeat("Linux version 6.1.0-9-test (x) code ", 5000), append(note("GNU\x00", 3), note("Xen\x00", pvhNote)...))
}

// bzImage wraps a payload as a kernel image of release 6.1.0-9-test.
func bzImage(payload []byte) []byte {
	const setup = (3 + 1) * 512
	image := make([]byte, setup+100)
	image[setupSectsAt] = 3
	copy(image[headerMagicAt:], "HdrS")
	binary.LittleEndian.PutUint16(image[protocolAt:], 0x20f)
	binary.LittleEndian.PutUint16(image[versionAt:], 0x300)
	copy(image[0x500:], "6.1.0-9-test (builder) #1\x00")
	binary.LittleEndian.PutUint32(image[payloadOffsetAt:], 100)
	binary.LittleEndian.PutUint32(image[payloadLengthAt:], uint32(len(payload)))
	return append(append(image, payload...), "what follows"...)
}

// pack compresses as the kernel's makefile does: with the size behind, but for gzip.
func pack(t testing.TB, how string, content []byte) []byte {
	t.Helper()
	out := &bytes.Buffer{}
	var w io.WriteCloser
	var err error
	switch how {
	case "gzip":
		w = gzip.NewWriter(out)
	case "zstd":
		w, err = zstd.NewWriter(out)
	case "lz4":
		z := lz4.NewWriter(out)
		err = z.Apply(lz4.LegacyOption(true))
		w = z
	case "xz":
		w, err = xz.NewWriter(out)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if how == "gzip" {
		return out.Bytes()
	}
	return binary.LittleEndian.AppendUint32(out.Bytes(), uint32(len(content)))
}

func TestVmlinux(t *testing.T) {
	kernel := testVmlinux(t)
	for _, how := range []string{"gzip", "zstd", "lz4", "xz"} {
		t.Run(how, func(t *testing.T) {
			if _, err := exec.LookPath("xz"); how == "xz" && err != nil {
				t.Skip("needs the program xz")
			}
			got, err := vmlinux(bzImage(pack(t, how, kernel)))
			if err != nil || !bytes.Equal(got, kernel) {
				t.Errorf("%d bytes, not %d: %v", len(got), len(kernel), err)
			}
		})
	}
	if got, err := vmlinux(kernel); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("an ELF image: %v", err)
	}
	noPVH := elfFile(t, ".text", "code", note("Xen\x00", 17))
	old := bzImage(pack(t, "gzip", kernel))
	binary.LittleEndian.PutUint16(old[protocolAt:], 0x207)
	for _, c := range []struct {
		name   string
		image  []byte
		want   string
		packed bool
	}{
		{"text", []byte("no kernel"), "neither a bzImage nor an ELF kernel", false},
		{"cut", bzImage(pack(t, "lz4", kernel))[:2600], "damaged", false},
		{"cut payload", bzImage(append(pack(t, "gzip", kernel)[:200], 0xff, 0xff, 0, 0)), "damaged", false},
		{"huge", bzImage([]byte{0x1f, 0x8b, 0, 0, 0xff, 0xff, 0xff, 0xff}), "would be 4294967295 bytes", false},
		{"no ELF", bzImage(pack(t, "gzip", []byte("not an ELF file"))), "no ELF file", false},
		{"no PVH", bzImage(pack(t, "zstd", noPVH)), "no PVH entry", true},
		{"cut note", bzImage(pack(t, "zstd", elfFile(t, ".text", "code", note("Xen\x00", pvhNote)[:16]))), "no PVH entry", true},
		{"bzip2", bzImage([]byte("BZh91AY&SY\x00\x01\x00\x00")), "42 5a 68 39", true},
		{"old protocol", old, "older than 2.08", true},
	} {
		if _, err := vmlinux(c.image); err == nil || !strings.Contains(err.Error(), c.want) || errors.Is(err, errPacked) != c.packed {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestImageRelease(t *testing.T) {
	dir := t.TempDir()
	broken := bzImage(nil)
	binary.LittleEndian.PutUint16(broken[versionAt:], 0xffff)
	for name, c := range map[string]struct {
		content []byte
		want    string
	}{
		"bzImage": {bzImage(nil), "6.1.0-9-test"},
		"vmlinux": {testVmlinux(t), "6.1.0-9-test"},
		"broken":  {broken, ""},
		"text":    {[]byte("text"), ""},
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, c.content, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := imageRelease(path); got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestCompareReleases(t *testing.T) {
	ordered := []string{"5.10.0-30-cloud-amd64", "6.1.0-9-amd64", "6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.12.9+deb13-cloud-amd64", "6.12.107+deb13-cloud-amd64"}
	shuffled := []string{ordered[4], ordered[0], ordered[5], ordered[2], ordered[3], ordered[1]}
	slices.SortFunc(shuffled, compareReleases)
	if !slices.Equal(shuffled, ordered) {
		t.Errorf("%q", shuffled)
	}
	if compareReleases("6.1", "6.01") != 0 || compareReleases("6", "6.1") >= 0 || compareReleases("", "") != 0 {
		t.Error("odd releases")
	}
}

// files writes files below dir.
func files(t *testing.T, dir string, content map[string][]byte) {
	t.Helper()
	for name, b := range content {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	store := filepath.Join(dir, "store")
	s := system{
		boot: filepath.Join(dir, "boot"), modules: []string{filepath.Join(dir, "modules")}, booted: []string{filepath.Join(dir, "booted")},
		release: func() (string, error) { return "6.1.0-8-host", nil },
	}
	find := func(declared string) string {
		k, err := s.find(declared, store)
		if err != nil {
			return err.Error()
		}
		rel, relErr := filepath.Rel(dir, k.Modules)
		if relErr != nil {
			rel = "none"
		}
		return k.Origin + " " + k.Release + " " + filepath.Base(k.Image) + " " + rel
	}
	want := func(declared, want string) {
		t.Helper()
		if got := find(declared); !strings.Contains(got, want) {
			t.Errorf("%q: %s, not %s", declared, got, want)
		}
	}
	want("", "`clawvm kernel pull` brings the distribution's")
	if _, err := s.find("", store); !errors.Is(err, ErrNoKernel) {
		t.Error(err)
	}
	files(t, dir, map[string][]byte{"boot/vmlinuz-6.1.0-7-old": nil, "modules/6.1.0-7-old/kernel/a.ko": nil, "boot/vmlinuz-7-no-modules": nil})
	want("", "/boot 6.1.0-7-old vmlinuz-6.1.0-7-old modules/6.1.0-7-old")
	files(t, dir, map[string][]byte{"booted": bzImage(nil), "modules/6.1.0-9-test/kernel/a.ko": nil})
	want("", "host 6.1.0-9-test booted modules/6.1.0-9-test")
	files(t, dir, map[string][]byte{"boot/vmlinuz-6.1.0-8-host": nil, "modules/6.1.0-8-host/kernel/a.ko": nil})
	want("", "/boot 6.1.0-8-host vmlinuz-6.1.0-8-host")
	files(t, store, map[string][]byte{"kernels/6.2/vmlinuz": nil, "kernels/6.10/vmlinuz": nil, "kernels/.new-7.0/vmlinuz": nil, "kernels/lock": nil})
	want("", "store 6.10 vmlinuz store/kernels/6.10/lib/modules/6.10")
	want("6.2", "store 6.2 ")
	want("6.3", "no such kernel (it has: 6.10, 6.2)")
	want(filepath.Join(dir, "booted"), "declared 6.1.0-9-test booted modules/6.1.0-9-test")
	want(dir+"/none", "no such file")
	want(dir+"/modules", "has no bzImage, vmlinuz or vmlinux")
	files(t, dir, map[string][]byte{"nix/bzImage": bzImage(nil), "nix/lib/modules/6.1.0-9-test/kernel/a.ko": nil})
	want(dir+"/nix", "declared 6.1.0-9-test bzImage nix/lib/modules/6.1.0-9-test")
	want(filepath.Join(dir, "boot/vmlinuz-7-no-modules"), "neither a bzImage nor an ELF kernel")
}

// ko makes a module with that .modinfo.
func ko(t *testing.T, fields ...string) []byte {
	return elfFile(t, ".modinfo", strings.Join(fields, "\x00")+"\x00", nil)
}

func compressed(t *testing.T, how string, content []byte) []byte {
	b := pack(t, how, content)
	if how == "gzip" {
		return b
	}
	return b[:len(b)-4]
}

func moduleTree(t *testing.T) string {
	dir := t.TempDir()
	files(t, dir, map[string][]byte{
		"modules.builtin":                      []byte("kernel/drivers/built-in-one.ko\nkernel/lib/two.ko.xz\n"),
		"modules.builtin.modinfo":              []byte("sha.alias=crypto-sha256\x00sha.license=GPL\x00"),
		"kernel/drivers/virtio-a.ko":           ko(t, "name=virtio_a", "depends=dep_one,built_in_one", "softdep=pre: crc32c sha256 nowhere two post: later"),
		"kernel/drivers/dep-one.ko.xz":         compressed(t, "xz", ko(t, "depends=dep_two")),
		"kernel/drivers/dep_two.ko.zst":        compressed(t, "zstd", ko(t, "depends=")),
		"kernel/drivers/later.ko.gz":           compressed(t, "gzip", ko(t, "depends=virtio-a")),
		"kernel/arch/x86/crypto/crc32c-avx.ko": ko(t, "alias=crypto-crc32c"),
		"kernel/crypto/crc32c_generic.ko":      ko(t, "alias=crypto-crc32c"),
		"kernel/drivers/broken.ko":             []byte("no ELF"),
		"kernel/drivers/needy.ko":              ko(t, "depends=absent"),
		"kernel/drivers/circle.ko":             ko(t, "softdep=pre: circle2"),
		"kernel/drivers/circle2.ko":            ko(t, "softdep=pre: circle"),
		"kernel/drivers/no-module":             nil,
	})
	return dir
}

func TestResolve(t *testing.T) {
	dir := moduleTree(t)
	for _, c := range []struct {
		name             string
		wanted, optional []string
		want, err        string
	}{
		{"order", []string{"virtio_a"}, nil, "dep_two dep_one crc32c_generic virtio_a later", ""},
		{"built in", []string{"built_in_one", "two"}, []string{"two"}, "", ""},
		{"optional", []string{"dep_two"}, []string{"nothing", "dep_one"}, "dep_two dep_one", ""},
		{"circle", []string{"circle"}, nil, "circle2 circle", ""},
		{"missing", []string{"nothing"}, nil, "", "the kernel has no module nothing: neither built in nor below " + dir},
		{"missing dependency", []string{"needy"}, nil, "", "the kernel has no module absent (for needy)"},
		{"broken", []string{"broken"}, nil, "", "cannot read module " + dir + "/kernel/drivers/broken.ko"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tree, err := openTree(dir)
			if err != nil {
				t.Fatal(err)
			}
			modules, err := tree.resolve(c.wanted, c.optional)
			var names []string
			for _, m := range modules {
				names = append(names, m.Name)
				if !isELF(m.Content) {
					t.Errorf("%s is not decompressed", m.Name)
				}
			}
			if got := strings.Join(names, " "); got != c.want && c.err == "" {
				t.Errorf("%s, not %s", got, c.want)
			}
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := openTree(filepath.Join(dir, "nothing")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// fakeKernel is a kernel with all needed modules, and an init.
func fakeKernel(t *testing.T) (k *Kernel, init string) {
	dir := t.TempDir()
	content := map[string][]byte{"vmlinuz": bzImage(pack(t, "lz4", testVmlinux(t))), "init": []byte("#!init")}
	for _, name := range needed {
		content["modules/kernel/"+name+".ko"] = ko(t, "name="+name)
	}
	files(t, dir, content)
	return &Kernel{Release: "6.1.0-9-test", Image: filepath.Join(dir, "vmlinuz"), Modules: filepath.Join(dir, "modules")}, filepath.Join(dir, "init")
}

func TestPrepare(t *testing.T) {
	k, init := fakeKernel(t)
	cache := filepath.Join(t.TempDir(), "cache")
	ctx := context.Background()
	boots := make([]*Boot, 8)
	var group sync.WaitGroup
	for i := range boots {
		group.Go(func() {
			var err error
			if boots[i], err = Prepare(ctx, k, init, cache); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	for _, b := range boots {
		if *b != *boots[0] {
			t.Errorf("%v, and %v", b, boots[0])
		}
	}
	b := boots[0]
	if got, err := os.ReadFile(b.Vmlinux); err != nil || !bytes.Equal(got, testVmlinux(t)) || b.Packed != "" {
		t.Errorf("vmlinux: %v, %q", err, b.Packed)
	}
	entries, err := os.ReadDir(cache)
	if err != nil || len(entries) != 3 { // lock, kernel, initramfs
		t.Errorf("%v, %v", entries, err)
	}

	// Another init makes another initramfs beside the same kernel.
	if err := os.WriteFile(init, []byte("#!another"), 0o755); err != nil {
		t.Fatal(err)
	}
	other, err := Prepare(ctx, k, init, cache)
	if err != nil || other.Vmlinux != b.Vmlinux || other.Initramfs == b.Initramfs {
		t.Errorf("%v, %v", other, err)
	}
	// The first hasn't been used for a day, and somebody was killed.
	day := time.Now().Add(-24 * time.Hour)
	if err := os.Chtimes(filepath.Dir(b.Initramfs), day, day); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(cache, newPrefix+"1")
	if err := os.Mkdir(left, 0o755); err != nil {
		t.Fatal(err)
	}
	want := []string{left, filepath.Dir(b.Initramfs)}
	prunable := func() []string {
		found, err := Prunable(cache, time.Hour)
		if err != nil {
			t.Error(err)
		}
		slices.Sort(found)
		return found
	}
	if found := prunable(); !slices.Equal(found, want) {
		t.Errorf("to be removed are %q, not %q", found, want)
	}
	unlock, err := lockCache(ctx, cache)
	if err != nil {
		t.Fatal(err)
	}
	if found := prunable(); !slices.Equal(found, want[1:]) {
		t.Errorf("while somebody works %q are to be removed, not %q", found, want[1:])
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	removed, err := Prune(ctx, cache, time.Hour)
	slices.Sort(removed)
	if err != nil || !slices.Equal(removed, want) {
		t.Errorf("removed %q, not %q: %v", removed, want, err)
	}
	if found := prunable(); len(found) != 0 {
		t.Errorf("after that %q are to be removed", found)
	}
	if _, err := os.Stat(other.Initramfs); err != nil {
		t.Error(err)
	}

	// While somebody works, the others wait no longer than they want to.
	unlock, err = lockCache(ctx, cache)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := Prepare(short, k, init, cache); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
}

func TestPrepareOdd(t *testing.T) {
	ctx := context.Background()
	k, init := fakeKernel(t)
	cache := t.TempDir()
	odd := bzImage([]byte("BZh91AY&SY\x00\x01\x00\x00"))
	if err := os.WriteFile(k.Image, odd, 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 { // made, and cached
		b, err := Prepare(ctx, k, init, cache)
		if err != nil || !strings.Contains(b.Packed, "cannot be unpacked") {
			t.Fatalf("%v, %v", b, err)
		}
		if got, err := os.ReadFile(b.Vmlinux); err != nil || !bytes.Equal(got, odd) {
			t.Errorf("not the image itself: %v", err)
		}
	}
	if err := os.WriteFile(k.Image, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(ctx, k, init, cache); err == nil || !strings.Contains(err.Error(), "neither a bzImage nor an ELF kernel") {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(cache, newPrefix+"*")); err != nil || len(left) != 0 {
		t.Errorf("left %q, %v", left, err)
	}
	if err := os.Remove(filepath.Join(k.Modules, "kernel/virtiofs.ko")); err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(ctx, k, init, cache); err == nil || !strings.Contains(err.Error(), "no module virtiofs") {
		t.Error(err)
	}
	if _, err := Prepare(ctx, k, init+"-missing", cache); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestInitramfs(t *testing.T) {
	modules := []module{{"virtio", []byte("one")}, {"virtio_net", []byte("three")}}
	base, err := baseInitramfs([]byte("init"), modules)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := baseInitramfs([]byte("init"), modules); err != nil || !bytes.Equal(base, again) {
		t.Error("not the same each time")
	}
	dir := t.TempDir()
	for cut := range 4 { // whatever the base's length
		path := filepath.Join(dir, "base")
		if err := os.WriteFile(path, append(bytes.Clone(base), make([]byte, cut)...), 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(filepath.Join(dir, "whole"))
		if err != nil {
			t.Fatal(err)
		}
		if err := WriteInitramfs(f, path, []byte(`{"version":1}`)); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		whole, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		second := bytes.LastIndex(whole[:bytes.Index(whole, []byte("clawvm/boot.json"))], []byte("070701"))
		if second%archiveAlign != 0 {
			t.Errorf("the second archive starts at %d", second)
		}
		got := list(t, whole[:len(base)]) + list(t, whole[second:])
		golden(t, "initramfs.golden", got)
	}
	f, err := os.Create(filepath.Join(dir, "large"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := WriteInitramfs(f, filepath.Join(dir, "base"), make([]byte, MaxDocument+1)); err == nil {
		t.Error("took a document without bounds")
	}
}

// list prints an archive.
func list(t *testing.T, archive []byte) string {
	t.Helper()
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(archive)))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, r := range records {
		b.WriteString(r.String())
		if r.Info.FileSize > 0 {
			content, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
			if err != nil {
				t.Fatal(err)
			}
			b.WriteString(" " + strings.ReplaceAll(string(content), "\n", `\n`))
		}
		b.WriteString("\n")
	}
	return b.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("not as in %s:\n%s", path, got)
	}
}

func TestCmdline(t *testing.T) {
	var b strings.Builder
	for _, o := range []CmdlineOptions{{}, {Emulated: true}, {Debug: true}, {Console: "ttyS0", Emulated: true, Debug: true}} {
		line := Cmdline(o)
		if len(line) > 2047 {
			t.Errorf("%d bytes", len(line))
		}
		b.WriteString(line + "\n")
	}
	golden(t, "cmdline.golden", b.String())
}
