package storage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// checkImage compares an image's directory with its manifest, content
// excepted. It keeps no state, so that the supervisor, which calls it at each
// start, stays small.
func checkImage(dir, digest string) (err error) {
	return readImage(dir, digest, func(m *manifestReader, root *os.File) error {
		for {
			e, err := m.next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			if wrong := compareEntry(root, e); wrong != "" {
				return fmt.Errorf("%w: %q %s", ErrCorrupt, "/"+e.path, wrong)
			}
		}
	})
}

// readImage opens manifest and root, lets each read them, and says ErrCorrupt
// when the manifest isn't the digest's, whatever else was found wrong.
func readImage(dir, digest string, each func(*manifestReader, *os.File) error) (err error) {
	root, err := openDir(filepath.Join(dir, rootfsDir))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: its root file system is gone", ErrCorrupt)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	text, err := os.OpenFile(filepath.Join(dir, manifestFile), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: its manifest is gone", ErrCorrupt)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, text.Close()) }()

	h := sha256.New()
	tee := io.TeeReader(text, h)
	found := each(newManifestReader(tee), root)
	if _, err := io.Copy(io.Discard, tee); err != nil {
		return err
	}
	if formatDigest(h.Sum(nil)) != digest {
		return fmt.Errorf("%w: its manifest was changed", ErrCorrupt)
	}
	return found
}

// compareEntry says what of an entry differs, or "".
func compareEntry(root *os.File, e *entry) string {
	path := e.path
	if path == "" {
		path = "."
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(root.Fd()), path, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			return "is gone"
		}
		return "cannot be looked at: " + err.Error()
	}
	kind := typeOfMode(st.Mode)
	want := e.kind
	if want == typeHardLink {
		var other unix.Stat_t
		if err := unix.Fstatat(int(root.Fd()), e.link, &other, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Sprintf("is a link to %q, which cannot be looked at: %v", "/"+e.link, err)
		}
		if other.Ino != st.Ino || other.Dev != st.Dev {
			return fmt.Sprintf("is no longer the same file as %q", "/"+e.link)
		}
		want = kind // that of the other name was compared
	}
	switch {
	case kind != want:
		return "has another type"
	case st.Mode&0o7777 != e.mode:
		return fmt.Sprintf("has mode %04o instead of %04o", st.Mode&0o7777, e.mode)
	case st.Uid != e.uid || st.Gid != e.gid:
		return fmt.Sprintf("belongs to %d:%d instead of %d:%d", st.Uid, st.Gid, e.uid, e.gid)
	case (kind == typeFile || kind == typeSymlink) && st.Size != e.size:
		return fmt.Sprintf("has %d bytes instead of %d", st.Size, e.size)
	case st.Mtim.Sec != e.sec || st.Mtim.Nsec != e.nsec:
		return "was modified"
	}
	if len(e.xattrs) == 0 {
		return ""
	}
	f, err := openBeneath(root, e.path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_NOATIME)
	if err != nil {
		return "cannot be opened: " + err.Error()
	}
	xattrs, err := xattrsOf(int(f.Fd()))
	if err := errors.Join(err, f.Close()); err != nil {
		return err.Error()
	}
	if !slices.Equal(xattrs, e.xattrs) {
		return "has other extended attributes"
	}
	return ""
}

func typeOfMode(mode uint32) entryType {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return typeDir
	case unix.S_IFREG:
		return typeFile
	case unix.S_IFLNK:
		return typeSymlink
	case unix.S_IFIFO:
		return typeFIFO
	}
	return 0
}

// verifyImage describes the tree anew and compares that with the manifest,
// line by line.
func verifyImage(ctx context.Context, dir, digest string) error {
	return readImage(dir, digest, func(m *manifestReader, root *os.File) error {
		entries, err := scanTree(ctx, root)
		if err != nil {
			return err
		}
		var have, want []byte
		for i := 0; ; i++ {
			e, err := m.next()
			switch {
			case err == io.EOF && i == len(entries):
				return nil
			case err == io.EOF:
				return fmt.Errorf("%w: %q was added", ErrCorrupt, "/"+entries[i].path)
			case err != nil:
				return err
			case i == len(entries):
				return fmt.Errorf("%w: %q is gone", ErrCorrupt, "/"+e.path)
			}
			have, want = entries[i].appendLine(have[:0]), e.appendLine(want[:0])
			if bytes.Equal(have, want) {
				continue
			}
			if c := comparePaths(entries[i].path, e.path); c < 0 {
				return fmt.Errorf("%w: %q was added", ErrCorrupt, "/"+entries[i].path)
			}
			if wrong := compareEntry(root, e); wrong != "" {
				return fmt.Errorf("%w: %q %s", ErrCorrupt, "/"+e.path, wrong)
			}
			return fmt.Errorf("%w: %q has other content", ErrCorrupt, "/"+e.path)
		}
	})
}
