package egress

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// DefaultLogSize and DefaultLogFiles bound a VM's log to 48 MiB: about 200,000 events.
	DefaultLogSize  = 16 << 20
	DefaultLogFiles = 3

	minLogSize = 64 << 10 // several of the longest lines
	maxLine    = 16 << 10 // longer events are dropped; the resolver's and flow log's own bounds keep them below this
	logQueue   = 1 << 20  // bytes that wait for the disk: several seconds of a busy guest
)

// LogOptions bound a log. The zero value means the defaults.
type LogOptions struct {
	Size  int64 // bytes of one file, at least 64 KiB
	Files int   // the current file and its predecessors, at least 2
}

// A Log writes events as JSON lines to a file, and keeps its predecessors as PATH.1 (the youngest), PATH.2 …
//
// It is written here and not taken from lumberjack because that one's bound holds only some time later (a goroutine that
// can't be ended removes the old files), and because Read follows a rotation by the files' order, not by the wall clock.
type Log struct {
	path string
	opts LogOptions

	mu      sync.Mutex
	queue   []byte // lines that wait
	lines   uint64 // how many
	dropped uint64 // lines lost since the last "dropped" event
	vm      string // of the last event lost
	closed  bool
	wake    chan struct{}
	done    chan struct{}

	// Only the writing goroutine uses these.
	file    *os.File
	size    int64
	removed uint64 // events that rotations have removed so far
	torn    bool   // the file may end within a line
	err     error  // the last failure to write
	write   func(*os.File, []byte) (int, error)
}

// OpenLog opens or makes the log at path, whose directory must be writable. Close it to write out what waits.
func OpenLog(path string, opts LogOptions) (*Log, error) {
	return openLog(path, opts, (*os.File).Write)
}

func openLog(path string, opts LogOptions, write func(*os.File, []byte) (int, error)) (*Log, error) {
	if opts.Size == 0 {
		opts.Size = DefaultLogSize
	}
	if opts.Files == 0 {
		opts.Files = DefaultLogFiles
	}
	if opts.Size < minLogSize || opts.Files < 2 {
		return nil, fmt.Errorf("cannot open network log %s: %d files of %d bytes: at least 2 of %d are needed", path, opts.Files, opts.Size, minLogSize)
	}
	l := &Log{path: path, opts: opts, wake: make(chan struct{}, 1), done: make(chan struct{}), write: write}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open network log: %w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open network log: %w", errors.Join(err, f.Close()))
	}
	// Whoever wrote here before may have been killed within a line.
	l.file, l.size, l.torn = f, info.Size(), info.Size() > 0
	if e := head(path); e != nil {
		l.removed = e.Count
	}
	go l.run()
	return l, nil
}

// Write queues an event. It never waits for the disk: when 1 MiB waits already, the event is dropped, and counted in a
// later event of kind "dropped". After Close it does nothing.
func (l *Log) Write(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	before := len(l.queue)
	l.queue = append(e.appendJSON(l.queue), '\n')
	if len(l.queue)-before > maxLine || len(l.queue) > logQueue {
		l.queue = l.queue[:before]
		l.dropped++
		l.vm = e.VM
		return
	}
	l.lines++
	l.vm = e.VM
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Dropped returns how many events have been dropped and not yet been reported in the log.
func (l *Log) Dropped() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped
}

// Close writes out what waits, closes the file, and returns the last failure to write, if the log did not recover from it.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return fs.ErrClosed
	}
	l.closed = true
	close(l.wake)
	l.mu.Unlock()
	<-l.done
	return errors.Join(l.err, l.file.Close())
}

func (l *Log) run() {
	defer close(l.done)
	var spare []byte
	for open := true; open; {
		_, open = <-l.wake
		for {
			l.mu.Lock()
			batch, lines, dropped, vm := l.queue, l.lines, l.dropped, l.vm
			l.queue, l.lines, l.dropped = spare[:0], 0, 0
			l.mu.Unlock()
			if dropped > 0 {
				e := Event{Time: time.Now(), VM: vm, Kind: KindDropped, Count: dropped, Reason: "the log could not keep up"}
				batch = append(e.appendJSON(batch), '\n')
			}
			if len(batch) == 0 {
				spare = batch
				break
			}
			if lost := l.flush(batch); lost > 0 {
				// The "dropped" line, if there was one, is the last of the batch and is lost too, but not an event.
				if dropped > 0 {
					lost--
				}
				l.mu.Lock()
				l.dropped += min(lost, lines) + dropped
				l.mu.Unlock()
				spare = batch
				break // the next event tries again
			}
			spare = batch
		}
	}
}

// flush writes whole lines, rotating where they don't fit, and returns how many lines it could not write.
func (l *Log) flush(batch []byte) (lost uint64) {
	for len(batch) > 0 {
		n := len(batch)
		if room := l.opts.Size - l.size; int64(n) > room {
			n = bytes.LastIndexByte(batch[:max(room, 0)], '\n') + 1
		}
		if n == 0 {
			if l.err = l.rotate(); l.err != nil {
				break
			}
			continue
		}
		if l.err = l.append(batch[:n]); l.err != nil {
			break
		}
		batch = batch[n:]
	}
	return uint64(bytes.Count(batch, []byte{'\n'}))
}

func (l *Log) append(lines []byte) error {
	if l.torn {
		// An empty line does no harm to readers, half a line joined with a whole one loses both.
		n, err := l.write(l.file, []byte{'\n'})
		l.size += int64(n)
		if err != nil {
			return fmt.Errorf("cannot write network log: %w", err)
		}
		l.torn = false
	}
	n, err := l.write(l.file, lines)
	if err == nil {
		l.size += int64(n)
		return nil
	}
	if terr := l.file.Truncate(l.size); terr != nil {
		l.size += int64(n)
		l.torn = n > 0
	}
	return fmt.Errorf("cannot write network log: %w", err)
}

// rotate starts a new file. When a step fails, the old one stays in use and nothing is written until a later try works,
// so that the bound holds.
func (l *Log) rotate() error {
	fresh := l.path + ".new"
	f, err := os.OpenFile(fresh, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("cannot rotate network log: %w", err)
	}
	oldest := countEvents(rotated(l.path, l.opts.Files-1))
	for i := l.opts.Files - 2; i >= 0 && err == nil; i-- {
		if err = os.Rename(rotated(l.path, i), rotated(l.path, i+1)); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err == nil {
		err = os.Rename(fresh, l.path)
	}
	if err != nil {
		return fmt.Errorf("cannot rotate network log: %w", errors.Join(err, f.Close()))
	}
	old := l.file
	l.file, l.size, l.torn = f, 0, false
	if l.removed += oldest; l.removed > 0 {
		l.mu.Lock()
		e := removal(l.vm, l.removed)
		l.mu.Unlock()
		// The disk that has no room for it has none for the events either, which is said there.
		_ = l.append(append(e.appendJSON(nil), '\n'))
	}
	if err := old.Close(); err != nil {
		return fmt.Errorf("cannot close the full network log: %w", err)
	}
	return nil
}

// rotated is the name of a log's i-th file; 0 is the current one.
func rotated(path string, i int) string {
	if i == 0 {
		return path
	}
	return path + "." + strconv.Itoa(i)
}
