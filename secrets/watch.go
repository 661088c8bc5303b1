package secrets

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
)

// settle is how long Watch waits after the first sign of a change, so that a set of files that is replaced together is one change.
const settle = 250 * time.Millisecond

// maxLinks is how many symbolic links a path may lead through (the kernel's own limit).
const maxLinks = 40

// Watch calls changed whenever the file of a secret changes: by writing, by renaming another into its place, or by turning a
// symbolic link on the way to it elsewhere. It calls changed once when it has begun to watch, for what changed before, and
// never twice at a time. It returns nil when ctx is done, and an error when the kernel doesn't let it watch.
func Watch(ctx context.Context, all []Secret, changed func()) (err error) {
	w, err := newWatch(all)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.watcher.Close()) }()
	if _, err := w.look(); err != nil {
		return err
	}
	changed()
	var timer <-chan time.Time // nil: nothing happened
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-w.watcher.Events:
			if !ok {
				return errors.New("cannot watch the secrets' sources: the watch ended")
			}
			if timer == nil {
				timer = time.After(settle)
			}
		case err, ok := <-w.watcher.Errors:
			if !ok || !errors.Is(err, fsnotify.ErrEventOverflow) {
				return fmt.Errorf("cannot watch the secrets' sources: %w", err)
			}
			if timer == nil { // events were lost: look
				timer = time.After(settle)
			}
		case <-timer:
			timer = nil
			differ, err := w.look()
			if err != nil {
				return err
			}
			if differ {
				changed()
			}
		}
	}
}

// identity is what changes when a file or directory is another, or is written to.
type identity struct {
	dev, ino uint64
	mode     uint32
	size     int64
	changed  syscall.Timespec
}

type watch struct {
	watcher *fsnotify.Watcher
	sources []string
	seen    map[string]identity // sources; absent: there is none
	watched map[string]identity // directories, by dev and ino
}

func newWatch(all []Secret) (*watch, error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("cannot watch the secrets' sources: %w", err)
	}
	w := &watch{watcher: watcher, seen: map[string]identity{}, watched: map[string]identity{}}
	for _, s := range all {
		switch {
		case s.File != "":
			w.sources = append(w.sources, s.File)
		case s.Credential != "": // newer versions of systemd can replace it while the unit runs
			w.sources = append(w.sources, s.Source(""))
		}
	}
	return w, nil
}

// look watches the directories that now lead to the sources, and tells whether a source is another than at the last look. It
// watches first, so that what changes meanwhile is seen at the next look at the latest.
func (w *watch) look() (bool, error) {
	wanted := map[string]identity{}
	for _, source := range w.sources {
		for _, dir := range directories(source) {
			if id, ok := identify(dir, os.Stat); ok {
				wanted[dir] = identity{dev: id.dev, ino: id.ino}
			}
		}
	}
	for dir, id := range w.watched {
		if wanted[dir] == id {
			continue
		}
		if err := w.watcher.Remove(dir); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) {
			return false, fmt.Errorf("cannot stop watching %s: %w", dir, err)
		}
		delete(w.watched, dir)
	}
	for dir, id := range wanted {
		err := w.watcher.Add(dir) // also what is watched already: a directory that was away has lost its watch
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, fmt.Errorf("cannot watch %s for changes of secrets: %w", dir, err)
		}
		if err == nil {
			w.watched[dir] = id
		}
	}
	now := map[string]identity{}
	for _, source := range w.sources {
		if id, ok := identify(source, os.Lstat); ok {
			now[source] = id
		}
	}
	differ := len(now) != len(w.seen)
	for source, id := range now {
		if before, ok := w.seen[source]; !ok || before != id {
			differ = true
		}
	}
	w.seen = now
	return differ, nil
}

func identify(path string, stat func(string) (os.FileInfo, error)) (identity, bool) {
	info, err := stat(path)
	if err != nil {
		return identity{}, false
	}
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return identity{}, false
	}
	return identity{dev: s.Dev, ino: s.Ino, mode: s.Mode, size: s.Size, changed: s.Ctim}, true
}

// directories are all that a path leads through, by links too: a change in any of them may make it another file. Those that
// aren't there are left out, so that the one in which they would appear is watched.
func directories(path string) []string {
	var dirs []string
	at, rest, links := "/", strings.Split(strings.TrimPrefix(filepath.Clean(path), "/"), "/"), 0
	dirs = append(dirs, at)
	for len(rest) > 0 {
		next := filepath.Join(at, rest[0])
		rest = rest[1:]
		info, err := os.Lstat(next)
		switch {
		case err != nil:
			return dirs
		case info.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(next)
			if links++; err != nil || links > maxLinks {
				return dirs
			}
			if filepath.IsAbs(target) {
				at = "/"
			}
			rest = append(strings.Split(strings.Trim(filepath.Clean(target), "/"), "/"), rest...)
		case info.IsDir():
			at = next
			dirs = append(dirs, at)
		}
	}
	return dirs
}
