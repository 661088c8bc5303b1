package egress

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A log keeps its newest events and removes the oldest. How many it has removed so far stands in the first line of each file
// but the first, as an event of kind "removed".

// removal is the head of a file: what was removed before it was begun.
func removal(vm string, count uint64) Event {
	return Event{Time: time.Now(), VM: vm, Kind: KindRemoved, Count: count, Reason: "the oldest, to keep the log's size"}
}

// openPlain opens a file of a log for reading; links and special files are refused.
func openPlain(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fs.ErrInvalid
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// head returns the "removed" event that a log's file begins with; nil when it has none, or can't be read, which is for others
// to say.
func head(path string) *Event {
	f, err := openPlain(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	line, err := bufio.NewReaderSize(f, maxLine).ReadSlice('\n')
	if err != nil {
		return nil
	}
	e := new(Event)
	if json.Unmarshal(line, e) != nil || e.Kind != KindRemoved {
		return nil
	}
	return e
}

// countEvents counts the events in a file of a log, without its head.
func countEvents(path string) uint64 {
	f, err := openPlain(path)
	if err != nil {
		return 0 // there is none yet
	}
	defer f.Close()
	var n uint64
	if head(path) != nil {
		n--
	}
	for r := bufio.NewReaderSize(f, maxLine); ; {
		line, err := r.ReadSlice('\n')
		if err == nil && len(line) > 1 {
			n++
		}
		if err == io.EOF || err != nil && err != bufio.ErrBufferFull {
			return n
		}
	}
}
