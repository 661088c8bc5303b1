package storage

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/internal/durable"
)

// The bounds of an import where the caller sets none: generous for a root
// file system (the largest desktop systems have half a million entries), and
// small enough that a hostile archive can't take a server down.
const (
	defaultMaxFiles = 2_000_000
	defaultMaxBytes = 64 << 30
)

// ImportOptions are the choices of an import; the zero value is good.
type ImportOptions struct {
	Expect   string           // the digest ("sha256:HEX") that must come out, else ErrDigest and nothing is kept; "" for any
	Progress func(done int64) // called as content is written, with the bytes so far
	Note     func(string)     // called with what was left out: device nodes, sockets, mount points, attributes of the host
	MaxFiles int              // entries at most; 0: 2 million
	MaxBytes int64            // bytes of content at most; 0: 64 GiB
}

// ImportDir makes an image of a directory of the host and names it; name may
// be "". Owners, modes, modification times, hard links, holes, extended
// attributes and FIFOs are kept; device nodes and sockets aren't. Content
// that the store has already isn't written again. Errors: ErrNotRoot,
// ErrNoSpace, ErrBadArchive, ErrDigest; after any of them the store is as before.
func (s *Store) ImportDir(ctx context.Context, dir, name string, o ImportOptions) (image *Image, err error) {
	source, err := openDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot import the directory %q: %w", dir, err)
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	fill := func(u *unpacker) error { return unpackDir(ctx, source, u) }
	need := func() (int64, error) { return sizeOfDir(ctx, source) }
	return s.importTree(ctx, dir, name, o, fill, need)
}

// ImportTar makes an image of a tar archive, plain or compressed by gzip,
// zstd or xz (told by its first bytes), and names it; name may be "". It
// keeps what ImportDir keeps (extended attributes from PAX records) and gives
// the same errors. An archive that tries to write outside of its root, through
// a symbolic link, or beyond the bounds is refused.
func (s *Store) ImportTar(ctx context.Context, r io.Reader, name string, o ImportOptions) (*Image, error) {
	fill := func(u *unpacker) error { return unpackTar(ctx, r, u) }
	what := "archive"
	if f, ok := r.(*os.File); ok {
		what = f.Name()
	}
	return s.importTree(ctx, what, name, o, fill, nil)
}

// importTree unpacks into a temporary directory, describes what is there, and
// moves it to its place.
func (s *Store) importTree(ctx context.Context, what, name string, o ImportOptions, fill func(*unpacker) error, need func() (int64, error)) (image *Image, err error) {
	fail := func(err error) (*Image, error) {
		label := what
		if name != "" {
			label = fmt.Sprintf("%s as %q", what, name)
		}
		return nil, fmt.Errorf("cannot import %s: %w", label, err)
	}
	if name != "" {
		if err := ValidName(name); err != nil {
			return fail(err)
		}
	}
	if o.Expect != "" {
		if err := ValidDigest(o.Expect); err != nil {
			return fail(err)
		}
	}
	if err := s.prepare(); err != nil {
		return fail(err)
	}
	half, err := s.newHalf("import-")
	if err != nil {
		return fail(err)
	}
	defer func() {
		if derr := half.discard(); derr != nil {
			err = errors.Join(err, fmt.Errorf("cannot remove the half-made image %s: %w", half.path, derr))
		}
	}()
	u := newUnpacker(ctx, o)
	digest, err := unpackAndDescribe(half.path, u, fill)
	if err != nil {
		return fail(s.noSpace(err, u, need))
	}
	if o.Expect != "" && digest != o.Expect {
		return fail(fmt.Errorf("%w: its content is %s, and %s was expected; nothing is imported", ErrDigest, digest, o.Expect))
	}
	if err := s.publish(half, digest, name); err != nil {
		return fail(s.noSpace(err, u, need))
	}
	return s.Open(digest)
}

// unpackAndDescribe fills a temporary directory with a whole image.
func unpackAndDescribe(dir string, u *unpacker, fill func(*unpacker) error) (digest string, err error) {
	path := filepath.Join(dir, rootfsDir)
	if err := os.Mkdir(path, 0o700); err != nil {
		return "", err
	}
	if u.root, err = openDir(path); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, u.close(), u.root.Close()) }()
	if err := fill(u); err != nil {
		return "", err
	}
	if err := u.finish(); err != nil {
		return "", err
	}
	return describe(u.ctx, dir, u.root)
}

// describe writes the manifest and metadata of a tree beside it, makes all of
// it durable, and returns the manifest's digest.
func describe(ctx context.Context, dir string, root *os.File) (string, error) {
	entries, err := scanTree(ctx, root)
	if err != nil {
		return "", err
	}
	m := metadata{Created: time.Now().UTC(), Files: len(entries)}
	for i := range entries {
		if entries[i].kind == typeFile {
			m.Size += entries[i].size
		}
		m.XAttrs = m.XAttrs || len(entries[i].xattrs) > 0
	}
	f, err := os.OpenFile(filepath.Join(dir, manifestFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	w := bufio.NewWriterSize(f, 256<<10)
	err = writeManifest(io.MultiWriter(w, h), entries)
	if ferr := w.Flush(); err == nil {
		err = ferr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", err
	}
	if err := m.write(filepath.Join(dir, metadataFile)); err != nil {
		return "", err
	}
	// One call for the file system instead of one for each of 40,000 files.
	if err := unix.Syncfs(int(root.Fd())); err != nil {
		return "", fmt.Errorf("cannot write it to the disk: %w", err)
	}
	return formatDigest(h.Sum(nil)), nil
}

// publish moves a whole image to its place, unless it is there, and names it.
func (s *Store) publish(half *half, digest, name string) (err error) {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	place := s.imageDir(digest)
	if _, lerr := os.Lstat(place); lerr == nil {
		if _, err := s.Open(digest); err != nil {
			return err
		}
	} else if err := durable.Rename(half.path, place); err != nil {
		return err
	}
	if name == "" {
		return nil
	}
	return s.setName(name, digest)
}

// noSpace tells of a full file system in a person's words.
func (s *Store) noSpace(err error, u *unpacker, need func() (int64, error)) error {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	var st unix.Statfs_t
	free := "unknown"
	if serr := unix.Statfs(s.Dir, &st); serr == nil {
		free = humanize.IBytes(st.Bavail * uint64(st.Bsize))
	}
	needed := "more than that is needed"
	if need != nil {
		if total, nerr := need(); nerr == nil {
			needed = humanize.IBytes(uint64(total)) + " are needed"
		}
	}
	written := int64(0)
	if u != nil {
		written = u.bytes
	}
	return fmt.Errorf("%w in %s: %s were written, %s are free now, %s; free some (`clawvm gc`, `clawvm image rm`) or move the store (%w)",
		ErrNoSpace, s.Dir, humanize.IBytes(uint64(written)), free, needed, err)
}
