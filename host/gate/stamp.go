package gate

import (
	"bytes"
	"io"
	"sync"
	"time"
)

// Stream is the output that a line of a log was written to.
type Stream string

// The streams. A console has the first alone.
const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
)

// StampFormat is a line's time, always in UTC and of one length.
const StampFormat = "2006-01-02T15:04:05.000000Z"

// The tags of a line: whole, or only the beginning of what the next one of its
// stream goes on with.
const (
	TagFull    = "F"
	TagPartial = "P"
)

const (
	// stampMax bounds what a line of a guest's output holds, in bytes, as that of
	// Kubernetes' container logs.
	stampMax = 16 << 10
	// stampBatch is how many bytes of lines are written at once, at most a line more.
	stampBatch = 64 << 10
	// stampWait is how long the beginning of a line waits for its end: a prompt, or
	// a progress bar, must be seen too.
	stampWait = time.Second
)

// stamper writes what a guest prints as lines with the time at which each began:
//
//	2026-11-22T15:50:06.010000Z stdout F the text
//
// It is the format of Kubernetes' container logs (CRI), which log collectors read.
// What is written at once is whole lines, so that a rotation never cuts one; and as
// many as came at once, since a guest may print a million short ones.
type stamper struct {
	out io.Writer
	now func() time.Time

	mu   sync.Mutex
	open map[Stream]*beginning
	made []byte // lines that are not written yet
}

// beginning is a line without an end.
type beginning struct {
	at    time.Time
	text  []byte
	timer *time.Timer
}

func newStamper(out io.Writer) *stamper {
	return &stamper{out: out, now: time.Now, open: make(map[Stream]*beginning)}
}

// stream is a writer of one stream.
func (s *stamper) stream(name Stream) io.Writer { return stampedStream{s, name} }

type stampedStream struct {
	s    *stamper
	name Stream
}

func (w stampedStream) Write(p []byte) (int, error) {
	w.s.add(w.name, p)
	return len(p), nil
}

// add adds what was written to a stream.
func (s *stamper) add(name Stream, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.open[name]
	if b == nil {
		b = &beginning{}
		b.timer = time.AfterFunc(stampWait, func() { s.flushOne(name) })
		s.open[name] = b
	}
	b.timer.Stop()
	for len(p) > 0 {
		if len(b.text) == 0 {
			b.at = s.now()
		}
		n, tag := bytes.IndexByte(p, '\n'), TagFull
		skip := 1
		if n < 0 {
			n, skip = len(p), 0
		}
		if room := stampMax - len(b.text); n > room {
			n, skip, tag = room, 0, TagPartial
		}
		b.text = append(b.text, p[:n]...)
		p = p[n+skip:]
		if skip == 0 && tag == TagFull {
			break // the end is not there yet
		}
		s.line(name, b, tag)
	}
	s.write()
	if len(b.text) > 0 {
		b.timer.Reset(stampWait)
	}
}

// line makes one line; what is left of it is nothing.
func (s *stamper) line(name Stream, b *beginning, tag string) {
	s.made = b.at.UTC().AppendFormat(s.made, StampFormat)
	s.made = append(s.made, ' ')
	s.made = append(s.made, name...)
	s.made = append(s.made, ' ')
	s.made = append(s.made, tag...)
	s.made = append(s.made, ' ')
	s.made = append(append(s.made, b.text...), '\n')
	b.text = b.text[:0]
	if len(s.made) >= stampBatch {
		s.write()
	}
}

// write writes the lines that were made.
func (s *stamper) write() {
	if len(s.made) > 0 {
		// Never an error: see lossy.
		_, _ = s.out.Write(s.made)
		s.made = s.made[:0]
	}
}

func (s *stamper) flushOne(name Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.open[name]; b != nil && len(b.text) > 0 {
		s.line(name, b, TagPartial)
		s.write()
	}
}

// flush writes the beginnings of lines that have no end.
func (s *stamper) flush() {
	for _, name := range []Stream{Stdout, Stderr} {
		s.flushOne(name)
	}
}
