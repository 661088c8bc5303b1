package egress

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxLogFiles    = 100                    // where the search for predecessors ends
	maxLooks       = 100                    // at the files, each time with one of them gone at the second glance
	followInterval = 200 * time.Millisecond // polled: inotify instances are few on a host (128 a user), and a person reads this
)

// Read calls each with the events of the log at path, its rotated predecessors first. With follow it goes on, across
// rotations, until ctx ends, and waits for a log that isn't there yet. It returns nil at the end or when ctx ends, an
// error that is fs.ErrNotExist without a log, or what each returned. A line that is no event, or longer than any, is reported as
// an event of kind "lost"; how many events were removed before the oldest is the first event. The log's directory is the
// gate's, so links and special files in it are refused.
func Read(ctx context.Context, path string, follow bool, each func(Event) error) error {
	r := &logReader{path: path}
	defer r.close()
	tick := time.NewTicker(followInterval)
	defer tick.Stop()
	if e := head(path); e != nil {
		if err := each(*e); err != nil {
			return err
		}
	}
	for {
		moved, err := r.next()
		if err != nil && !(follow && errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("cannot read network log: %w", err)
		}
		for r.file != nil && ctx.Err() == nil {
			e, err := r.event()
			if err == io.EOF {
				break
			}
			if err != nil {
				return fmt.Errorf("cannot read network log: %w", err)
			}
			if e == nil {
				continue
			}
			if err := each(*e); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if moved {
			continue // there may be a younger file already
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

type logReader struct {
	path    string
	file    *os.File
	info    fs.FileInfo
	lines   *bufio.Reader
	partial []byte // a line whose end isn't written yet
	skip    bool   // within a line that is too long
	gap     bool   // files vanished before they were read
}

func (r *logReader) close() {
	if r.file != nil {
		// It was only read.
		if err := r.file.Close(); err == nil {
			r.file = nil
		}
	}
}

// next opens the file that follows the open one, or the oldest at first, once the open one is done with.
// It reports whether it did. The writer may rotate at any moment: what was listed is compared with what was opened.
func (r *logReader) next() (bool, error) {
	for range maxLooks {
		var all []fs.FileInfo // youngest first; in this order a rotation meanwhile shows a file twice, but hides none
		for i := range maxLogFiles {
			info, err := os.Lstat(rotated(r.path, i))
			if errors.Is(err, fs.ErrNotExist) && i == 0 {
				continue // between two steps of a rotation, or no log
			}
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil {
				return false, err
			}
			all = append(all, info)
		}
		if len(all) == 0 {
			return false, fmt.Errorf("%s: %w", r.path, fs.ErrNotExist)
		}
		want := len(all) - 1
		vanished := false
		if r.file != nil {
			at := -1
			for i, info := range all {
				if os.SameFile(info, r.info) {
					at = i
					break
				}
			}
			switch {
			case at == 0:
				return false, nil
			case at > 0:
				want = at - 1
			default:
				vanished = true // rotated away while it was read: go on with the oldest that is left
			}
		}
		if r.file != nil && !r.drained() {
			return true, nil // written between the last read and the rotation
		}
		f, info, err := r.open(all[want])
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, err
		}
		r.close()
		r.file, r.info, r.lines, r.partial, r.skip, r.gap = f, info, bufio.NewReaderSize(f, maxLine), nil, false, vanished
		return true, nil
	}
	return false, fmt.Errorf("%s is replaced all the time", r.path)
}

// drained reports whether the open file has been read to its end.
func (r *logReader) drained() bool {
	at, err := r.file.Seek(0, io.SeekCurrent)
	if err != nil {
		return true
	}
	info, err := r.file.Stat()
	return err != nil || (r.lines.Buffered() == 0 && at >= info.Size())
}

// open finds the listed file under whichever of its names it has by now.
func (r *logReader) open(want fs.FileInfo) (*os.File, fs.FileInfo, error) {
	dir, err := os.Open(filepath.Dir(r.path))
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()
	for i := range maxLogFiles {
		name := filepath.Base(rotated(r.path, i))
		fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		if err == unix.ENOENT && i == 0 {
			continue
		}
		if err != nil {
			return nil, nil, &fs.PathError{Op: "open", Path: rotated(r.path, i), Err: err}
		}
		f := os.NewFile(uintptr(fd), rotated(r.path, i))
		info, err := f.Stat()
		if err == nil && !info.Mode().IsRegular() {
			err = fmt.Errorf("%s is not a regular file", f.Name())
		}
		if err != nil {
			return nil, nil, errors.Join(err, f.Close())
		}
		if os.SameFile(info, want) {
			return f, info, nil
		}
		if err := f.Close(); err != nil {
			return nil, nil, err
		}
	}
	return nil, nil, fs.ErrNotExist
}

// event returns the next event, nil for a line without one, or io.EOF when there is no whole line.
func (r *logReader) event() (*Event, error) {
	if r.gap {
		r.gap = false
		return &Event{Time: time.Now().UTC(), Kind: KindLost, Reason: "the log was rotated away before it was read"}, nil
	}
	part, err := r.lines.ReadSlice('\n')
	if err == bufio.ErrBufferFull || (err == nil && r.skip) || len(r.partial)+len(part) > maxLine {
		r.partial, r.skip = nil, err != nil
		if err == nil {
			return unreadable(), nil
		}
		return nil, eofOnly(err)
	}
	if r.skip {
		return nil, eofOnly(err)
	}
	r.partial = append(r.partial, part...)
	if err != nil {
		return nil, err
	}
	line := bytes.TrimSpace(r.partial)
	defer func() { r.partial = r.partial[:0] }()
	if len(line) == 0 {
		return nil, nil
	}
	e := new(Event)
	if json.Unmarshal(line, e) != nil || e.Kind == "" {
		return unreadable(), nil
	}
	if e.Kind == KindRemoved {
		return nil, nil // it was said at the beginning
	}
	return e, nil
}

func eofOnly(err error) error {
	if err == bufio.ErrBufferFull {
		return nil
	}
	return err
}

func unreadable() *Event {
	return &Event{Time: time.Now().UTC(), Kind: KindLost, Count: 1, Reason: "a line of the log could not be read"}
}
