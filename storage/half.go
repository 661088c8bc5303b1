package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// half is a directory in tmp/ whose maker holds a lock on it. The lock ends
// with the process, so what has none was left by one that was killed.
type half struct {
	path string
	dir  *os.File
}

// newHalf makes a locked temporary directory and removes those that nobody
// works on any more.
func (s *Store) newHalf(prefix string) (h *half, err error) {
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	// Making and locking happen under the store's lock, as does the search
	// for abandoned ones: so none is found between the two.
	defer func() { err = errors.Join(err, unlock()) }()
	if err := s.removeAbandoned(); err != nil {
		return nil, err
	}
	path, err := os.MkdirTemp(filepath.Join(s.Dir, tmpDir), prefix)
	if err != nil {
		return nil, err
	}
	dir, err := openDir(path)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	if err := flock(dir, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(err, dir.Close(), os.Remove(path))
	}
	return &half{path: path, dir: dir}, nil
}

// discard removes what is still in tmp/ and gives the lock back.
func (h *half) discard() error {
	return errors.Join(os.RemoveAll(h.path), h.dir.Close())
}

// Abandoned lists what is in tmp/ of imports and removals that were killed. It
// changes nothing.
func (s *Store) Abandoned() (found []string, err error) {
	entries, err := os.ReadDir(filepath.Join(s.Dir, tmpDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot look for half-made images: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(s.Dir, tmpDir, e.Name())
		dir, err := openDir(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return found, fmt.Errorf("cannot look for half-made images: %w", err)
		}
		// Shared, and given back at once: whoever makes an image holds it alone.
		err = flock(dir, unix.LOCK_SH|unix.LOCK_NB)
		if err == nil {
			found = append(found, path)
		} else if err == unix.EWOULDBLOCK {
			err = nil
		}
		if err := errors.Join(err, dir.Close()); err != nil {
			return found, fmt.Errorf("cannot look for half-made images: %w", err)
		}
	}
	return found, nil
}

// RemoveAbandoned removes what Abandoned found, and whatever else is in tmp/ that
// nobody works on.
func (s *Store) RemoveAbandoned() (err error) {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	return s.removeAbandoned()
}

// removeAbandoned empties tmp/ of what no process holds. The store's lock
// must be held.
func (s *Store) removeAbandoned() error {
	entries, err := os.ReadDir(filepath.Join(s.Dir, tmpDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.Dir, tmpDir, e.Name())
		dir, err := openDir(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		err = flock(dir, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			if rerr := os.RemoveAll(path); rerr != nil {
				err = fmt.Errorf("cannot remove the half-made image %s: %w", path, rerr)
			}
		} else if err == unix.EWOULDBLOCK {
			err = nil
		}
		if err := errors.Join(err, dir.Close()); err != nil {
			return err
		}
	}
	return nil
}
