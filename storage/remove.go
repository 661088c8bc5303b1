package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/clawvm/clawvm/internal/durable"
)

// Remove removes an image. By a name that isn't its last, only the name goes;
// by the last name or the digest the image goes too, with all its names,
// unless inUse (which gets the digest and may be nil) returns the names of
// VMs that use it: then it is ErrInUse, and nothing changes. A corrupt or
// half-removed image can be removed. One that isn't there is ErrNoImage.
func (s *Store) Remove(ref string, inUse func(digest string) []string) (err error) {
	if err := s.prepare(); err != nil {
		return err
	}
	h, err := s.newHalf("remove-")
	if err != nil {
		return fmt.Errorf("cannot remove image %q: %w", ref, err)
	}
	defer func() {
		if derr := h.discard(); derr != nil {
			err = errors.Join(err, fmt.Errorf("cannot remove image %q: %w", ref, derr))
		}
	}()
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	image, err := s.findDangling(ref)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(ref, digestPrefix) && len(image.Names) > 1 {
		return s.removeName(ref)
	}
	if inUse != nil {
		if users := inUse(image.Digest); len(users) > 0 {
			return fmt.Errorf("cannot remove image %q: %w by %s; `clawvm down` them first", ref, ErrInUse, strings.Join(users, ", "))
		}
	}
	for _, name := range image.Names {
		if err := s.removeName(name); err != nil {
			return err
		}
	}
	// Out of the way at once; its thousands of files go when the lock is free.
	err = os.Rename(s.imageDir(image.Digest), filepath.Join(h.path, "image"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove image %q: %w", ref, err)
	}
	return durable.SyncDir(filepath.Join(s.Dir, imagesDir))
}

// findDangling is find, but a name whose image is gone is found too.
func (s *Store) findDangling(ref string) (*Image, error) {
	image, err := s.find(ref)
	if !errors.Is(err, ErrNoImage) {
		return image, err
	}
	names, nerr := s.names()
	if nerr != nil {
		return nil, nerr
	}
	if digest, ok := names[ref]; ok {
		return &Image{Digest: digest, Names: []string{ref}}, nil
	}
	return nil, err
}

func (s *Store) removeName(name string) error {
	if err := os.Remove(filepath.Join(s.Dir, namesDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the image name %q: %w", name, err)
	}
	return durable.SyncDir(filepath.Join(s.Dir, namesDir))
}
