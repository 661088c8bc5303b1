package kernel

import (
	"archive/tar"
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzPackageShown reads what apt says of a package.
func FuzzPackageShown(f *testing.F) {
	f.Add([]byte("Package: linux-image-cloud-amd64\nVersion: 6.1\nSize: 10\nDepends: linux-image-6.1.0-9-cloud-amd64 (= 6.1)\n\nPackage: other\n"))
	f.Add([]byte("Package: linux-image-\nSize: 1\n"))
	f.Add([]byte("Package: linux-image-6.1.0-9-cloud-amd64\nDepends: kmod, linux-base (>= 4.3~)\n"))
	f.Fuzz(func(t *testing.T, out []byte) {
		p, err := parsePackage(out)
		if err != nil {
			return
		}
		if strings.HasPrefix(p.Name, "-") || strings.ContainsAny(p.Name, "/ \n") {
			t.Errorf("a package called %q", p.Name)
		}
		image, err := p.image()
		if err != nil {
			return
		}
		if release := (aptPackage{Name: image}).release(); release == "" || release == image || !isDigit(release[0]) || strings.Contains(release, "/") {
			t.Errorf("a kernel %q of package %q", release, image)
		}
	})
}

// FuzzUnpackKernel unpacks a package's files. Nothing but kernel and modules may come out, and nothing elsewhere.
func FuzzUnpackKernel(f *testing.F) {
	const release = "6.1.0-9-x"
	pack := func(headers ...tar.Header) []byte {
		out := &bytes.Buffer{}
		w := tar.NewWriter(out)
		for _, h := range headers {
			h.Mode, h.Size = 0o4777, 1
			if h.Typeflag != 0 {
				h.Size = 0
			}
			if err := w.WriteHeader(&h); err != nil {
				f.Fatal(err)
			}
			if h.Size > 0 {
				if _, err := io.WriteString(w, "x"); err != nil {
					f.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		return out.Bytes()
	}
	modules := "./lib/modules/" + release
	f.Add(pack(tar.Header{Name: "./boot/vmlinuz-" + release}, tar.Header{Name: modules + "/kernel/a.ko"}))
	f.Add(pack(tar.Header{Name: modules + "/../../../../out"}, tar.Header{Name: "/etc/x"}, tar.Header{Name: "../x"}))
	f.Add(pack(tar.Header{Name: modules, Typeflag: tar.TypeSymlink, Linkname: "/"}, tar.Header{Name: modules + "/a"}))
	f.Add(pack(tar.Header{Name: "boot/vmlinuz-" + release, Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		base := t.TempDir()
		dir := filepath.Join(base, "k")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		unpackErr := unpackKernel(bytes.NewReader(data), dir, release)
		if beside, err := os.ReadDir(base); err != nil || len(beside) != 1 {
			t.Errorf("beside the store: %v, %v", beside, err)
		}
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(dir, path)
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if !d.IsDir() && (!info.Mode().IsRegular() || info.Mode().Perm() != 0o644 || rel != "vmlinuz" && !strings.HasPrefix(rel, "lib/modules/"+release+"/")) {
				t.Errorf("%s came out, %s (%v)", rel, info.Mode(), unpackErr)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// FuzzImage takes a kernel image apart.
func FuzzImage(f *testing.F) {
	kernel := elfFile(f, ".text", strings.Repeat("Linux version 6.1.0-9-test (x) code ", 50), note("Xen\x00", pvhNote))
	f.Add(kernel)
	for _, how := range []string{"gzip", "zstd", "lz4", "xz"} {
		f.Add(bzImage(pack(f, how, kernel)))
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		got, err := vmlinux(image)
		if err == nil && !isELF(got) {
			t.Error("what came out is no kernel")
		}
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, image, 0o600); err != nil {
			t.Fatal(err)
		}
		release, err := imageRelease(path)
		if err == nil && (release == "" || len(release) > 64 || strings.ContainsAny(release, "/ \x00\x1b\n")) {
			t.Errorf("its release is %q", release)
		}
	})
}

// FuzzModule reads what a module says of itself.
func FuzzModule(f *testing.F) {
	f.Add(elfFile(f, ".modinfo", "name=a\x00depends=b,c,\x00softdep=pre: d post: e\x00alias=crypto-f\x00", nil))
	f.Add(elfFile(f, ".modinfo", "softdep=pre:\x00=\x00depends", nil))
	f.Fuzz(func(t *testing.T, content []byte) {
		m, err := parseModule(content)
		if err != nil {
			return
		}
		for _, list := range [][]string{m.depends, m.before, m.after} {
			for _, name := range list {
				if name == "" || strings.Contains(name, "\x00") {
					t.Errorf("it depends on %q", name)
				}
			}
		}
	})
}
