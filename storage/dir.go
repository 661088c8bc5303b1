package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// copyChunk is how much of a file is copied between two looks at the context.
const copyChunk = 16 << 20

// unpackDir feeds a directory of the host to an unpacker. The directory may
// change meanwhile; what comes out is then a mixture, but never anything from
// outside of it.
func unpackDir(ctx context.Context, source *os.File, u *unpacker) error {
	seen := make(map[inode]string) // of files with several names, the first
	return walkTree(ctx, source, func(path string, st *unix.Stat_t) error {
		m := meta{mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid, mtime: st.Mtim}
		kind := st.Mode & unix.S_IFMT
		if kind != unix.S_IFDIR && st.Nlink > 1 {
			id := inode{st.Dev, st.Ino}
			if first, ok := seen[id]; ok {
				return u.hardLink(path, first)
			}
			if kind != unix.S_IFSOCK && kind != unix.S_IFCHR && kind != unix.S_IFBLK {
				seen[id] = path
			}
		}
		switch kind {
		case unix.S_IFDIR:
			d, err := openBeneath(source, path, unix.O_RDONLY|unix.O_DIRECTORY)
			if errors.Is(err, unix.EXDEV) {
				return u.dir(path, m) // something is mounted on it
			}
			if err != nil {
				return err
			}
			m.xattrs, err = xattrsOf(int(d.Fd()))
			if err := errors.Join(err, d.Close()); err != nil {
				return fmt.Errorf("%q: %w", path, err)
			}
			return u.dir(path, m)
		case unix.S_IFREG:
			return copyFile(u, source, path, st, m)
		case unix.S_IFLNK:
			target, err := readLinkAt(source, path)
			if err != nil {
				return err
			}
			return u.symlink(path, target, m)
		case unix.S_IFIFO:
			return u.fifo(path, m)
		case unix.S_IFSOCK:
			u.note(path + ": sockets aren't kept")
		default:
			u.note(path + ": device nodes aren't kept")
		}
		return nil
	}, func(path string) error {
		u.note(path + ": another file system is mounted there; what is in it isn't kept")
		return nil
	})
}

// copyFile copies a regular file, its holes as holes. Where the file system
// can share blocks between files the kernel does that.
func copyFile(u *unpacker, source *os.File, path string, st *unix.Stat_t, m meta) (err error) {
	from, err := openBeneath(source, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	var now unix.Stat_t
	if err := unix.Fstat(int(from.Fd()), &now); err != nil {
		return err
	}
	if now.Ino != st.Ino || now.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%q was replaced while it was imported", path)
	}
	if m.xattrs, err = xattrsOf(int(from.Fd())); err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	return u.file(path, m, now.Size, func(to *os.File) error {
		if err := u.copyData(to, from, now.Size); err != nil {
			return err
		}
		return to.Truncate(now.Size)
	})
}

// copyData copies the parts of a file that aren't holes.
func (u *unpacker) copyData(to, from *os.File, size int64) error {
	for at := int64(0); at < size; {
		if err := u.ctx.Err(); err != nil {
			return err
		}
		data, err := from.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole to the end
		}
		if err != nil {
			return err
		}
		hole, err := from.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		end := min(hole, size, data+copyChunk)
		if _, err := from.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := to.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.CopyN(to, from, end-data); err != nil {
			if err == io.EOF {
				return fmt.Errorf("it became shorter while it was imported: %w", io.ErrUnexpectedEOF)
			}
			return err
		}
		at = end
		u.bytes += end - data
		u.progress(u.bytes)
	}
	return nil
}

// sizeOfDir adds up a directory's content, for the message of a full store.
func sizeOfDir(ctx context.Context, source *os.File) (int64, error) {
	var total int64
	seen := make(map[inode]bool)
	err := walkTree(ctx, source, func(_ string, st *unix.Stat_t) error {
		id := inode{st.Dev, st.Ino}
		if st.Mode&unix.S_IFMT == unix.S_IFREG && !seen[id] {
			seen[id] = st.Nlink > 1
			total += st.Blocks * 512
		}
		return nil
	}, func(string) error { return nil })
	return total, err
}
