package emuhost

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	suite = "trixie"
	// format is part of the cache's key: another layout of a Base is another number.
	format = 2
	// rootSize is the server's disk. It is sparse, so that only what is written costs anything.
	rootSize = "12G"
	// rootDisk is the last file of a base that comes to its place: with it the base is complete.
	rootDisk = "root.ext4"
	// lockPoll is how often the cache's lock is tried while another process makes the same root.
	lockPoll = 200 * time.Millisecond
	// kept is for how long a root that nobody booted stays in the cache.
	kept = 62 * 24 * time.Hour
)

// Base is what emulated hosts of one kind are booted from; it lies in the cache, complete or not at all.
type Base struct {
	dir string // root.ext4, kernel/, qemu/
}

// CacheDir is where bases are kept.
func CacheDir() string {
	if dir := os.Getenv("CLAWVM_TEST_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/clawvm-test"
}

// Prepare gives the base of a server with these packages over DefaultPackages, and makes it when the cache has none of this month.
// Several processes may call it at once. The error is ErrUnavailable when this machine lacks what it takes.
func Prepare(ctx context.Context, packages []string) (*Base, error) {
	all := slices.Concat(DefaultPackages, packages)
	slices.Sort(all)
	all = slices.Compact(all)
	cache := CacheDir()
	name := "emuhost-" + key(all, time.Now())
	b := &Base{dir: filepath.Join(cache, name)}
	if b.complete() {
		return b, nil
	}
	if why := missing(); why != "" {
		return nil, fmt.Errorf("%w: %s", ErrUnavailable, why)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, filepath.Join(cache, name+".lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if b.complete() { // another process made it meanwhile
		return b, nil
	}
	if err := sweep(cache, name); err != nil {
		return nil, err
	}
	temp, err := os.MkdirTemp(cache, name+".making-")
	if err != nil {
		return nil, err
	}
	if err := build(ctx, temp, all); err != nil {
		return nil, errors.Join(err, os.RemoveAll(temp))
	}
	if err := os.Rename(temp, b.dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(temp))
	}
	return b, nil
}

// complete looks for a finished base and marks it as used.
func (b *Base) complete() bool {
	now := time.Now()
	return os.Chtimes(filepath.Join(b.dir, rootDisk), now, now) == nil
}

// KernelDir is a directory with the server's kernel, vmlinuz-RELEASE, and lib/modules/RELEASE: Debian 13's kernel for
// virtual machines, which guests can boot too.
func (b *Base) KernelDir() string { return filepath.Join(b.dir, "kernel") }

func (b *Base) qemu() string { return filepath.Join(b.dir, "qemu") }

// key names a set of packages and a month, so that a root has at most a month's old packages.
func key(packages []string, now time.Time) string {
	h := sha256.Sum256([]byte(fmt.Sprintf("%d %s %s", format, suite, strings.Join(packages, " "))))
	return hex.EncodeToString(h[:6]) + "-" + now.UTC().Format("2006-01")
}

// missing says what this machine lacks to make a root, or "".
func missing() string {
	if os.Geteuid() != 0 {
		return "making its root takes root"
	}
	for _, program := range []string{"mmdebstrap", "mke2fs", "apt-get"} {
		if _, err := exec.LookPath(program); err != nil {
			return program + " is not installed"
		}
	}
	return ""
}

// lock takes the file's lock, waiting for who holds it until ctx ends.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", path, err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s is locked: another process makes the root: %w", path, ctx.Err()), f.Close())
		case <-tick.C:
		}
	}
}

// sweep removes halves that a killed process left of this base, and bases that nobody has used for long.
func sweep(cache, name string) error {
	halves, err := filepath.Glob(filepath.Join(cache, name+".making-*"))
	if err != nil {
		return err
	}
	for _, half := range halves {
		if err := os.RemoveAll(half); err != nil {
			return err
		}
	}
	old, err := filepath.Glob(filepath.Join(cache, "emuhost-*"))
	if err != nil {
		return err
	}
	for _, dir := range old {
		info, err := os.Stat(filepath.Join(dir, rootDisk))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			continue
		}
		if err != nil {
			return err
		}
		if time.Since(info.ModTime()) > kept {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// build makes a base in dir: the root by mmdebstrap, its disk, and out of it the kernel and QEMU.
func build(ctx context.Context, dir string, packages []string) error {
	b := Base{dir}
	root := filepath.Join(dir, "root")
	mirror, err := mirror(ctx)
	if err != nil {
		return err
	}
	args := []string{"--mode=root", "--format=directory", "--variant=minbase", "--include=" + strings.Join(packages, ","),
		"--customize-hook=echo emuhost >\"$1/etc/hostname\"", suite, root}
	if mirror != "" {
		args = append(args, mirror)
	}
	if out, err := run(ctx, "mmdebstrap", args...); err != nil {
		if unreachable(out) {
			return fmt.Errorf("%w: no Debian mirror answers: %s", ErrUnavailable, lastLines(out, 3))
		}
		return fmt.Errorf("cannot make a Debian root: %w: %s", err, lastLines(out, 15))
	}
	disk := filepath.Join(dir, "disk.part")
	if out, err := run(ctx, "mke2fs", "-q", "-t", "ext4", "-L", "emuhost", "-d", root, disk, rootSize); err != nil {
		return fmt.Errorf("cannot make the disk: %w: %s", err, lastLines(out, 5))
	}
	if err := extractKernel(b.KernelDir(), root); err != nil {
		return err
	}
	if err := extractQEMU(ctx, b.qemu(), root); err != nil {
		return err
	}
	if err := os.RemoveAll(root); err != nil {
		return err
	}
	return os.Rename(disk, filepath.Join(dir, rootDisk))
}

// mirror is the Debian mirror that this machine's own apt uses, or "" for mmdebstrap's choice.
func mirror(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		return "", fmt.Errorf("cannot ask apt for its mirrors: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		// bookworm, not bookworm-security: the suite's own archive has trixie beside it.
		if len(f) == 3 && f[0] == "Debian" && !strings.Contains(f[1], "-") {
			return strings.TrimSuffix(f[2], "/"), nil
		}
	}
	return "", nil
}

// unreachable tells a machine without a network from a root that cannot be made.
func unreachable(output []byte) bool {
	for _, sign := range []string{"Temporary failure resolving", "Could not connect", "Could not resolve", "Network is unreachable", "Unable to connect"} {
		if bytes.Contains(output, []byte(sign)) {
			return true
		}
	}
	return false
}

// run runs a command to its end or ctx's and gives what it said.
func run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LANG=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.WaitDelay = 5 * time.Second
	return cmd.CombinedOutput()
}

func lastLines(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
