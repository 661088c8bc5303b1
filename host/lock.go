package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// errLocked is the error of [takeLock] when another process holds the lock.
var errLocked = errors.New("another process holds it")

// takeLock locks file for as long as the returned file is open. The lock belongs
// to the open file description (fcntl(2), F_OFD_SETLK), so that it can be asked
// for without being taken, and ends with the process however that ends.
func takeLock(file string) (*os.File, error) {
	for {
		dir := filepath.Dir(file)
		if err := os.MkdirAll(dir, 0o711); errors.Is(err, fs.ErrExist) {
			// It was there when it was to be made and gone when it was looked at, or
			// the other way round. What is no directory is looked at, and is an error.
			if st, lerr := os.Lstat(dir); errors.Is(lerr, fs.ErrNotExist) || lerr == nil && st.IsDir() {
				continue
			}
			return nil, fmt.Errorf("cannot lock %s: %w", file, err)
		} else if err != nil {
			return nil, fmt.Errorf("cannot lock %s: %w", file, err)
		}
		f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // whoever held the lock has removed the directory since
		}
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

// How long who needs a VM's lock waits for another command that holds it, as gc
// and rm do for a moment: killing what was left, which is what can take longest,
// is done or given up by then (killWait, cgroupWait). And how often it is tried.
const (
	lockWait = 30 * time.Second
	lockPoll = 20 * time.Millisecond
)

// lockVM takes a VM's lock, and waits while another command holds it. Of a VM that
// has a supervisor, whose lock it is for as long as it lives, the error is
// [errLocked] at once.
func (l Layout) lockVM(ctx context.Context, name string) (*os.File, error) {
	file := l.VM(name).Lock()
	limit := time.NewTimer(lockWait)
	defer limit.Stop()
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		lock, err := takeLock(file)
		if !errors.Is(err, errLocked) {
			return lock, err
		}
		if _, err := l.Dial(name).Status(ctx); err == nil {
			return nil, errLocked
		}
		select {
		case <-tick.C:
		case <-limit.C:
			return nil, fmt.Errorf("its lock has been held for %s by a process that does not answer; `fuser -v %s` shows which", inWords(lockWait), file)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
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
