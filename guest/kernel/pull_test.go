package kernel

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tools puts programs that play apt and dpkg first on the PATH. The host's lists know an image that can't be had
// any more; new lists know a newer one.
func tools(t *testing.T, debian []byte) (log string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "clawvm-apt-") // readable to the user that they run as
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	log = filepath.Join(dir, "log")
	scripts := map[string]string{
		"apt-cache": `v=1; case "$*" in *Lists*) v=2; shift 4; esac
case "$3" in
linux-image-cloud-amd64) printf 'Package: linux-image-cloud-amd64\nVersion: 6.%s\nSize: 10\nDepends: linux-image-6.1.0-%s-cloud-amd64 (= 6.%s)\n\n' $v $v $v;;
linux-image-6.1.0-*) printf 'Package: %s\nVersion: 6.%s\nSize: 26713492\nDepends: kmod, linux-base (>= 4.3~)\n\nPackage: other\n' $3 $v;;
bash) printf 'Package: bash\nVersion: 5\nSize: 10\n';;
*) echo "E: No packages found" >&2; exit 100;;
esac`,
		"apt-get": `case "$*" in *Lists*) shift 4;; *download*) echo "E: 404 Not Found" >&2; exit 100;; esac
case "$2" in update) ;; download) touch "${3%=*}_${3#*=}_amd64.deb";; *) exit 1;; esac`,
		"dpkg-deb": `cat "$(dirname "$0")/tar"`,
	}
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho \"$(id -un) ${0##*/} $*\" >>"+log+"\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for path, content := range map[string][]byte{log: nil, filepath.Join(dir, "tar"): debian} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for path, mode := range map[string]os.FileMode{dir: 0o755, log: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return log
}

// debian is the content of a kernel package, with what must not come out of it.
func debian(t *testing.T, headers ...tar.Header) []byte {
	t.Helper()
	out := &bytes.Buffer{}
	w := tar.NewWriter(out)
	for _, h := range headers {
		content := []byte("content of " + h.Name)
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(content))
		}
		h.Mode = 0o644
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestPull(t *testing.T) {
	const release = "6.1.0-2-cloud-amd64"
	log := tools(t, debian(t,
		tar.Header{Name: "./boot/vmlinuz-" + release},
		tar.Header{Name: "./boot/System.map-" + release},
		tar.Header{Name: "./usr/lib/modules/" + release + "/kernel/fs/a.ko"},
		tar.Header{Name: "./lib/modules/" + release + "/modules.builtin"},
		tar.Header{Name: "./lib/modules/" + release + "/../../../../escaped"},
		tar.Header{Name: "./lib/modules/" + release + "/kernel/link.ko", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
	))
	store := filepath.Join(t.TempDir(), "store")
	progress := &bytes.Buffer{}
	k, err := Pull(context.Background(), store, "", progress)
	if err != nil {
		t.Fatal(err)
	}
	if k.Release != release || k.Origin != originStore {
		t.Errorf("%+v", k)
	}
	var got []string
	err = filepath.Walk(store, func(path string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() {
			got = append(got, strings.TrimPrefix(path, store+"/kernels/"))
		}
		return err
	})
	if want := []string{release + "/lib/modules/" + release + "/kernel/fs/a.ko", release + "/lib/modules/" + release + "/modules.builtin", release + "/vmlinuz", "lock"}; err != nil || strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the store has %q, not %q: %v", got, want, err)
	}
	for _, want := range []string{"downloading linux-image-6.1.0-1-cloud-amd64 6.1 (26.7 MB) by apt-get", "404 Not Found); reading new ones", "downloading linux-image-" + release + " 6.2", "kernel " + release + " is in the store\n"} {
		if !strings.Contains(progress.String(), want) {
			t.Errorf("progress says nothing of %q:\n%s", want, progress)
		}
	}
	ran, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 && strings.Contains(string(ran), "root ") {
		t.Errorf("ran as root:\n%s", ran)
	}

	// It is there already. (The lists of the host know an older one, which is there by then, too.)
	if err := os.Rename(filepath.Join(store, "kernels", release), filepath.Join(store, "kernels/6.1.0-1-cloud-amd64")); err != nil {
		t.Fatal(err)
	}
	progress.Reset()
	if k, err := Pull(context.Background(), store, "linux-image-6.1.0-1-cloud-amd64", progress); err != nil || k.Release != "6.1.0-1-cloud-amd64" || progress.String() != "6.1.0-1-cloud-amd64 is in the store already\n" {
		t.Errorf("%+v, %v, %s", k, err, progress)
	}
}

func TestPullRefused(t *testing.T) {
	tools(t, debian(t, tar.Header{Name: "./lib/modules/6.1.0-2-cloud-amd64/kernel/a.ko"}))
	store := t.TempDir()
	for pkg, want := range map[string]string{
		"bash":                    "package bash is no kernel and depends on none",
		"--help":                  `"--help" is no package's name`,
		"unknown":                 "No packages found",
		"linux-image-cloud-amd64": "the package has no boot/vmlinuz-6.1.0-2-cloud-amd64",
	} {
		if _, err := Pull(context.Background(), store, pkg, nil); err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "cannot pull kernel "+pkg) {
			t.Errorf("%s: %v", pkg, err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(store, "kernels"))
	if err != nil || len(entries) != 1 {
		t.Errorf("left %v, %v", entries, err)
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := Pull(context.Background(), store, "", nil); err == nil || !strings.Contains(err.Error(), "this host has no apt-get: declare a kernel") {
		t.Error(err)
	}
}
