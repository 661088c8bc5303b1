package host

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What a guest can make its supervisor do is bounded in time as well as in size:
// a gate passes on what an agent says as fast as it says it.
const (
	// messageBurst messages are taken as they come, and then messageRate a second:
	// a start says some ten, a workload that comes and goes two a second.
	messageBurst = 64
	messageRate  = 20
	// lineBurst lines of a guest's are logged as they come, and then lineRate an
	// hour; what is left out is counted. So a guest that floods needs days, and not
	// seconds, to push what was said before out of hostLogMax.
	lineBurst = 200
	lineRate  = 100
)

// bucket is a token bucket: it holds up to size, and gets rate more in a second.
type bucket struct {
	size, rate float64
	held       float64
	last       time.Time
}

func newBucket(size, rate float64) *bucket { return &bucket{size: size, rate: rate, held: size} }

// take takes a token; without one it says how long to wait for it.
func (b *bucket) take(now time.Time) (wait time.Duration) {
	if !b.last.IsZero() {
		b.held = min(b.size, b.held+b.rate*now.Sub(b.last).Seconds())
	}
	b.last = now
	if b.held >= 1 {
		b.held--
		return 0
	}
	return time.Duration((1 - b.held) / b.rate * float64(time.Second))
}

// guestLines is how much a guest may still write to its supervisor's log. The
// zero value is ready.
type guestLines struct {
	bucket  *bucket
	leftOut int
}

// allow says whether a line may be written now, and how many were left out before
// it.
func (g *guestLines) allow(now time.Time) (ok bool, leftOut int) {
	if g.bucket == nil {
		g.bucket = newBucket(lineBurst, lineRate/time.Hour.Seconds())
	}
	if g.bucket.take(now) > 0 {
		g.leftOut++
		return false, 0
	}
	leftOut, g.leftOut = g.leftOut, 0
	return true, leftOut
}

// guestf logs what a guest caused, within its bounds.
func (l *life) guestf(format string, args ...any) {
	ok, leftOut := l.lines.allow(time.Now())
	if leftOut > 0 {
		l.logf("%d lines about the guest were left out: it says too much", leftOut)
	}
	if ok {
		l.logf(format, args...)
	}
}

// boundedLog writes a supervisor's log and puts it aside when it has grown beyond
// hostLogMax, as a start does. That is only possible where the log is the file at
// path (a supervisor that `up` started); a terminal's, a pipe's and the journal's
// bounds are their own.
type boundedLog struct {
	mu   sync.Mutex
	out  io.Writer
	path string
}

func (b *boundedLog) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f, ok := b.out.(*os.File); ok {
		if err := b.rotate(f); err != nil {
			// The log goes on where it is: better long than lost.
			return b.out.Write(append([]byte("cannot put the log aside: "+err.Error()+"\n"), p...))
		}
	}
	return b.out.Write(p)
}

// rotate puts f, which the standard streams are, aside when it is the log and has
// grown too long; and begins the log anew when it was removed.
func (b *boundedLog) rotate(f *os.File) error {
	have, err := f.Stat()
	if err != nil || !have.Mode().IsRegular() {
		return nil
	}
	if !b.removed(f) {
		if have.Size() <= hostLogMax {
			return nil
		}
		if at, err := os.Lstat(b.path); err != nil || !os.SameFile(at, have) {
			return nil // not ours to rename
		}
	}
	fresh, err := openLog(b.path)
	if err != nil {
		return err
	}
	defer fresh.Close()
	// Under the descriptor's number, so that what writes to it by number (a panic of
	// the runtime's) is in the new file as well.
	return unix.Dup3(int(fresh.Fd()), int(f.Fd()), unix.O_CLOEXEC)
}

// removed says whether f is the log without its name: an rm of the VM took it away
// while this start waited for the lock.
func (b *boundedLog) removed(f *os.File) bool {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	return err == nil && name == b.path+" (deleted)"
}
