// Package kernel finds the kernel that guests boot, and makes from it what a VMM loads: the uncompressed vmlinux
// and an initramfs with the modules that a guest needs and clawvm's own init.
package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Kernel is a kernel and its modules, as a distribution installs them.
type Kernel struct {
	Release string // as `uname -r` says it in the guest
	Image   string // path of the bzImage or vmlinux
	Modules string // path of the directory lib/modules/RELEASE; "" when the kernel has all it needs built in
	Origin  string // where it was found, for a person: "store", "host", "/boot" or "declared"
}

// Origins of a kernel.
const (
	originStore    = "store"
	originHost     = "host"
	originBoot     = "/boot"
	originDeclared = "declared"
)

// ErrNoKernel means that there is no kernel to boot guests with.
var ErrNoKernel = errors.New("cannot find a kernel for guests")

// kernelsDir is the directory of kernels in a store.
const kernelsDir = "kernels"

// system holds the paths of the host that Find looks at, so that a test can give others.
type system struct {
	boot    string   // where distributions install kernels
	modules []string // directories that hold one directory of modules per release
	booted  []string // images of the running kernel that lie outside boot
	release func() (string, error)
}

var host = system{
	boot:    "/boot",
	modules: []string{"/lib/modules", "/run/booted-system/kernel-modules/lib/modules"},
	booted:  []string{"/run/booted-system/kernel"},
	release: runningRelease,
}

// Find finds the kernel that declared means: the path of an image, the path of a directory with an image and
// lib/modules in it, or the release of a kernel in the store. With "" it is the newest kernel in the store, else the
// one that the host itself runs, else the newest in /boot. The error of having none is ErrNoKernel, with what to do.
func Find(declared, storeDir string) (*Kernel, error) {
	return host.find(declared, storeDir)
}

func (s system) find(declared, storeDir string) (*Kernel, error) {
	if declared != "" {
		return s.declared(declared, storeDir)
	}
	stored, err := List(storeDir)
	if err != nil {
		return nil, err
	}
	if len(stored) > 0 {
		return &stored[0], nil
	}
	release, err := s.release()
	if err != nil {
		return nil, err
	}
	installed, err := s.installed()
	if err != nil {
		return nil, err
	}
	for _, k := range installed {
		if k.Release == release {
			return &k, nil
		}
	}
	for _, image := range s.booted {
		if k, err := s.describe(image, originHost); err == nil && k.Modules != "" {
			return k, nil
		}
	}
	if len(installed) > 0 {
		return &installed[0], nil
	}
	return nil, fmt.Errorf("%w: none in %s, the host's own (%s) has no image with modules, and %s has none; `clawvm kernel pull` brings the distribution's, or declare one with `kernel: PATH`",
		ErrNoKernel, filepath.Join(storeDir, kernelsDir), release, s.boot)
}

// declared finds the kernel at a path or of a name.
func (s system) declared(declared, storeDir string) (*Kernel, error) {
	if !strings.Contains(declared, "/") {
		stored, err := List(storeDir)
		if err != nil {
			return nil, err
		}
		var names []string
		for _, k := range stored {
			if k.Release == declared {
				return &k, nil
			}
			names = append(names, k.Release)
		}
		return nil, fmt.Errorf("cannot use kernel %q: the store has no such kernel (it has: %s); `clawvm kernel pull` brings the distribution's",
			declared, cmp.Or(strings.Join(names, ", "), "none"))
	}
	info, err := os.Stat(declared)
	if err != nil {
		return nil, fmt.Errorf("cannot use kernel %s: %w", declared, errors.Unwrap(err))
	}
	image := declared
	if info.IsDir() {
		image = ""
		for _, pattern := range []string{"bzImage", "vmlinuz*", "vmlinux*", "boot/vmlinuz*"} {
			found, err := filepath.Glob(filepath.Join(declared, pattern))
			if err != nil {
				return nil, fmt.Errorf("cannot use kernel %s: %w", declared, err)
			}
			if len(found) > 0 {
				slices.SortFunc(found, compareReleases)
				image = found[len(found)-1]
				break
			}
		}
		if image == "" {
			return nil, fmt.Errorf("cannot use kernel %s: the directory has no bzImage, vmlinuz or vmlinux", declared)
		}
	}
	return s.describe(image, originDeclared)
}

// describe reads an image's release and finds its modules: beside the image, where a package or a Nix closure has
// them, else the host's.
func (s system) describe(image, origin string) (*Kernel, error) {
	release, err := imageRelease(image)
	if err != nil {
		return nil, fmt.Errorf("cannot use kernel %s: %w", image, err)
	}
	k := &Kernel{Release: release, Image: image, Origin: origin}
	dir := filepath.Dir(image)
	for _, modules := range append([]string{filepath.Join(dir, "lib/modules"), filepath.Join(dir, "../lib/modules")}, s.modules...) {
		if isDir(filepath.Join(modules, release, "kernel")) {
			k.Modules = filepath.Join(modules, release)
			break
		}
	}
	return k, nil
}

// installed lists the kernels in the host's /boot that have modules, newest first.
func (s system) installed() ([]Kernel, error) {
	images, err := filepath.Glob(filepath.Join(s.boot, "vmlinuz-*"))
	if err != nil {
		return nil, fmt.Errorf("cannot list kernels: %w", err)
	}
	var kernels []Kernel
	for _, image := range images {
		release := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
		for _, modules := range s.modules {
			if dir := filepath.Join(modules, release); isDir(filepath.Join(dir, "kernel")) {
				kernels = append(kernels, Kernel{Release: release, Image: image, Modules: dir, Origin: originBoot})
				break
			}
		}
	}
	sortNewest(kernels)
	return kernels, nil
}

// List lists the store's kernels, newest first. A store that isn't there has none.
func List(storeDir string) ([]Kernel, error) {
	dir := filepath.Join(storeDir, kernelsDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list kernels: %w", err)
	}
	var kernels []Kernel
	for _, e := range entries {
		if !e.IsDir() || strings.HasPrefix(e.Name(), ".") {
			continue // a pull that is under way, or that was killed
		}
		kernels = append(kernels, stored(dir, e.Name()))
	}
	sortNewest(kernels)
	return kernels, nil
}

// stored says where the parts of a kernel lie in the store's directory of kernels.
func stored(dir, release string) Kernel {
	at := filepath.Join(dir, release)
	return Kernel{
		Release: release,
		Image:   filepath.Join(at, "vmlinuz"),
		Modules: filepath.Join(at, "lib/modules", release),
		Origin:  originStore,
	}
}

func sortNewest(kernels []Kernel) {
	slices.SortFunc(kernels, func(a, b Kernel) int { return compareReleases(b.Release, a.Release) })
}

// compareReleases orders releases by age: runs of digits by their value, all else by its bytes.
func compareReleases(a, b string) int {
	for a != "" && b != "" {
		x, restA := leadingRun(a)
		y, restB := leadingRun(b)
		if isDigit(x[0]) && isDigit(y[0]) {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if c := cmp.Compare(len(x), len(y)); c != 0 {
				return c
			}
		}
		if c := strings.Compare(x, y); c != 0 {
			return c
		}
		a, b = restA, restB
	}
	return cmp.Compare(len(a), len(b))
}

// leadingRun splits off the digits, or what is before the next digit.
func leadingRun(s string) (run, rest string) {
	end := 1
	for end < len(s) && isDigit(s[end]) == isDigit(s[0]) {
		end++
	}
	return s[:end], s[end:]
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func runningRelease() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("cannot ask for the running kernel's release: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}
