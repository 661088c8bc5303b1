package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/internal/durable"
)

// Boot is what a VMM loads.
type Boot struct {
	// Vmlinux is the kernel: the uncompressed one, or the bzImage where Packed says why.
	Vmlinux string
	// Initramfs is the base that WriteInitramfs adds the boot document to.
	Initramfs string
	// Packed is why the guest has to unpack its kernel itself, which takes seconds under emulation; "" as a rule.
	Packed string
}

// formatVersion is part of every cached file's key; it changes whenever what is made of the same input does.
const formatVersion = "1"

// Names in the cache. A kernel's directory holds the vmlinux and, where it couldn't be unpacked, the reason.
const (
	cacheLock     = "lock"
	vmlinuxFile   = "vmlinux"
	packedFile    = "packed"
	initramfsFile = "initramfs"
	kernelPrefix  = "kernel-"
	guestPrefix   = "initramfs-"
	newPrefix     = ".new-"
)

// Prepare makes what a VMM loads out of a kernel and the guest's init: the extracted vmlinux, and an initramfs with
// the modules that the kernel doesn't have built in. Both are kept in cacheDir by the content that they are made
// of, so that it works once per kernel and init; files are 0644 and directories 0755, since the VMM's uid reads
// them. Several may call it at once.
func Prepare(ctx context.Context, k *Kernel, initBinary, cacheDir string) (*Boot, error) {
	image, err := readImage(k.Image)
	if err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %s: %w", k.Release, k.Image, err)
	}
	init, err := os.ReadFile(initBinary)
	if err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: the guest's init: %w", k.Release, err)
	}
	t, err := openTree(k.Modules)
	if err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %w", k.Release, err)
	}
	modules, err := t.resolve(needed, useful)
	if err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %w", k.Release, err)
	}

	if err := durable.MkdirAll(cacheDir, 0o755); err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %w", k.Release, err)
	}
	// Users of VMMs pass through, whatever the umask.
	if err := os.Chmod(cacheDir, 0o755); err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %w", k.Release, err)
	}
	unlock, err := lockCache(ctx, cacheDir)
	if err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %w", k.Release, err)
	}
	defer unlock()
	kernelDir, err := cached(cacheDir, kernelPrefix+key(image), func(dir string) error { return writeKernel(dir, image) })
	if err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %w", k.Release, err)
	}
	parts := [][]byte{init}
	for _, m := range modules {
		parts = append(parts, []byte(m.Name), m.Content)
	}
	guestDir, err := cached(cacheDir, guestPrefix+key(parts...), func(dir string) error {
		base, err := baseInitramfs(init, modules)
		if err != nil {
			return err
		}
		return writeSynced(filepath.Join(dir, initramfsFile), base)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %w", k.Release, err)
	}
	packed, err := readOptional(filepath.Join(kernelDir, packedFile))
	if err != nil {
		return nil, fmt.Errorf("cannot prepare kernel %s: %w", k.Release, err)
	}
	return &Boot{
		Vmlinux:   filepath.Join(kernelDir, vmlinuxFile),
		Initramfs: filepath.Join(guestDir, initramfsFile),
		Packed:    string(packed),
	}, nil
}

// Use says whether what an earlier Prepare returned is still there, and that it is used now, so that no Prune takes it
// away before the VMM has read it.
func (b *Boot) Use(ctx context.Context, cacheDir string) bool {
	if b == nil || !isDir(cacheDir) {
		return false
	}
	unlock, err := lockCache(ctx, cacheDir)
	if err != nil {
		return false
	}
	defer unlock()
	now := time.Now()
	for _, file := range []string{b.Vmlinux, b.Initramfs} {
		if info, err := os.Stat(file); err != nil || !info.Mode().IsRegular() {
			return false
		}
		if err := os.Chtimes(filepath.Dir(file), now, now); err != nil {
			return false
		}
	}
	return true
}

// writeKernel writes the extracted kernel; for one that can't be, the image and why.
func writeKernel(dir string, image []byte) error {
	kernel, err := vmlinux(image)
	if errors.Is(err, errPacked) && !isELF(image) {
		if err := writeSynced(filepath.Join(dir, packedFile), []byte(err.Error())); err != nil {
			return err
		}
		kernel, err = image, nil
	}
	if err != nil {
		return fmt.Errorf("its image is %w", err)
	}
	return writeSynced(filepath.Join(dir, vmlinuxFile), kernel)
}

// key is a hash of parts, each with its length before it, so that no two lists of parts have the same.
func key(parts ...[]byte) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n", formatVersion)
	for _, p := range parts {
		fmt.Fprintf(h, "%d\n", len(p))
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// cached returns the directory of that name in the cache, made by build if it isn't there: under another name, which
// it loses when all of it is written. The caller holds the lock.
func cached(cacheDir, name string, build func(dir string) error) (string, error) {
	dir := filepath.Join(cacheDir, name)
	now := time.Now()
	// The time says when it was used last, for Prune.
	err := os.Chtimes(dir, now, now)
	if err == nil {
		return dir, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	temp, err := os.MkdirTemp(cacheDir, newPrefix)
	if err != nil {
		return "", err
	}
	err = os.Chmod(temp, 0o755)
	if err == nil {
		err = build(temp)
	}
	if err == nil {
		err = durable.SyncDir(temp)
	}
	if err == nil {
		err = durable.Rename(temp, dir)
	}
	if err != nil {
		return "", errors.Join(err, os.RemoveAll(temp))
	}
	return dir, nil
}

func writeSynced(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(0o644) // whatever the umask
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// lockRetry is how often a lock that somebody holds is tried: who holds it works for a second or two.
const lockRetry = 50 * time.Millisecond

// lockCache takes the cache's lock; a process that ends leaves it.
func lockCache(ctx context.Context, cacheDir string) (unlock func() error, err error) {
	f, err := os.OpenFile(filepath.Join(cacheDir, cacheLock), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f.Close, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", f.Name(), err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", f.Name(), ctx.Err()), f.Close())
		case <-time.After(lockRetry):
		}
	}
}

// Prune removes from the cache what Prepare hasn't given out for as long as unused says, and what a killed Prepare
// left. A VMM has read its files once its guest runs, so a few minutes are enough.
func Prune(ctx context.Context, cacheDir string, unused time.Duration) (removed []string, err error) {
	if !isDir(cacheDir) {
		return nil, nil
	}
	unlock, err := lockCache(ctx, cacheDir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	found, err := prunable(cacheDir, unused, false)
	if err != nil {
		return nil, err
	}
	for _, path := range found {
		if err := os.RemoveAll(path); err != nil {
			return removed, fmt.Errorf("cannot remove a prepared kernel: %w", err)
		}
		removed = append(removed, path)
	}
	return removed, nil
}

// Prunable lists what Prune would remove. It changes nothing and waits for nobody: while a Prepare is at work, what it makes
// isn't among it.
func Prunable(cacheDir string, unused time.Duration) ([]string, error) {
	lock, err := os.Open(filepath.Join(cacheDir, cacheLock))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // nothing was ever prepared
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list prepared kernels: %w", err)
	}
	defer lock.Close()
	// Shared, and given back at once: who works holds it alone.
	err = unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("cannot list prepared kernels: %s: %w", lock.Name(), err)
	}
	return prunable(cacheDir, unused, err != nil)
}

// prunable lists what wasn't given out for so long, and, unless somebody is at work, what a killed Prepare left.
func prunable(cacheDir string, unused time.Duration, atWork bool) (found []string, err error) {
	entries, err := os.ReadDir(cacheDir)
	if err != nil {
		return nil, fmt.Errorf("cannot list prepared kernels: %w", err)
	}
	limit := time.Now().Add(-unused)
	for _, e := range entries {
		left := !atWork && strings.HasPrefix(e.Name(), newPrefix)
		ours := strings.HasPrefix(e.Name(), kernelPrefix) || strings.HasPrefix(e.Name(), guestPrefix)
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot list prepared kernels: %w", err)
		}
		if left || ours && !info.ModTime().After(limit) {
			found = append(found, filepath.Join(cacheDir, e.Name()))
		}
	}
	return found, nil
}
