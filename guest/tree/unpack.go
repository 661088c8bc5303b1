package tree

import (
	"archive/tar"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// UnpackOptions say how to unpack.
type UnpackOptions struct {
	// Name is the name that the stream's entries have or are beneath: TopName of what was packed. "" takes a tar stream of anyone's
	// making, whose entries go into the destination under their own names.
	Name string
	// Owners gives each entry to the owner that the stream names; else they belong to who unpacks.
	Owners bool
	// Special keeps setuid, setgid and sticky bits.
	Special bool
	// Hostile is for a stream that comes from a guest: no hard links and no sparse files, which only a forged stream has, and the
	// disk is never filled further than to its reserve.
	Hostile bool
	Count   *Count // counts what was unpacked; may be nil
}

// A hostile stream leaves so much of a disk free: the smaller of a part of its size and a number of bytes, which keep a host's
// programs writing until someone looks.
const (
	reservePart  = 20
	reserveBytes = 1 << 30
)

// maxRest bounds what may follow a stream's end, in bytes: tar programs fill up their last block, of 10 KiB by default.
const maxRest = 1 << 20

// Unpack makes files of a tar stream: in destination when that is a directory, else in its place, as cp does. Nothing outside of it is
// written, whatever the stream says: names are taken apart, and each directory is opened in the one above it, never through a
// symbolic link. A file appears under its name when it is complete, in the place of a file or link that was there; directories that
// were there stay as they are. Devices, pipes and sockets are refused. After an error what was complete is left.
func Unpack(r io.Reader, destination string, o UnpackOptions) (err error) {
	u := &unpacker{tar: tar.NewReader(r), o: o, buf: make([]byte, copyBuffer)}
	defer func() { err = errors.Join(err, u.leave(0)) }()
	for {
		h, err := u.tar.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return u.broken(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader && !o.Hostile {
			continue // a comment, as git archive makes it
		}
		if err := u.entry(destination, h); err != nil {
			return err
		}
	}
	if u.entries == 0 {
		return errors.New("there is nothing in the stream")
	}
	n, err := io.Copy(io.Discard, io.LimitReader(r, maxRest+1))
	if err == nil && n > maxRest {
		err = errors.New("something follows its end")
	}
	if err != nil {
		return u.broken(err)
	}
	return nil
}

// broken is an error of the stream itself.
func (u *unpacker) broken(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = errors.New("it ends in the middle")
	}
	return fmt.Errorf("cannot read the stream after %d entries: %w", u.entries, err)
}

type unpacker struct {
	tar     *tar.Reader
	o       UnpackOptions
	buf     []byte
	as      string // what stands for Name in the destination
	stack   []held // the directory that everything is beneath, and the open ones beneath it
	entries int
}

// held is an open directory.
type held struct {
	name string
	fd   int
	made bool        // by the stream, so that its mode and time are set when it is left
	meta *tar.Header // what they are; nil: made for what is in it
}

// entry makes one entry.
func (u *unpacker) entry(destination string, h *tar.Header) error {
	parts, err := u.locate(destination, h)
	if err == nil {
		err = u.make(parts, h)
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", printable(h.Name), cause(err))
	}
	u.entries++
	u.o.Count.entry()
	return nil
}

// locate takes an entry's name apart: the path beneath the destination. None: the destination itself.
func (u *unpacker) locate(destination string, h *tar.Header) ([]string, error) {
	parts, err := split(h.Name)
	if err != nil {
		return nil, err
	}
	isDir := h.Typeflag == tar.TypeDir
	if u.o.Name == "" {
		return parts, u.open(destination, "")
	}
	if u.o.Name != contents {
		if len(parts) == 0 || parts[0] != u.o.Name {
			return nil, fmt.Errorf("its name does not begin with %s, which was asked for", printable(u.o.Name))
		}
		parts = parts[1:]
	}
	if u.entries == 0 {
		if len(parts) > 0 || u.o.Name == contents && !isDir {
			return nil, errors.New("the stream does not begin with what was asked for")
		}
		dir, as, err := place(destination, u.o.Name, isDir)
		if err != nil {
			return nil, err
		}
		if err := u.open(dir, as); err != nil {
			return nil, err
		}
	} else if len(parts) == 0 {
		return nil, errors.New("it is in the stream twice")
	}
	if u.as != contents {
		parts = append([]string{u.as}, parts...)
	}
	return parts, nil
}

// open opens the directory that everything is beneath, once.
func (u *unpacker) open(dir, as string) error {
	if len(u.stack) > 0 {
		return nil
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("the directory %s: %w", printable(dir), cause(err))
	}
	u.as, u.stack = as, []held{{fd: fd}}
	return nil
}

// split takes a name apart and refuses what could lead elsewhere.
func split(name string) (parts []string, err error) {
	switch {
	case len(name) > maxPath:
		return nil, fmt.Errorf("its name has more than %d bytes", maxPath)
	case strings.ContainsRune(name, 0):
		return nil, errors.New("its name has a zero byte")
	case strings.HasPrefix(name, "/"):
		return nil, errors.New("its name is an absolute path")
	}
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
			continue
		case part == "..":
			return nil, errors.New("its name has .. in it")
		case len(part) > maxName:
			return nil, fmt.Errorf("a part of its name has more than %d bytes", maxName)
		}
		parts = append(parts, part)
	}
	if len(parts) > maxDepth {
		return nil, fmt.Errorf("more than %d directories in one another", maxDepth)
	}
	return parts, nil
}

// make makes an entry at a path.
func (u *unpacker) make(parts []string, h *tar.Header) error {
	if u.o.Hostile {
		if err := u.refuseForged(h); err != nil {
			return err
		}
	}
	if len(parts) == 0 {
		if h.Typeflag == tar.TypeDir {
			return nil // it is there, and stays as it is
		}
		return errors.New("it has no name")
	}
	name := parts[len(parts)-1]
	if err := u.enter(parts[:len(parts)-1]); err != nil {
		return err
	}
	if u.o.Hostile {
		if err := u.keepReserve(h.Size); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return u.directory(name, h)
	case tar.TypeReg:
		return u.file(name, h)
	case tar.TypeSymlink:
		return u.symlink(name, h)
	case tar.TypeLink:
		return u.link(name, h)
	case tar.TypeChar, tar.TypeBlock:
		return errors.New("it is a device, and none is made")
	case tar.TypeFifo:
		return errors.New("it is a pipe, and none is made")
	}
	return fmt.Errorf("it is of an unknown kind %q", h.Typeflag)
}

// refuseForged refuses what Pack never sends.
func (u *unpacker) refuseForged(h *tar.Header) error {
	if h.Typeflag == tar.TypeLink {
		return errors.New("it is a hard link, which the guest has no reason to send")
	}
	sparse := h.Typeflag == tar.TypeGNUSparse
	for key := range maps.Keys(h.PAXRecords) {
		sparse = sparse || strings.HasPrefix(key, "GNU.sparse.")
	}
	if sparse {
		return errors.New("it is a sparse file, which the guest has no reason to send")
	}
	return nil
}

// keepReserve refuses what would leave too little of the disk.
func (u *unpacker) keepReserve(size int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(u.top(), &st); err != nil {
		return err
	}
	block := uint64(st.Bsize)
	reserve, free := min(st.Blocks*block/reservePart, reserveBytes), st.Bavail*block
	if free < reserve || uint64(size) > free-reserve {
		return fmt.Errorf("it has %d bytes, and of the %d that are free on the disk %d are kept for the host", size, free, reserve)
	}
	if st.Files > 0 && st.Ffree < st.Files/reservePart {
		return fmt.Errorf("only %d more files fit on the disk, and they are kept for the host", st.Ffree)
	}
	return nil
}

func (u *unpacker) top() int { return u.stack[len(u.stack)-1].fd }

// enter makes the directory at a path the top of the stack: those that are not on the way are left, those that are missing made.
func (u *unpacker) enter(parts []string) error {
	same := 0
	for same < len(parts) && same+1 < len(u.stack) && u.stack[same+1].name == parts[same] {
		same++
	}
	if err := u.leave(same + 1); err != nil {
		return err
	}
	for _, name := range parts[same:] {
		if err := u.descend(name, nil); err != nil {
			return err
		}
	}
	return nil
}

// descend opens a directory in the top one, and makes it when it is missing.
func (u *unpacker) descend(name string, meta *tar.Header) error {
	made := true
	if err := unix.Mkdirat(u.top(), name, 0o700); errors.Is(err, unix.EEXIST) {
		made = false
	} else if err != nil {
		return err
	}
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(u.top(), name, &how)
	switch {
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		return fmt.Errorf("%s is there, and it is not a directory", printable(name))
	case err != nil:
		return err
	}
	u.stack = append(u.stack, held{name: name, fd: fd, made: made, meta: meta})
	return nil
}

// leave closes the directories above the first n of the stack, the innermost first: what is written in a directory changes its time,
// and its mode could forbid it.
func (u *unpacker) leave(n int) (err error) {
	for len(u.stack) > n {
		d := u.stack[len(u.stack)-1]
		u.stack = u.stack[:len(u.stack)-1]
		if d.made {
			err = errors.Join(err, u.finishDirectory(d))
		}
		err = errors.Join(err, unix.Close(d.fd))
	}
	return err
}

func (u *unpacker) finishDirectory(d held) error {
	fd := d.fd
	if d.meta == nil { // not in the stream
		return unix.Fchmod(fd, 0o755)
	}
	if u.o.Owners {
		if err := unix.Fchown(fd, d.meta.Uid, d.meta.Gid); err != nil {
			return fmt.Errorf("cannot give %s to its owner: %w", printable(d.meta.Name), err)
		}
	}
	if err := unix.Fchmod(fd, u.mode(d.meta)); err != nil {
		return err
	}
	return setTime(unix.AT_FDCWD, procFile(fd), 0, d.meta.ModTime)
}

// mode is an entry's mode as it is set.
func (u *unpacker) mode(h *tar.Header) uint32 {
	if u.o.Special {
		return uint32(h.Mode & 0o7777)
	}
	return uint32(h.Mode & 0o777)
}

// setTime sets the time of a change; one that no file system knows is left away.
func setTime(dir int, name string, flags int, t time.Time) error {
	if t.Before(time.Unix(0, 0)) || t.Year() > 2400 { // ext4's end is in 2446
		return nil
	}
	ts := unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{ts, ts}, flags)
}

func procFile(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

func (u *unpacker) directory(name string, h *tar.Header) error {
	// The next entry leaves it again, unless it is in it.
	return u.descend(name, h)
}

// replaceable looks at what stands where a file or link is to be.
func (u *unpacker) replaceable(name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(u.top(), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFLNK:
		return nil
	case unix.S_IFDIR:
		return errors.New("a directory is there")
	}
	return errors.New("a device, pipe or socket is there")
}

// file writes a file without a name, which is gone whatever ends this program, and gives it its name when it is complete. It works on
// bare descriptors: package os makes ten system calls more for each file, which many small ones would feel in an emulated guest.
func (u *unpacker) file(name string, h *tar.Header) error {
	dir, hidden := u.top(), ""
	fd, err := unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) {
		// A file system that knows no files without a name: NFS, FUSE.
		if err := u.replaceable(name); err != nil {
			return err
		}
		hidden = hiddenName()
		fd, err = unix.Openat(dir, hidden, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	}
	if err != nil {
		return err
	}
	err = u.fill(fd, h)
	if err == nil && hidden == "" {
		err = unix.Linkat(unix.AT_FDCWD, procFile(fd), dir, name, unix.AT_SYMLINK_FOLLOW)
		if errors.Is(err, unix.EEXIST) {
			if err = u.replaceable(name); err == nil {
				hidden = hiddenName()
				err = unix.Linkat(unix.AT_FDCWD, procFile(fd), dir, hidden, unix.AT_SYMLINK_FOLLOW)
			}
		}
	}
	return errors.Join(u.reveal(dir, hidden, name, err), unix.Close(fd))
}

// reveal gives what has a hidden name its own, or removes it when there was an error.
func (u *unpacker) reveal(dir int, hidden, name string, err error) error {
	if hidden == "" {
		return err
	}
	if err == nil {
		err = unix.Renameat(dir, hidden, dir, name)
	}
	if err != nil {
		if uerr := unix.Unlinkat(dir, hidden, 0); uerr != nil && !errors.Is(uerr, unix.ENOENT) {
			err = errors.Join(err, uerr)
		}
	}
	return err
}

// hiddenName is a name that nobody can guess.
func hiddenName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return ".clawvm-cp-" + hex.EncodeToString(b[:])
}

// fill writes a file's content and attributes.
func (u *unpacker) fill(fd int, h *tar.Header) error {
	// Not io.Copy, which would seek over the holes of a sparse file.
	for {
		n, err := u.tar.Read(u.buf)
		if n > 0 {
			if err := writeAll(fd, u.buf[:n]); err != nil {
				return err
			}
			if _, err := u.o.Count.Write(u.buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			break
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return errors.New("the stream ends in the middle of it")
		}
		if err != nil {
			return err
		}
	}
	if u.o.Owners {
		if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
			return fmt.Errorf("cannot give it to its owner: %w", err)
		}
	}
	if err := unix.Fchmod(fd, u.mode(h)); err != nil {
		return err
	}
	return setTime(unix.AT_FDCWD, procFile(fd), 0, h.ModTime)
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(fd, p)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		p = p[max(n, 0):]
	}
	return nil
}

func (u *unpacker) symlink(name string, h *tar.Header) error {
	if h.Linkname == "" || len(h.Linkname) > maxPath || strings.ContainsRune(h.Linkname, 0) {
		return errors.New("it is a link to a path that can't be")
	}
	if err := u.replaceable(name); err != nil {
		return err
	}
	dir, hidden, made := u.top(), "", name
	err := unix.Symlinkat(h.Linkname, dir, name)
	if errors.Is(err, unix.EEXIST) {
		hidden = hiddenName()
		made = hidden
		err = unix.Symlinkat(h.Linkname, dir, hidden)
	}
	if err == nil && u.o.Owners {
		err = unix.Fchownat(dir, made, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err == nil {
		err = setTime(dir, made, unix.AT_SYMLINK_NOFOLLOW, h.ModTime)
	}
	return u.reveal(dir, hidden, name, err)
}

// link makes a hard link to a file beneath the destination.
func (u *unpacker) link(name string, h *tar.Header) error {
	parts, err := split(h.Linkname)
	if err != nil || len(parts) == 0 {
		return errors.New("it is a hard link to a path that can't be")
	}
	if err := u.replaceable(name); err != nil {
		return err
	}
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(u.stack[0].fd, strings.Join(parts, "/"), &how)
	if err != nil {
		return fmt.Errorf("it is a hard link to %s: %w", printable(h.Linkname), cause(err))
	}
	f := os.NewFile(uintptr(fd), h.Linkname)
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return errors.Join(err, fmt.Errorf("it is a hard link to %s, which is no file", printable(h.Linkname)))
	}
	dir, hidden := u.top(), hiddenName()
	if err := unix.Linkat(unix.AT_FDCWD, procFile(fd), dir, hidden, unix.AT_SYMLINK_FOLLOW); err != nil {
		return err
	}
	err = u.reveal(dir, hidden, name, nil)
	if uerr := unix.Unlinkat(dir, hidden, 0); uerr != nil && !errors.Is(uerr, unix.ENOENT) {
		err = errors.Join(err, uerr) // rename does nothing when both names are the same file's
	}
	return err
}
