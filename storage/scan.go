package storage

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// hashBuffer is large enough that hashing, not system calls, is the cost.
const hashBuffer = 256 << 10

type inode struct{ dev, ino uint64 }

// scanTree describes the tree as it is on disk, content hashed: the entries
// of its manifest, in order.
func scanTree(ctx context.Context, root *os.File) ([]entry, error) {
	var entries []entry
	first := make(map[inode]string) // of files with several names, the first
	err := walkTree(ctx, root, func(path string, st *unix.Stat_t) error {
		e := entry{
			mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid,
			sec: st.Mtim.Sec, nsec: st.Mtim.Nsec, path: path,
		}
		id := inode{st.Dev, st.Ino}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if other, ok := first[id]; ok {
				e.kind, e.link = typeHardLink, other
				if st.Mode&unix.S_IFMT != unix.S_IFIFO {
					e.size = st.Size
				}
				entries = append(entries, e)
				return nil
			}
			first[id] = path
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			e.kind = typeDir
			d, err := openBeneath(root, path, unix.O_RDONLY|unix.O_DIRECTORY)
			if err != nil {
				return err
			}
			e.xattrs, err = xattrsOf(int(d.Fd()))
			if err := errors.Join(err, d.Close()); err != nil {
				return fmt.Errorf("%q: %w", path, err)
			}
		case unix.S_IFREG:
			e.kind, e.size = typeFile, st.Size
		case unix.S_IFLNK:
			e.kind, e.size = typeSymlink, st.Size
			target, err := readLinkAt(root, path)
			if err != nil {
				return err
			}
			e.link = target
		case unix.S_IFIFO:
			e.kind = typeFIFO
		default:
			return fmt.Errorf("%w: %q is a device or a socket", ErrCorrupt, path)
		}
		entries = append(entries, e)
		return nil
	}, func(path string) error {
		return fmt.Errorf("%w: something is mounted on %q", ErrCorrupt, path)
	})
	if err != nil {
		return nil, err
	}
	return entries, hashFiles(ctx, root, entries)
}

// hashFiles fills in what needs a file's descriptor: digest and extended
// attributes. All processors take part.
func hashFiles(ctx context.Context, root *os.File, entries []entry) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	indexes := make(chan int, 256)
	errs := make(chan error, runtime.GOMAXPROCS(0))
	var workers sync.WaitGroup
	for range cap(errs) {
		workers.Go(func() {
			buf := make([]byte, hashBuffer)
			for i := range indexes {
				if err := hashFile(ctx, root, &entries[i], buf); err != nil {
					errs <- fmt.Errorf("%q: %w", entries[i].path, err)
					cancel()
					return
				}
			}
		})
	}
feed:
	for i := range entries {
		if entries[i].kind != typeFile {
			continue
		}
		select {
		case indexes <- i:
		case <-ctx.Done():
			break feed
		}
	}
	close(indexes)
	workers.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return ctx.Err()
	}
}

func hashFile(ctx context.Context, root *os.File, e *entry, buf []byte) (err error) {
	f, err := openBeneath(root, e.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_NOATIME)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if e.xattrs, err = xattrsOf(int(f.Fd())); err != nil {
		return err
	}
	h := sha256.New()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(buf)
		h.Write(buf[:n])
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	e.sum = h.Sum(nil)
	return nil
}
