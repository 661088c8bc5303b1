// Package durable changes files and directories so that they survive a loss of
// power: after a crash there is the old state or the new one, and the new one for
// certain once the function has returned. A file's content is written under
// another name, made durable, and renamed; and each directory in which a name
// changed is made durable too, which a file's own fsync(2) does not do.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"
)

// WriteFile replaces the file by one of this content and mode, whatever the
// umask. The directory must be there. Of two that write at the same time, one
// wins, whole. A writer that is killed leaves a file that [IsUnfinished] knows.
func WriteFile(path string, content []byte, mode os.FileMode) error {
	dir := filepath.Dir(path)
	// In the same directory, whatever TMPDIR says: it is of the same file system.
	if err := renameio.WriteFile(path, content, mode, renameio.WithTempDir(dir), renameio.WithStaticPermissions(mode)); err != nil {
		return err
	}
	return SyncDir(dir)
}

// IsUnfinished says whether name, without its directory, is what a WriteFile of
// the file base leaves behind when it is killed: a dot, the file's name, digits.
func IsUnfinished(name, base string) bool {
	digits, ok := strings.CutPrefix(name, "."+base)
	return ok && digits != "" && strings.Trim(digits, "0123456789") == ""
}

// Rename gives a file or directory, whose content is durable already, its place.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	if filepath.Dir(from) == filepath.Dir(to) {
		return SyncDir(filepath.Dir(to))
	}
	return errors.Join(SyncDir(filepath.Dir(to)), SyncDir(filepath.Dir(from)))
}

// Symlink makes a symbolic link; one that is there is fs.ErrExist, so that of
// many one makes it.
func Symlink(target, link string) error {
	if err := os.Symlink(target, link); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(link))
}

// Link gives a file, whose content is durable already, a second name, if that is
// free: fs.ErrExist where it isn't.
func Link(file, name string) error {
	if err := os.Link(file, name); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(name))
}

// MkdirAll makes the directories of a path that are not there yet, each with
// mode as far as the umask lets it.
func MkdirAll(path string, mode os.FileMode) error {
	info, err := os.Stat(path)
	if err == nil && info.IsDir() {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := MkdirAll(parent, mode); err != nil {
			return err
		}
	}
	if err := os.Mkdir(path, mode); err != nil && !isDir(path, err) {
		return err
	}
	return SyncDir(parent)
}

// isDir says whether a Mkdir failed because another process was faster.
func isDir(path string, err error) bool {
	info, serr := os.Stat(path)
	return errors.Is(err, fs.ErrExist) && serr == nil && info.IsDir()
}

// SyncDir makes the names in a directory durable.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
