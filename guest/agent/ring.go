package agent

import (
	"context"
	"io"
	"sync"
)

// LogSize is how much of the workload's output a guest keeps for a host that isn't reading, in bytes.
const LogSize = 256 << 10

// Stream says which of its outputs a program wrote to.
type Stream byte

// The outputs of a program.
const (
	Stdout = Stream(frameStdout)
	Stderr = Stream(frameStderr)
)

// chunkSize is how long a chunk of a log may grow: small writes share one, so that the bytes kept, and not the number of writes,
// decide about the memory.
const chunkSize = 4 << 10

// Log keeps the last LogSize bytes that the workload wrote and hands them to any number of readers.
type Log struct {
	mu      sync.Mutex
	chunks  []chunk
	size    int           // bytes in chunks
	end     uint64        // bytes ever written
	wake    chan struct{} // closed at the next write or Close
	closed  bool
	readers map[*logReader]struct{}
}

type chunk struct {
	stream Stream
	start  uint64 // of its first byte
	data   []byte
}

// NewLog returns an empty log.
func NewLog() *Log {
	return &Log{wake: make(chan struct{}), readers: map[*logReader]struct{}{}}
}

// Append adds what the workload wrote to a stream. It never blocks.
func (l *Log) Append(s Stream, p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(p) > 0 {
		last := len(l.chunks) - 1
		if last < 0 || l.chunks[last].stream != s || len(l.chunks[last].data) >= chunkSize {
			l.chunks = append(l.chunks, chunk{stream: s, start: l.end})
			last++
		}
		c := &l.chunks[last]
		n := min(len(p), chunkSize-len(c.data))
		c.data = append(c.data, p[:n]...)
		p = p[n:]
		l.end += uint64(n)
		l.size += n
	}
	for l.size > LogSize && len(l.chunks) > 1 {
		l.size -= len(l.chunks[0].data)
		l.chunks[0].data = nil
		l.chunks = l.chunks[1:]
	}
	l.signal()
}

// Writer returns a writer that appends to the stream.
func (l *Log) Writer(s Stream) io.Writer { return logWriter{l, s} }

type logWriter struct {
	log    *Log
	stream Stream
}

func (w logWriter) Write(p []byte) (int, error) {
	w.log.Append(w.stream, p)
	return len(p), nil
}

func (l *Log) signal() {
	close(l.wake)
	l.wake = make(chan struct{})
}

// Close says that nothing follows; readers get what is left and then the end.
func (l *Log) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		l.signal()
	}
}

// Drain waits until each present reader has sent on all there is, or the context ends.
func (l *Log) Drain(ctx context.Context) {
	for {
		l.mu.Lock()
		behind, wake := false, l.wake
		for r := range l.readers {
			behind = behind || r.sent < l.end
		}
		l.mu.Unlock()
		if !behind {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-wake:
		}
	}
}

// logReader follows a log.
type logReader struct {
	log  *Log
	next uint64 // of the next byte to take
	sent uint64 // all bytes before it were sent on
}

func (l *Log) follow() *logReader {
	r := &logReader{log: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.readers[r] = struct{}{}
	if len(l.chunks) > 0 {
		r.next = l.chunks[0].start
	}
	r.sent = r.next
	return r
}

func (r *logReader) stop() {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	delete(r.log.readers, r)
	r.log.signal()
}

// take waits for something to send: bytes of one stream, or that some were lost. io.EOF is the end of a closed log.
func (r *logReader) take(ctx context.Context) (s Stream, data []byte, lost uint64, err error) {
	l := r.log
	for {
		l.mu.Lock()
		if r.sent < r.next { // the caller comes back: what it took is sent
			r.sent = r.next
			l.signal()
		}
		if r.next < l.end {
			defer l.mu.Unlock()
			if oldest := l.chunks[0].start; r.next < oldest {
				lost, r.next = oldest-r.next, oldest
				return 0, nil, lost, nil
			}
			for i := range l.chunks {
				c := &l.chunks[i]
				if end := c.start + uint64(len(c.data)); r.next < end {
					data = append([]byte(nil), c.data[r.next-c.start:]...)
					r.next = end
					return c.stream, data, 0, nil
				}
			}
		}
		closed, wake := l.closed, l.wake
		l.mu.Unlock()
		if closed {
			return 0, nil, 0, io.EOF
		}
		select {
		case <-ctx.Done():
			return 0, nil, 0, ctx.Err()
		case <-wake:
		}
	}
}
