package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// openBeneath opens a path below a directory without following a symbolic
// link anywhere and without leaving the directory or its file system.
func openBeneath(root *os.File, path string, flags uint64) (*os.File, error) {
	if path == "" {
		path = "."
	}
	how := unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(int(root.Fd()), path, &how)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue // EAGAIN: a rename somewhere on the system made the check unsure
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// openDir opens a directory to walk or to be the root of openBeneath.
func openDir(path string) (*os.File, error) {
	return os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// walkTree visits every entry below a directory and the directory itself
// (path ""), each directory before what is in it, siblings in the order of
// their names' bytes. It follows no link and enters no other file system; the
// directory that one is mounted on is visited as empty, and mounted says so.
func walkTree(ctx context.Context, root *os.File, visit func(path string, st *unix.Stat_t) error, mounted func(path string) error) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return err
	}
	if err := visit("", &st); err != nil {
		return err
	}
	return walkDir(ctx, root, "", st.Dev, visit, mounted)
}

// walkDir visits what is in a directory. No descriptor is held while it goes
// deeper, so that depth costs memory only.
func walkDir(ctx context.Context, root *os.File, dir string, dev uint64, visit func(string, *unix.Stat_t) error, mounted func(string) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	type child struct {
		name string
		st   unix.Stat_t
	}
	d, err := openBeneath(root, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	if err != nil {
		return errors.Join(fmt.Errorf("cannot read the directory %q: %w", dir, err), d.Close())
	}
	sort.Strings(names)
	children := make([]child, len(names))
	for i, name := range names {
		children[i].name = name
		if err := unix.Fstatat(int(d.Fd()), name, &children[i].st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return errors.Join(fmt.Errorf("cannot look at %q: %w", join(dir, name), err), d.Close())
		}
	}
	if err := d.Close(); err != nil {
		return err
	}
	for i := range children {
		path, st := join(dir, children[i].name), &children[i].st
		if len(path) > maxPath {
			return fmt.Errorf("%w: the path %.80q… is longer than %d bytes", ErrBadArchive, path, maxPath)
		}
		if err := visit(path, st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		if st.Dev != dev {
			if err := mounted(path); err != nil {
				return err
			}
			continue
		}
		if err := walkDir(ctx, root, path, dev, visit, mounted); err != nil {
			return err
		}
	}
	return nil
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// keptXAttr says whether an extended attribute is part of an image. Labels of
// the host's security modules and trusted.* (overlayfs's own marks, which a
// guest's overlay would obey) aren't.
func keptXAttr(name string) bool {
	return strings.HasPrefix(name, "user.") || name == "security.capability" ||
		name == "system.posix_acl_access" || name == "system.posix_acl_default"
}

// xattrsOf reads the extended attributes that an image keeps from an open
// file or directory, sorted by name.
func xattrsOf(fd int) ([]xattr, error) {
	size, err := unix.Flistxattr(fd, nil)
	if err == unix.ENOTSUP || size == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list its extended attributes: %w", err)
	}
	list := make([]byte, size)
	if size, err = unix.Flistxattr(fd, list); err != nil {
		return nil, fmt.Errorf("cannot list its extended attributes: %w", err)
	}
	var all []xattr
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:size]), "\x00"), "\x00") {
		if !keptXAttr(name) {
			continue
		}
		n, err := unix.Fgetxattr(fd, name, nil)
		if err != nil {
			return nil, fmt.Errorf("cannot read its attribute %s: %w", name, err)
		}
		value := make([]byte, n)
		if n > 0 {
			if n, err = unix.Fgetxattr(fd, name, value); err != nil {
				return nil, fmt.Errorf("cannot read its attribute %s: %w", name, err)
			}
		}
		all = append(all, xattr{name, string(value[:n])})
	}
	sort.Slice(all, func(i, j int) bool { return all[i].name < all[j].name })
	return all, nil
}

// readLinkAt reads a symbolic link below a directory.
func readLinkAt(root *os.File, path string) (string, error) {
	// An O_PATH descriptor of the link itself, so that its parents are
	// walked as strictly as any other path's.
	l, err := openBeneath(root, path, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", err
	}
	buf := make([]byte, maxPath+1)
	n, err := unix.Readlinkat(int(l.Fd()), "", buf)
	if err := errors.Join(err, l.Close()); err != nil {
		return "", fmt.Errorf("cannot read the link %q: %w", path, err)
	}
	return string(buf[:n]), nil
}
