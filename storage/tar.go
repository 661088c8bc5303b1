package storage

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sort"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// xattrRecord is what GNU tar, bsdtar and mmdebstrap begin the PAX records of
// extended attributes with.
const xattrRecord = "SCHILY.xattr."

// maxZstdWindow is what `zstd --long=27` uses; larger windows would let an
// archive decide how much memory the import takes.
const maxZstdWindow = 128 << 20

// decompress recognises gzip, zstd and xz by their first bytes; anything else
// is taken for a plain tar. The caller calls the returned function at the end.
func decompress(r io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(r, 128<<10)
	magic, err := b.Peek(6)
	if err != nil && err != io.EOF {
		return nil, nil, fmt.Errorf("cannot read the archive: %w", err)
	}
	none := func() {}
	switch {
	case len(magic) == 0:
		return nil, nil, fmt.Errorf("%w: the archive is empty", ErrBadArchive)
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: gzip: %w", ErrBadArchive, err)
		}
		return z, none, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: zstd: %w", ErrBadArchive, err)
		}
		return z, z.Close, nil
	case bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		z, err := xz.NewReader(b)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: xz: %w", ErrBadArchive, err)
		}
		return z, none, nil
	case bytes.HasPrefix(magic, []byte("BZh")):
		return nil, nil, fmt.Errorf("%w: the archive is compressed by bzip2; use gzip, zstd, xz or nothing", ErrBadArchive)
	}
	return b, none, nil
}

// ending remembers the last bytes that went by. A tar ends with zeros; one
// that was cut off between two entries is otherwise not told from a whole one.
type ending struct {
	r    io.Reader
	last [512]byte
	n    int64
}

func (e *ending) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.n += int64(n)
	if n >= len(e.last) {
		copy(e.last[:], p[n-len(e.last):n])
	} else if n > 0 {
		copy(e.last[:], e.last[n:])
		copy(e.last[len(e.last)-n:], p[:n])
	}
	return n, err
}

// unpackTar feeds an archive to an unpacker.
func unpackTar(ctx context.Context, r io.Reader, u *unpacker) error {
	plain, done, err := decompress(r)
	if err != nil {
		return err
	}
	defer done()
	end := &ending{r: &contextReader{ctx, plain}}
	t := tar.NewReader(end)
	entries := 0
	for {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return archiveError(ctx, err)
		}
		entries++
		if err := unpackEntry(u, t, h); err != nil {
			return archiveError(ctx, err)
		}
	}
	if end.last != [512]byte{} || end.n < 1024 {
		return fmt.Errorf("%w: the archive is no tar or was cut off", ErrBadArchive)
	}
	if entries == 0 {
		return fmt.Errorf("%w: the archive has no entries", ErrBadArchive)
	}
	// To the end, for the checksum of the compression.
	if _, err := io.Copy(io.Discard, end); err != nil {
		return archiveError(ctx, err)
	}
	return nil
}

// contextReader ends a long read of an archive when the context does.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// archiveError says that an archive is bad, unless the error already says
// what is wrong or comes from the system.
func archiveError(ctx context.Context, err error) error {
	var errno unix.Errno
	if ctx.Err() != nil || errors.Is(err, ErrBadArchive) || errors.As(err, &errno) {
		return err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: the archive was cut off, or is no tar", ErrBadArchive)
	}
	if errors.Is(err, tar.ErrHeader) {
		return fmt.Errorf("%w: the archive is no tar, or was damaged", ErrBadArchive)
	}
	return fmt.Errorf("%w: %w", ErrBadArchive, err)
}

// tarPath makes an archive's name relative and clean; "" is the root.
func tarPath(name string) (string, error) {
	if strings.HasPrefix(name, "/") {
		return "", fmt.Errorf("%w: %.80q is absolute", ErrBadArchive, name)
	}
	parts := strings.Split(name, "/")
	kept := parts[:0]
	for _, p := range parts {
		switch p {
		case "", ".":
		case "..":
			return "", fmt.Errorf("%w: %.80q leads out of the archive", ErrBadArchive, name)
		default:
			kept = append(kept, p)
		}
	}
	return strings.Join(kept, "/"), nil
}

func unpackEntry(u *unpacker, t *tar.Reader, h *tar.Header) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p, err := tarPath(h.Name)
	if err != nil {
		return err
	}
	if p == "" && h.Typeflag != tar.TypeDir {
		return fmt.Errorf("%w: the root isn't a directory", ErrBadArchive)
	}
	m, err := tarMeta(h)
	if err != nil {
		return fmt.Errorf("%.80q: %w", h.Name, err)
	}
	for name := range h.PAXRecords {
		if x, ok := strings.CutPrefix(name, xattrRecord); ok && !keptXAttr(x) {
			u.note(fmt.Sprintf("%s: its attribute %.80q isn't kept", p, x))
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return u.dir(p, m)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return u.file(p, m, h.Size, func(f *os.File) error {
			if err := u.copySparse(f, t, 0, h.Size); err != nil {
				return err
			}
			return f.Truncate(h.Size) // it may end in a hole
		})
	case tar.TypeSymlink:
		return u.symlink(p, h.Linkname, m)
	case tar.TypeLink:
		target, err := tarPath(h.Linkname)
		if err != nil {
			return err
		}
		return u.hardLink(p, target)
	case tar.TypeFifo:
		return u.fifo(p, m)
	case tar.TypeChar, tar.TypeBlock:
		u.note(fmt.Sprintf("%s: device nodes aren't kept", p))
		return nil
	}
	return fmt.Errorf("%w: %.80q has the unknown type %q", ErrBadArchive, h.Name, h.Typeflag)
}

// tarMeta reads and checks what an entry has beside its content.
func tarMeta(h *tar.Header) (meta, error) {
	m := meta{mode: uint32(h.Mode) & 0o7777}
	// The largest number stands for "no change" in chown(2).
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= math.MaxUint32 || int64(h.Gid) >= math.MaxUint32 {
		return m, fmt.Errorf("%w: its owner %d:%d isn't possible", ErrBadArchive, h.Uid, h.Gid)
	}
	m.uid, m.gid = uint32(h.Uid), uint32(h.Gid)
	m.mtime = unix.Timespec{Sec: h.ModTime.Unix(), Nsec: int64(h.ModTime.Nanosecond())}
	total := 0
	for name, value := range h.PAXRecords {
		x, ok := strings.CutPrefix(name, xattrRecord)
		if !ok || !keptXAttr(x) {
			continue
		}
		total += len(x) + len(value)
		m.xattrs = append(m.xattrs, xattr{x, value})
	}
	if total > maxXAttrs {
		return m, fmt.Errorf("%w: it has %d bytes of extended attributes, more than %d", ErrBadArchive, total, maxXAttrs)
	}
	sort.Slice(m.xattrs, func(i, j int) bool { return m.xattrs[i].name < m.xattrs[j].name })
	return m, nil
}
