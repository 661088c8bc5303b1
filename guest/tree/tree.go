// Package tree carries a file, or a directory with all that is in it, from one machine to another as a tar stream: Pack makes the
// stream, Unpack makes files of it. Either end may be hostile to the other.
package tree

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Bounds on the names in a stream.
const (
	maxName  = 255  // bytes of a name, the kernel's NAME_MAX
	maxPath  = 4095 // bytes of a path or a link's target, the kernel's PATH_MAX without its zero byte
	maxDepth = 512  // directories in one another: each is held open
)

// contents is the name of the top of a stream that has what is in a directory, without the directory itself.
const contents = "."

// Count counts what has passed, for who watches. Its zero value is ready; nil counts nothing.
type Count struct{ entries, bytes atomic.Int64 }

// Entries is the number of files, directories and links.
func (c *Count) Entries() int64 { return c.entries.Load() }

// Bytes is the number of bytes of files.
func (c *Count) Bytes() int64 { return c.bytes.Load() }

func (c *Count) entry() {
	if c != nil {
		c.entries.Add(1)
	}
}

func (c *Count) Write(p []byte) (int, error) {
	if c != nil {
		c.bytes.Add(int64(len(p)))
	}
	return len(p), nil
}

// TopName is the name that the top of source has in a stream: its last part, or "." for the contents of a directory (DIR/. and /).
func TopName(source string) string {
	base := path.Base(source)
	if strings.HasSuffix(source, "/.") || base == "/" {
		return contents
	}
	return base
}

// printable is a path of anyone's, fit to be shown.
func printable(p string) string {
	const shown = 200
	if len(p) > shown {
		p = p[:shown] + "…"
	}
	quoted := strconv.QuoteToGraphic(p)
	if quoted == `"`+p+`"` {
		return p
	}
	return quoted
}

// cause is what went wrong, without the name that it went wrong with: it stands in the message once.
func cause(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return errors.New("the disk is full")
	case errors.Is(err, unix.EDQUOT):
		return errors.New("the disk's quota is used up")
	}
	if pathErr, ok := err.(*fs.PathError); ok {
		return pathErr.Err
	}
	return err
}

// place finds where the top of a stream goes, as cp does: into destination when that is a directory, else in its place. It returns
// the directory, which is there, and the name in it; "." means that the directory's own contents are meant.
func place(destination, top string, isDir bool) (dir, name string, err error) {
	slash := strings.HasSuffix(destination, "/")
	info, err := os.Stat(destination)
	switch {
	case err == nil && info.IsDir():
		return destination, top, nil
	case err == nil && !info.Mode().IsRegular():
		return "", "", fmt.Errorf("%s is neither a file nor a directory", printable(destination))
	case err == nil && isDir:
		return "", "", fmt.Errorf("%s is a file, and a directory can't take its place", printable(destination))
	case err == nil && slash:
		return "", "", fmt.Errorf("%s is not a directory", printable(strings.TrimRight(destination, "/")))
	case err == nil: // a link leads to the file that is replaced
		if destination, err = filepath.EvalSymlinks(destination); err != nil {
			return "", "", err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return "", "", fmt.Errorf("%s: %w", printable(destination), cause(err))
	case slash && !isDir:
		return "", "", fmt.Errorf("there is no directory %s", printable(destination))
	}
	clean := filepath.Clean(destination)
	if base := filepath.Base(clean); base == ".." || base == "/" || base == "." {
		return "", "", fmt.Errorf("there is no directory %s", printable(destination))
	}
	if info, err := os.Lstat(clean); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return "", "", fmt.Errorf("%s is a link to something that isn't there", printable(clean))
	}
	dir, name = filepath.Dir(clean), filepath.Base(clean)
	if info, err := os.Stat(dir); err != nil {
		return "", "", fmt.Errorf("there is no directory %s: %w", printable(dir), cause(err))
	} else if !info.IsDir() {
		return "", "", fmt.Errorf("%s is not a directory", printable(dir))
	}
	return dir, name, nil
}
