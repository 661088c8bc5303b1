package agent

import (
	"errors"
	"io"
	"os"
	"sync"
	"time"
)

// output is one of a program's outputs, sent to its end.
type output struct {
	kind frameKind
	file *os.File

	mu    sync.Mutex
	ended bool // the program has
}

// send sends what the program writes, until it is complete or nobody takes it.
func (o *output) send(out *frameWriter) {
	defer closeQuietly(o.file) // a program that writes on gets SIGPIPE, or a hang-up of its terminal
	buf := make([]byte, maxFrame)
	for rest := maxRest; rest > 0; {
		if o.patience() != nil {
			return
		}
		n, err := o.file.Read(buf)
		if n > 0 {
			if out.write(o.kind, buf[:n]) != nil {
				return
			}
			if o.hasEnded() {
				rest -= n
			}
		}
		if err != nil {
			return // end of file, EIO from a terminal that nobody holds, or silence after the program's end
		}
	}
}

// patience limits the next read's time when the program has ended. A slow reader at the other end takes none of it.
func (o *output) patience() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.ended {
		return nil
	}
	return o.file.SetReadDeadline(time.Now().Add(waitDelay))
}

func (o *output) hasEnded() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ended
}

// end says that the program has ended.
func (o *output) end() {
	o.mu.Lock()
	o.ended = true
	o.mu.Unlock()
	if err := o.patience(); err != nil {
		return // it is closed already
	}
}

// input is what was sent to a program and not yet taken by it, at most stdinCredit bytes.
type input struct {
	mu       sync.Mutex
	change   *sync.Cond
	data     []byte
	held     int // bytes in data, and those on their way into the program
	finished bool
	closed   bool
}

func newInput() *input {
	in := &input{}
	in.change = sync.NewCond(&in.mu)
	return in
}

// put adds input. It returns false to a sender that sends more than it may, or behind the end.
func (in *input) put(p []byte) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.finished || in.held+len(p) > stdinCredit {
		return false
	}
	in.data = append(in.data, p...)
	in.held += len(p)
	in.change.Signal()
	return true
}

// finish says that no input follows.
func (in *input) finish() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.finished = true
	in.change.Signal()
}

// close ends take, whatever is left.
func (in *input) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	in.change.Signal()
}

var errInputClosed = errors.New("the connection has ended")

// take waits for input: io.EOF is the sender's end of it, errInputClosed that of the connection.
func (in *input) take() ([]byte, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for {
		switch {
		case in.closed:
			return nil, errInputClosed
		case len(in.data) > 0:
			data := in.data
			in.data = nil
			return data, nil
		case in.finished:
			return nil, io.EOF
		}
		in.change.Wait()
	}
}

// taken makes room for n bytes more.
func (in *input) taken(n int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.held -= n
}
