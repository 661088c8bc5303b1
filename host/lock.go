package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// errLocked is the error of [takeLock] when another process holds the lock.
var errLocked = errors.New("another process holds it")

// takeLock locks file for as long as the returned file is open. The lock belongs
// to the open file description (fcntl(2), F_OFD_SETLK), so that it can be asked
// for without being taken, and ends with the process however that ends.
func takeLock(file string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o711); err != nil {
		return nil, fmt.Errorf("cannot lock %s: %w", file, err)
	}
	for {
		f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("cannot lock: %w", err)
		}
		lk := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk); err != nil {
			f.Close()
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
				return nil, errLocked
			}
			return nil, fmt.Errorf("cannot lock %s: %w", file, err)
		}
		// Whoever held the lock before may have removed the file (clawvm rm):
		// then this locks a name that nobody else will find.
		mine, err := f.Stat()
		if err == nil {
			if now, err := os.Stat(file); err == nil && os.SameFile(mine, now) {
				return f, nil
			}
		}
		f.Close()
	}
}

// locked says whether some process holds the lock of file, without taking it.
func locked(file string) (bool, error) {
	f, err := os.OpenFile(file, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	lk := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
		return false, fmt.Errorf("cannot ask for the lock of %s: %w", file, err)
	}
	return lk.Type != unix.F_UNLCK, nil
}
