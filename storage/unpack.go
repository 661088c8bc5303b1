package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// meta is what an entry has beside its content.
type meta struct {
	mode     uint32
	uid, gid uint32
	mtime    unix.Timespec
	xattrs   []xattr
}

// unpacker writes a tree below a new directory, whatever the entries that it
// is given say: nothing is written through a symbolic link or outside of the
// directory, and no more than the bounds allow. An entry that comes twice
// replaces the earlier one, as tar does it.
type unpacker struct {
	ctx      context.Context
	root     *os.File // set by whoever makes the directory
	maxFiles int
	maxBytes int64
	progress func(int64)
	note     func(string)

	files      int
	bytes      int64
	dirs       map[string]meta // modes and times come last: what is put into a directory changes its time
	parent     *os.File        // of the last entry
	parentPath string
	buf        []byte
	zeros      []byte
}

// sparseBlock is the unit in which zeros become holes, the block size of the
// file systems that stores are on.
const sparseBlock = 4096

func newUnpacker(ctx context.Context, o ImportOptions) *unpacker {
	u := &unpacker{
		ctx: ctx, maxFiles: o.MaxFiles, maxBytes: o.MaxBytes, progress: o.Progress, note: o.Note,
		dirs:  map[string]meta{"": {mode: 0o755}},
		buf:   make([]byte, 256<<10),
		zeros: make([]byte, sparseBlock),
	}
	if u.maxFiles == 0 {
		u.maxFiles = defaultMaxFiles
	}
	if u.maxBytes == 0 {
		u.maxBytes = defaultMaxBytes
	}
	if u.progress == nil {
		u.progress = func(int64) {}
	}
	if u.note == nil {
		u.note = func(string) {}
	}
	return u
}

func (u *unpacker) close() error {
	if u.parent == nil {
		return nil
	}
	err := u.parent.Close()
	u.parent = nil
	return err
}

// begin checks an entry against the bounds and opens the directory that it
// goes into.
func (u *unpacker) begin(p string) (dir int, name string, err error) {
	if err := u.ctx.Err(); err != nil {
		return 0, "", err
	}
	if !validPath(p) {
		return 0, "", fmt.Errorf("%w: the path %.80q is too long or isn't below the root", ErrBadArchive, p)
	}
	if u.files++; u.files > u.maxFiles {
		return 0, "", fmt.Errorf("%w: it has more than %d entries", ErrBadArchive, u.maxFiles)
	}
	parent := parentOf(p)
	if u.parent == nil || parent != u.parentPath {
		if err := u.close(); err != nil {
			return 0, "", err
		}
		if u.parent, err = u.openParent(parent); err != nil {
			return 0, "", err
		}
		u.parentPath = parent
	}
	return int(u.parent.Fd()), path.Base(p), nil
}

// openParent opens a directory, making it and those above when an archive
// doesn't list them.
func (u *unpacker) openParent(dir string) (*os.File, error) {
	d, err := openBeneath(u.root, dir, unix.O_PATH|unix.O_DIRECTORY)
	switch {
	case err == nil:
		return d, nil
	case errors.Is(err, unix.ENOENT):
		above, err := u.openParent(parentOf(dir))
		if err != nil {
			return nil, err
		}
		if u.files++; u.files > u.maxFiles {
			err = fmt.Errorf("%w: it has more than %d entries", ErrBadArchive, u.maxFiles)
		} else {
			err = unix.Mkdirat(int(above.Fd()), path.Base(dir), 0o700)
		}
		if err := errors.Join(err, above.Close()); err != nil {
			return nil, fmt.Errorf("cannot make %q: %w", dir, err)
		}
		u.dirs[dir] = meta{mode: 0o755}
		return openBeneath(u.root, dir, unix.O_PATH|unix.O_DIRECTORY)
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%w: %q is or goes through a symbolic link, and something is to be put below it", ErrBadArchive, dir)
	case errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("%w: something is to be put below %q, which is no directory", ErrBadArchive, dir)
	}
	return nil, err
}

// create makes an entry by a call that fails when the name is taken, and
// replaces what has the name.
func (u *unpacker) create(p string, try func(dir int, name string) error) (dir int, name string, err error) {
	dir, name, err = u.begin(p)
	if err != nil {
		return 0, "", err
	}
	err = try(dir, name)
	if err == unix.EEXIST {
		if err = u.remove(dir, name, p); err == nil {
			err = try(dir, name)
		}
	}
	if err != nil {
		return 0, "", fmt.Errorf("cannot make %q: %w", p, err)
	}
	return dir, name, nil
}

func (u *unpacker) remove(dir int, name, p string) error {
	err := unix.Unlinkat(dir, name, 0)
	if err != unix.EISDIR {
		return err
	}
	err = unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
	if err == unix.ENOTEMPTY {
		return fmt.Errorf("%w: it comes twice, first as a directory that isn't empty", ErrBadArchive)
	}
	if err == nil {
		delete(u.dirs, p)
	}
	return err
}

func (u *unpacker) dir(p string, m meta) error {
	if p == "" {
		u.dirs[""] = m
		return nil
	}
	_, _, err := u.create(p, func(dir int, name string) error {
		err := unix.Mkdirat(dir, name, 0o700)
		if err != unix.EEXIST {
			return err
		}
		var st unix.Stat_t
		if serr := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); serr != nil {
			return serr
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return nil
		}
		return err
	})
	if err == nil {
		u.dirs[p] = m
	}
	return err
}

// file writes a regular file of the given size, with write filling it.
func (u *unpacker) file(p string, m meta, size int64, write func(*os.File) error) (err error) {
	if size < 0 || size > u.maxBytes-u.bytes {
		return fmt.Errorf("%w: with %q it has more than %d bytes", ErrBadArchive, p, u.maxBytes)
	}
	var f *os.File
	_, _, err = u.create(p, func(dir int, name string) error {
		fd, err := unix.Openat(dir, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err == nil {
			f = os.NewFile(uintptr(fd), p)
		}
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		// Some file systems tell of a lack of space only now.
		if cerr := f.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("cannot write %q: %w", p, cerr)
		}
	}()
	if err := write(f); err != nil {
		return fmt.Errorf("cannot write %q: %w", p, err)
	}
	if err := setMeta(int(f.Fd()), m); err != nil {
		return fmt.Errorf("%q: %w", p, err)
	}
	u.progress(u.bytes)
	return nil
}

// setMeta applies what a file or directory has beside its content. The order
// matters: a change of owner clears setuid bits and capabilities.
func setMeta(fd int, m meta) error {
	if err := unix.Fchown(fd, int(m.uid), int(m.gid)); err != nil {
		return fmt.Errorf("cannot set its owner to %d:%d: %w", m.uid, m.gid, err)
	}
	for _, x := range m.xattrs {
		if err := unix.Fsetxattr(fd, x.name, []byte(x.value), 0); err != nil {
			return fmt.Errorf("cannot set its attribute %s (does the store's file system have extended attributes?): %w", x.name, err)
		}
	}
	if err := unix.Fchmod(fd, m.mode); err != nil {
		return fmt.Errorf("cannot set its mode to %04o: %w", m.mode, err)
	}
	if err := unix.UtimesNanoAt(fd, "", bothTimes(m.mtime), unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("cannot set its modification time: %w", err)
	}
	return nil
}

func bothTimes(t unix.Timespec) []unix.Timespec { return []unix.Timespec{t, t} }

func (u *unpacker) symlink(p, target string, m meta) error {
	if target == "" || len(target) > maxPath || strings.IndexByte(target, 0) >= 0 {
		return fmt.Errorf("%w: the symbolic link %q has an empty or too long target", ErrBadArchive, p)
	}
	dir, name, err := u.create(p, func(dir int, name string) error { return unix.Symlinkat(target, dir, name) })
	if err != nil {
		return err
	}
	return u.setMetaAt(dir, name, p, m)
}

func (u *unpacker) fifo(p string, m meta) error {
	dir, name, err := u.create(p, func(dir int, name string) error { return unix.Mknodat(dir, name, unix.S_IFIFO|0o600, 0) })
	if err != nil {
		return err
	}
	if err := u.setMetaAt(dir, name, p, m); err != nil {
		return err
	}
	// Fchmodat follows symbolic links, but what has the name was just made.
	if err := unix.Fchmodat(dir, name, m.mode, 0); err != nil {
		return fmt.Errorf("cannot set the mode of %q: %w", p, err)
	}
	return nil
}

// setMetaAt sets owner and time of what has no content.
func (u *unpacker) setMetaAt(dir int, name, p string, m meta) error {
	if err := unix.Fchownat(dir, name, int(m.uid), int(m.gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("cannot set the owner of %q: %w", p, err)
	}
	if err := unix.UtimesNanoAt(dir, name, bothTimes(m.mtime), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("cannot set the modification time of %q: %w", p, err)
	}
	return nil
}

// hardLink gives an earlier entry a further name.
func (u *unpacker) hardLink(p, target string) error {
	if !validPath(target) {
		return fmt.Errorf("%w: the hard link %q leads to %.80q, which isn't below the root", ErrBadArchive, p, target)
	}
	if p == target {
		return fmt.Errorf("%w: %q is a hard link to itself", ErrBadArchive, p)
	}
	from, err := openBeneath(u.root, parentOf(target), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("%w: the hard link %q leads to %q, which isn't there: %w", ErrBadArchive, p, target, err)
	}
	_, _, err = u.create(p, func(dir int, name string) error {
		return unix.Linkat(int(from.Fd()), path.Base(target), dir, name, 0)
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w: the hard link %q leads to %q, which isn't there or is a directory", ErrBadArchive, p, target)
	}
	return errors.Join(err, from.Close())
}

// copySparse writes size bytes from r at the file's offset, leaving out
// blocks of zeros.
func (u *unpacker) copySparse(f *os.File, r io.Reader, at, size int64) error {
	for left := size; left > 0; {
		if err := u.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, u.buf[:min(int64(len(u.buf)), left)])
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("cannot read its content: %w", err)
		}
		if err := u.writeData(f, u.buf[:n], at); err != nil {
			return err
		}
		at += int64(n)
		left -= int64(n)
		u.bytes += int64(n)
		u.progress(u.bytes)
	}
	return nil
}

// writeData writes the runs of a chunk that aren't zeros.
func (u *unpacker) writeData(f *os.File, data []byte, at int64) error {
	start := 0 // of the run that isn't written yet
	flush := func(end int) error {
		if start == end {
			return nil
		}
		_, err := f.WriteAt(data[start:end], at+int64(start))
		return err
	}
	for i := 0; i < len(data); i += sparseBlock {
		end := min(i+sparseBlock, len(data))
		if !bytes.Equal(data[i:end], u.zeros[:end-i]) {
			continue
		}
		if err := flush(i); err != nil {
			return err
		}
		start = end
	}
	return flush(len(data))
}

// finish sets what directories have beside their content.
func (u *unpacker) finish() error {
	if err := u.close(); err != nil {
		return err
	}
	for p, m := range u.dirs {
		d, err := openBeneath(u.root, p, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		err = setMeta(int(d.Fd()), m)
		if err := errors.Join(err, d.Close()); err != nil {
			return fmt.Errorf("%q: %w", "/"+p, err)
		}
	}
	return nil
}
