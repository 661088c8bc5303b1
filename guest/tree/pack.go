package tree

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// PackOptions say how to pack.
type PackOptions struct {
	Follow bool        // when the source itself is a symbolic link, pack what it leads to
	Warn   func(error) // is told of what can't be read and is left out; may be nil
	Count  *Count      // counts what was packed; may be nil
}

// Pack writes source as a tar stream whose entries are named by TopName(source) or beneath it. It keeps modes, owners, times to the
// nanosecond and symbolic links. Devices, sockets and pipes, and what is in /proc and /sys, are left out. An error means that the
// stream is not complete; what could not be read is no error but a warning.
func Pack(w io.Writer, source string, o PackOptions) error {
	p := &packer{tar: tar.NewWriter(w), o: o, buf: make([]byte, copyBuffer)}
	flags := unix.AT_SYMLINK_NOFOLLOW
	if o.Follow {
		flags = 0
	}
	var st unix.Stat_t
	if err := unix.Fstatat(unix.AT_FDCWD, source, &st, flags); err != nil {
		return fmt.Errorf("cannot read %s: %w", printable(source), cause(err))
	}
	top := TopName(source)
	if top == contents && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("cannot read %s: it is not a directory", printable(source))
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR, unix.S_IFREG, unix.S_IFLNK:
	default:
		return fmt.Errorf("cannot copy %s: it is neither a file nor a directory", printable(source))
	}
	p.follow = o.Follow
	if err := p.entry(unix.AT_FDCWD, source, top, &st, 0); err != nil {
		return err
	}
	if p.skipped != nil { // the source itself: there is nothing to send
		return p.skipped
	}
	return p.tar.Close()
}

// copyBuffer is how much of a file is read and written at once.
const copyBuffer = 32 << 10

type packer struct {
	tar     *tar.Writer
	o       PackOptions
	buf     []byte
	follow  bool  // the top is opened through links
	packed  bool  // something is in the stream
	skipped error // the top could not be read
}

// skip leaves an entry out.
func (p *packer) skip(name string, err error) error {
	err = fmt.Errorf("cannot read %s: %w", printable(name), cause(err))
	if !p.packed {
		p.skipped = err
	} else if p.o.Warn != nil {
		p.o.Warn(err)
	}
	return nil
}

// entry packs what at names in the directory dir, under name.
func (p *packer) entry(dir int, at, name string, st *unix.Stat_t, depth int) error {
	h := &tar.Header{
		Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()), Format: tar.FormatPAX,
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return p.directory(dir, at, h, st, depth)
	case unix.S_IFREG:
		return p.file(dir, at, h)
	case unix.S_IFLNK:
		buf := make([]byte, maxPath+1)
		n, err := unix.Readlinkat(dir, at, buf)
		if err != nil {
			return p.skip(name, err)
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, string(buf[:n])
		return p.header(h)
	}
	return p.skip(name, errors.New("it is neither a file nor a directory nor a link, and is left out"))
}

func (p *packer) header(h *tar.Header) error {
	if err := p.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("cannot send %s: %w", printable(h.Name), err)
	}
	p.packed = true
	p.o.Count.entry()
	return nil
}

// openFlags are those of a file in a directory: the top may be reached through links, nothing beneath it.
func (p *packer) openFlags() int {
	if p.follow && !p.packed {
		return unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK
	}
	return unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOFOLLOW
}

func (p *packer) file(dir int, at string, h *tar.Header) error {
	fd, err := unix.Openat(dir, at, p.openFlags(), 0)
	if err != nil {
		return p.skip(h.Name, err)
	}
	f := os.NewFile(uintptr(fd), h.Name)
	defer f.Close()
	// As it is now: between the look and the opening it may have changed.
	info, err := f.Stat()
	if err != nil {
		return p.skip(h.Name, err)
	}
	if !info.Mode().IsRegular() {
		return p.skip(h.Name, errors.New("it is no file any more"))
	}
	h.Typeflag, h.Size = tar.TypeReg, info.Size()
	if err := p.header(h); err != nil {
		return err
	}
	left := h.Size
	for left > 0 {
		n, err := f.Read(p.buf[:min(int64(len(p.buf)), left)])
		if n > 0 {
			if _, err := p.tar.Write(p.buf[:n]); err != nil {
				return fmt.Errorf("cannot send %s: %w", printable(h.Name), err)
			}
			left -= int64(n)
			if _, err := p.o.Count.Write(p.buf[:n]); err != nil {
				return err
			}
		}
		if err == nil {
			continue
		}
		// Its length is said already: what is missing is sent as zeros.
		if err == io.EOF {
			err = errors.New("it became shorter while it was read")
		}
		if p.o.Warn != nil {
			p.o.Warn(fmt.Errorf("cannot read all of %s: %w; its last %d bytes are zeros in the copy", printable(h.Name), cause(err), left))
		}
		return p.zeros(h.Name, left)
	}
	return nil
}

func (p *packer) zeros(name string, n int64) error {
	clear(p.buf)
	for n > 0 {
		m := min(int64(len(p.buf)), n)
		if _, err := p.tar.Write(p.buf[:m]); err != nil {
			return fmt.Errorf("cannot send %s: %w", printable(name), err)
		}
		n -= m
	}
	return nil
}

func (p *packer) directory(dir int, at string, h *tar.Header, st *unix.Stat_t, depth int) error {
	if depth >= maxDepth {
		return p.skip(h.Name, fmt.Errorf("more than %d directories in one another", maxDepth))
	}
	fd, err := unix.Openat(dir, at, p.openFlags()|unix.O_DIRECTORY, 0)
	if err != nil {
		return p.skip(h.Name, err)
	}
	f := os.NewFile(uintptr(fd), h.Name)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return p.skip(h.Name, err)
	}
	h.Typeflag = tar.TypeDir
	h.Name += "/"
	if err := p.header(h); err != nil {
		return err
	}
	if pseudo(fd) {
		return p.skip(h.Name, errors.New("it is the kernel's and no disk's, and its contents are left out"))
	}
	slices.Sort(names)
	for _, n := range names {
		var st unix.Stat_t
		err := unix.Fstatat(fd, n, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue // removed meanwhile
		}
		if err == nil {
			err = p.entry(fd, n, h.Name+n, &st, depth+1)
		} else {
			err = p.skip(h.Name+n, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// pseudoSystems are file systems whose files are made up when they are read.
var pseudoSystems = []int64{
	unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEVPTS_SUPER_MAGIC,
	unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC, unix.PSTOREFS_MAGIC,
}

func pseudo(fd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && slices.Contains(pseudoSystems, int64(st.Type))
}
