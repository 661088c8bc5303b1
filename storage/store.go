// Package storage keeps what a microVM reads and writes on the host: the
// content-addressed store of read-only images, the ext4 disks of overlays and
// volumes, the RAM file systems of secrets, and the virtiofsd processes that
// share directories with a guest.
//
// Nothing here parses what a guest wrote with root's rights: a disk is looked
// at by e2fsck under the VM's own uid, and a share is served by a sandboxed
// virtiofsd. Images, by contrast, are written by this package alone.
package storage

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/internal/durable"
)

var (
	// ErrNoImage means that no image of the store has the name or digest.
	ErrNoImage = errors.New("no such image")
	// ErrCorrupt means that an image isn't what its manifest says.
	ErrCorrupt = errors.New("it is corrupt")
	// ErrInUse means that a VM still uses what was to be removed.
	ErrInUse = errors.New("image is in use")
	// ErrNoSpace means that the store's file system is full.
	ErrNoSpace = errors.New("no space left")
	// ErrNotRoot means that the work needs root: an image holds files of
	// many owners, setuid files and capabilities.
	ErrNotRoot = errors.New("root is needed")
	// ErrDigest means that what was imported isn't what was expected.
	ErrDigest = errors.New("digest mismatch")
	// ErrBadArchive means that an archive or directory can't become an
	// image: malformed, hostile, or beyond the bounds.
	ErrBadArchive = errors.New("it can't be an image")
)

// Names below a store's directory.
const (
	imagesDir    = "images"   // sha256-HEX/
	namesDir     = "names"    // NAME -> ../images/sha256-HEX
	tmpDir       = "tmp"      // half-made and half-removed images
	lockFile     = "lock"     // held while names/, images/ or tmp/ change
	manifestFile = "manifest" // in an image's directory
	rootfsDir    = "rootfs"   // in an image's directory
	metadataFile = "image.json"
)

// Digests are written "sha256:HEX" for people and "sha256-HEX" on disk, where
// a colon would get into the way of PATH-like lists and of Nix.
const (
	digestPrefix = "sha256:"
	dirPrefix    = "sha256-"
)

var (
	digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	namePattern   = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
)

// Store is a directory of images. The directory is made when something is
// first imported; it is root's and 0700, because images hold setuid files.
// All methods may be used by several processes at once.
type Store struct {
	Dir string
}

// Image is one image of a store.
type Image struct {
	Digest  string    // "sha256:HEX", of the manifest
	Names   []string  // sorted; empty when nothing names the image
	Root    string    // the root file system's directory; never to be written to
	Size    int64     // bytes of file content, hard links counted once
	Files   int       // entries, directories included
	Created time.Time // when this store got it
	XAttrs  bool      // some entry has extended attributes, so a share of it should offer them
}

// ValidName says whether a name may be given to an image.
func ValidName(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("%q is no name for an image: want 1 to 64 of a-z, 0-9, '.', '_' and '-', a letter or digit first", name)
	}
	return nil
}

// Open finds an image by name or by "sha256:HEX", and checks it: its manifest
// must hash to the digest, and type, mode, owner, size, modification time and
// extended attributes of every entry must be what the manifest says. File
// content isn't read; Verify does that. Errors are ErrNoImage and ErrCorrupt,
// which name what to do.
func (s *Store) Open(ref string) (*Image, error) {
	image, err := s.find(ref)
	if err != nil {
		return nil, err
	}
	if err := checkImage(filepath.Dir(image.Root), image.Digest); err != nil {
		return nil, s.corrupt(ref, image, err)
	}
	return image, nil
}

// Digest is the digest of the image that ref means. The image itself is not looked at: see [Store.Open].
func (s *Store) Digest(ref string) (string, error) {
	image, err := s.find(ref)
	if err != nil {
		return "", err
	}
	return image.Digest, nil
}

// Verify does what Open does and also reads and hashes every file. It
// reports the first path that differs.
func (s *Store) Verify(ctx context.Context, ref string) error {
	image, err := s.find(ref)
	if err != nil {
		return err
	}
	if err := verifyImage(ctx, filepath.Dir(image.Root), image.Digest); err != nil {
		return s.corrupt(ref, image, err)
	}
	return nil
}

// corrupt makes a corruption's message; other errors keep theirs.
func (s *Store) corrupt(ref string, image *Image, err error) error {
	if !errors.Is(err, ErrCorrupt) {
		return fmt.Errorf("cannot check image %q: %w", ref, err)
	}
	label := fmt.Sprintf("%q (%s)", ref, image.Digest)
	if ref == image.Digest {
		label = ref
	}
	return fmt.Errorf("cannot use image %s: %w; remove it with `clawvm image rm %s` and build or import it again", label, err, ref)
}

// ValidDigest says whether a text is a digest.
func ValidDigest(digest string) error {
	if !digestPattern.MatchString(digest) {
		return fmt.Errorf("%q is no digest: want sha256: and 64 hexadecimal digits", digest)
	}
	return nil
}

// List returns all images, the newest first. It reads their metadata only.
func (s *Store) List() ([]Image, error) {
	entries, err := os.ReadDir(filepath.Join(s.Dir, imagesDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the images: %w", err)
	}
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	var images []Image
	for _, e := range entries {
		hexDigest, ok := strings.CutPrefix(e.Name(), dirPrefix)
		if !ok || !digestPattern.MatchString(digestPrefix+hexDigest) {
			continue
		}
		image, err := s.load(digestPrefix+hexDigest, names)
		if errors.Is(err, ErrNoImage) {
			continue // removed since the directory was read
		}
		if err != nil {
			return nil, err
		}
		images = append(images, *image)
	}
	sort.SliceStable(images, func(i, j int) bool { return images[i].Created.After(images[j].Created) })
	return images, nil
}

// find resolves a reference without checking the image.
func (s *Store) find(ref string) (*Image, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	digest := ref
	if !strings.HasPrefix(ref, digestPrefix) {
		if err := ValidName(ref); err != nil {
			return nil, missing("cannot find the image: %w", err)
		}
		named, ok := names[ref]
		if !ok {
			return nil, missing("cannot find image %q: the store %s has none of that name; `clawvm image ls` shows what it has, `clawvm image build` and `clawvm image import` make one", ref, s.Dir)
		}
		digest = named
	} else if !digestPattern.MatchString(ref) {
		return nil, missing("cannot find image %q: that is no digest, which is sha256: and 64 hexadecimal digits", ref)
	}
	return s.load(digest, names)
}

// missingError is ErrNoImage in the words of what was looked for.
type missingError struct{ error }

func (missingError) Is(target error) bool { return target == ErrNoImage }

func missing(format string, args ...any) error {
	return missingError{fmt.Errorf(format, args...)}
}

// load reads one image's metadata.
func (s *Store) load(digest string, names map[string]string) (*Image, error) {
	dir := s.imageDir(digest)
	meta, err := readMetadata(filepath.Join(dir, metadataFile))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(dir); err == nil {
			// Metadata are for show; the check tells what else is gone.
			meta, err = metadata{}, nil
		} else {
			return nil, missing("cannot find image %s: the store %s has none of that digest; `clawvm image ls` shows what it has", digest, s.Dir)
		}
	} else if err != nil {
		return nil, fmt.Errorf("cannot read the metadata of image %s: %w", digest, err)
	}
	image := &Image{
		Digest:  digest,
		Root:    filepath.Join(dir, rootfsDir),
		Size:    meta.Size,
		Files:   meta.Files,
		Created: meta.Created,
		XAttrs:  meta.XAttrs,
	}
	for name, d := range names {
		if d == digest {
			image.Names = append(image.Names, name)
		}
	}
	sort.Strings(image.Names)
	return image, nil
}

// names reads which digest each name stands for.
func (s *Store) names() (map[string]string, error) {
	dir := filepath.Join(s.Dir, namesDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the names of the images: %w", err)
	}
	names := make(map[string]string, len(entries))
	for _, e := range entries {
		if ValidName(e.Name()) != nil {
			continue // a half-made link, or not ours
		}
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read the image name %q: %w", e.Name(), err)
		}
		digest := digestPrefix + strings.TrimPrefix(filepath.Base(target), dirPrefix)
		if digestPattern.MatchString(digest) {
			names[e.Name()] = digest
		}
	}
	return names, nil
}

// setName lets a name stand for a digest, atomically. The lock must be held.
func (s *Store) setName(name, digest string) error {
	target := filepath.Join("..", imagesDir, filepath.Base(s.imageDir(digest)))
	link := filepath.Join(s.Dir, namesDir, name)
	if old, err := os.Readlink(link); err == nil && old == target {
		return nil
	}
	half := filepath.Join(s.Dir, namesDir, "."+name)
	if err := os.Remove(half); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, half); err != nil {
		return err
	}
	return durable.Rename(half, link)
}

func (s *Store) imageDir(digest string) string {
	return filepath.Join(s.Dir, imagesDir, dirPrefix+strings.TrimPrefix(digest, digestPrefix))
}

// prepare makes the store's own directories.
func (s *Store) prepare() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("cannot change the store %s: %w", s.Dir, ErrNotRoot)
	}
	if err := durable.MkdirAll(s.Dir, 0o700); err != nil {
		return fmt.Errorf("cannot make the store: %w", err)
	}
	// A store that was made with other rights would show setuid files to
	// the host's users.
	if err := os.Chmod(s.Dir, 0o700); err != nil {
		return fmt.Errorf("cannot make the store private: %w", err)
	}
	for _, d := range []string{imagesDir, namesDir, tmpDir} {
		if err := durable.MkdirAll(filepath.Join(s.Dir, d), 0o700); err != nil {
			return fmt.Errorf("cannot make the store: %w", err)
		}
	}
	return nil
}

// lock waits for the store's lock; the returned function gives it back. It is
// held for moments only (never while content is copied or hashed).
func (s *Store) lock() (unlock func() error, err error) {
	f, err := os.OpenFile(filepath.Join(s.Dir, lockFile), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock the store: %w", err)
	}
	if err := flock(f, unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot lock the store: %w", err), f.Close())
	}
	return f.Close, nil
}

// flock applies a lock operation, again when a signal interrupts it.
func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err != unix.EINTR {
			return err
		}
	}
}

func formatDigest(sum []byte) string { return digestPrefix + hex.EncodeToString(sum) }
