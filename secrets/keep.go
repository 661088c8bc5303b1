package secrets

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/internal/durable"
)

// Set keeps what r gives as the secret called name of the VM whose directory is keep, in place of what was kept. It reads at
// most MaxSize bytes. A single newline at the end, which a terminal or echo leaves there, is dropped.
func Set(keep, name string, r io.Reader) error {
	if err := checkName(name); err != nil {
		return err
	}
	v, err := readAll(r, 4096)
	if err != nil {
		return fmt.Errorf("cannot keep the secret %s from standard input: %w", name, err)
	}
	defer v.wipe()
	content := bytes.TrimSuffix(bytes.TrimSuffix(v.bytes, []byte("\n")), []byte("\r"))
	if len(content) == 0 {
		return fmt.Errorf("cannot keep the secret %s from standard input: it is empty", name)
	}
	if err := keepValue(filepath.Join(keep, stdinDir), name, content); err != nil {
		return fmt.Errorf("cannot keep the secret %s: %w", name, err)
	}
	return nil
}

// generate makes a secret's value if there is none yet: hex digits, so that it fits every place that takes text.
func generate(keep string, s Secret) (err error) {
	path := s.Source(keep)
	if _, err := os.Lstat(path); err == nil {
		return nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot generate secret %s: %w", s.Name, err)
	}
	raw, text := make([]byte, s.Generate), make([]byte, 2*s.Generate)
	defer func() { clear(raw); clear(text) }()
	if _, err := rand.Read(raw); err != nil {
		return fmt.Errorf("cannot generate secret %s: the kernel gives no random bytes: %w", s.Name, err)
	}
	hex.Encode(text, raw)
	if err := keepValue(filepath.Join(keep, generatedDir), s.Name, text); err != nil {
		return fmt.Errorf("cannot keep the generated secret %s: %w", s.Name, err)
	}
	return nil
}

// keepValue writes a file that only we may read, so that it is there whole or not at all, also after a loss of power.
func keepValue(dir, name string, content []byte) (err error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil { // an old one may be wider
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := replaceAt(int(d.Fd()), name, content, 0o600, os.Getuid(), os.Getgid(), true); err != nil {
		return err
	}
	return d.Sync()
}

// temporary is what a file is called until it is whole. A guest that lists the directory at the wrong moment sees one name,
// always the same for a secret, so that what an interrupted write left is replaced and not gathered.
func temporary(name string) string { return ".new." + name }

// replaceAt puts a file of this content, owner and mode in the place of name, in one step.
func replaceAt(dir int, name string, content []byte, mode os.FileMode, uid, gid int, durable bool) error {
	temp := temporary(name)
	if err := unix.Unlinkat(dir, temp, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot remove the unfinished %s: %w", temp, err)
	}
	fd, err := unix.Openat(dir, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("cannot make %s: %w", temp, err)
	}
	f := os.NewFile(uintptr(fd), temp)
	fill := func() error {
		if _, err := f.Write(content); err != nil {
			return err
		}
		if err := f.Chown(uid, gid); err != nil {
			return err
		}
		if err := f.Chmod(mode.Perm()); err != nil {
			return err
		}
		if durable {
			return f.Sync()
		}
		return nil
	}
	err = errors.Join(fill(), f.Close())
	if err == nil {
		err = unix.Renameat(dir, temp, dir, name)
	}
	if err != nil {
		if undo := unix.Unlinkat(dir, temp, 0); undo != nil && !errors.Is(undo, unix.ENOENT) {
			err = errors.Join(err, undo)
		}
		return fmt.Errorf("cannot write %s: %w", name, err)
	}
	return nil
}
