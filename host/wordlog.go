package host

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"
)

// wordLog is the log of a program whose words its guest can cause, as a
// virtiofsd's: they come through a pipe and not into the file, so that they are
// bounded while the program runs.
type wordLog struct {
	pipe *os.File // where they come from
	done chan struct{}
	err  error // valid when done is closed
}

// wordLogEnd is how long is waited for the last words of a program that has ended:
// they are in the pipe already, unless a process that it left holds it.
const wordLogEnd = time.Second

// openWordLog opens the log at path and returns the end of the pipe that the
// program is to write to, which the caller closes. The undo that ends the log is
// pushed; that of the program has to come after it.
func (l *life) openWordLog(path string) (log *wordLog, words *os.File, err error) {
	file, err := openLog(path)
	if err != nil {
		return nil, nil, err
	}
	pipe, words, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	log = &wordLog{pipe: pipe, done: make(chan struct{})}
	go func() {
		defer close(log.done)
		copyWords(&boundedLog{out: file, path: path}, pipe)
		log.err = errors.Join(pipe.Close(), file.Close())
	}()
	l.undo.push("the log "+path, log.end)
	return log, words, nil
}

// await waits until all that a program which has ended said is in its log.
func (w *wordLog) await() {
	// It can only fail on a pipe that was read to its end meanwhile.
	_ = w.pipe.SetReadDeadline(time.Now().Add(wordLogEnd))
	<-w.done
}

func (w *wordLog) end() error {
	w.await()
	return w.err
}

// copyWords writes lines, those that are too long cut into several, as many as a
// guest may cause, and says how many it left out. It reads on in any case: a
// program must not wait because its log can't be kept.
func copyWords(log io.Writer, from io.Reader) {
	in := bufio.NewReaderSize(from, lineMax)
	var lines guestLines
	for {
		line, err := in.ReadSlice('\n')
		if len(line) > 0 {
			if line[len(line)-1] != '\n' {
				line = append(slices.Clip(line), '\n')
			}
			ok, leftOut := lines.allow(time.Now())
			lines.say(log, leftOut)
			if ok {
				_, _ = log.Write(line)
			}
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			break
		}
	}
	lines.say(log, lines.leftOut)
}

// say says how many lines are missing.
func (g *guestLines) say(log io.Writer, leftOut int) {
	if leftOut > 0 {
		fmt.Fprintf(log, "clawvm: %d lines were left out: it says too much\n", leftOut)
	}
}
