package emuhost

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// loader is the dynamic loader of Debian's amd64. QEMU is run by it, with the root's libraries, so that it runs
// whatever this machine has installed.
const loader = "ld-linux-x86-64.so.2"

// bootModules are what the initramfs needs to mount the root, in the order in which they are loaded; all else is
// built into Debian's cloud kernel.
var bootModules = []string{"virtio_blk"}

// extractKernel copies the root's kernel with its modules to dir, laid out as a package has them.
func extractKernel(dir, root string) error {
	kernels, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil || len(kernels) == 0 {
		return fmt.Errorf("the root has no kernel: %v", err)
	}
	kernel := kernels[len(kernels)-1]
	if err := copyTo(filepath.Join(dir, filepath.Base(kernel)), kernel); err != nil {
		return err
	}
	modules := filepath.Join("lib/modules", strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-"))
	return filepath.WalkDir(filepath.Join(root, modules), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		return copyTo(filepath.Join(dir, rel), path)
	})
}

// kernelFiles finds the kernel's image and the modules that booting takes, in their order.
func kernelFiles(dir string) (image string, modules []string, err error) {
	images, err := filepath.Glob(filepath.Join(dir, "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return "", nil, fmt.Errorf("%s does not have one kernel: %v", dir, err)
	}
	for _, name := range bootModules {
		found := ""
		err := filepath.WalkDir(filepath.Join(dir, "lib/modules"), func(path string, d fs.DirEntry, err error) error {
			if err == nil && strings.HasPrefix(d.Name(), name+".ko") {
				found = path
			}
			return err
		})
		if err != nil {
			return "", nil, err
		}
		if found == "" {
			return "", nil, fmt.Errorf("%s has no module %s", dir, name)
		}
		modules = append(modules, found)
	}
	return images[0], modules, nil
}

var libraryLine = regexp.MustCompile(`=> (/\S+) \(0x|^\s+(/\S+) \(0x`)

// extractQEMU copies the root's QEMU, its libraries and its firmware to dir.
func extractQEMU(ctx context.Context, dir, root string) error {
	libs := filepath.Join(root, "usr/lib/x86_64-linux-gnu")
	binary := filepath.Join(root, "usr/bin/qemu-system-x86_64")
	ld := filepath.Join(root, "usr/lib64", loader)
	out, err := exec.CommandContext(ctx, ld, "--library-path", libs, "--list", binary).Output()
	if err != nil {
		return fmt.Errorf("cannot list QEMU's libraries: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		m := libraryLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		lib := m[1] + m[2]
		if err := copyTo(filepath.Join(dir, "lib", filepath.Base(lib)), lib); err != nil {
			return err
		}
	}
	if err := copyTo(filepath.Join(dir, "lib", loader), ld); err != nil {
		return err
	}
	if err := copyTo(filepath.Join(dir, "qemu-system-x86_64"), binary); err != nil {
		return err
	}
	for _, name := range []string{"bios-256k.bin", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin"} {
		from := filepath.Join(root, "usr/share/qemu", name)
		if _, err := os.Stat(from); err != nil {
			from = filepath.Join(root, "usr/share/seabios", name)
		}
		if err := copyTo(filepath.Join(dir, "firmware", name), from); err != nil {
			return err
		}
	}
	return nil
}

// copyTo copies a file with its permissions, following links, and makes the directory that it goes to.
func copyTo(to, from string) (err error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}()
	_, err = io.Copy(out, in)
	return err
}
