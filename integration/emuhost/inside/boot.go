package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	newRoot = "/root"
	// program is where the harness finds itself after the switch; systemd leaves a /run that is mounted already.
	program = "/run/emuhost/inside"
)

// unit runs the harness. Its children are the tests' commands: they may use what root on a server may, and
// one that runs out of memory does not take the others along.
const unit = `[Unit]
Description=runs what tests ask for
[Service]
Type=exec
ExecStart=` + program + ` serve
OOMPolicy=continue
TasksMax=infinity
LimitNOFILE=1048576
LimitCORE=infinity
KillMode=mixed
TimeoutStopSec=5
`

// boot is the initramfs' init: it ends in systemd's or with an error, on which the kernel panics.
func boot() error {
	for _, m := range []struct{ source, target, kind string }{
		{"devtmpfs", "/dev", "devtmpfs"}, {"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.kind, 0, ""); err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.target, err)
		}
	}
	modules, err := filepath.Glob("/modules/*")
	if err != nil {
		return err
	}
	sort.Strings(modules) // their names begin with their order
	for _, m := range modules {
		if err := loadModule(m); err != nil {
			return fmt.Errorf("cannot load %s: %w", m, err)
		}
	}
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/dev/vda", newRoot, "ext4", 0, ""); err != nil {
		return fmt.Errorf("cannot mount the root: %w", err)
	}
	run := filepath.Join(newRoot, "run")
	if err := unix.Mount("tmpfs", run, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("cannot mount /run: %w", err)
	}
	if err := install(newRoot); err != nil {
		return err
	}
	for _, d := range []string{"dev", "proc", "sys"} {
		if err := unix.Mount("/"+d, filepath.Join(newRoot, d), "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("cannot move /%s: %w", d, err)
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return unix.Exec("/sbin/init", []string{"/sbin/init"}, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=dumb"})
}

// loadModule loads one module; the kernel unpacks it itself.
func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	return unix.FinitModule(int(f.Fd()), "", flags)
}

// install puts the program and its unit into the root's /run, so that the root itself stays as Debian made it.
func install(root string) error {
	to := filepath.Join(root, program)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := copyFile(to, "/init"); err != nil {
		return err
	}
	units := filepath.Join(root, "run/systemd/system")
	wants := filepath.Join(units, "multi-user.target.wants")
	if err := os.MkdirAll(wants, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(units, "emuhost.service"), []byte(unit), 0o644); err != nil {
		return err
	}
	return os.Symlink("../emuhost.service", filepath.Join(wants, "emuhost.service"))
}

func copyFile(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
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
