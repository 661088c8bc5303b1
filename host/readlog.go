package host

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/clawvm/clawvm/host/gate"
)

// LogLine is a line of a log.
type LogLine struct {
	Time   time.Time   // when it began; zero when the log does not say
	Stream gate.Stream // "" in a log of clawvm's own
	Text   []byte      // without its end; valid until the next call
	// Partial: the next line of the stream goes on where this one ends.
	Partial bool
}

// logLineMax bounds a line in bytes: the longest that a gate writes, and a little.
// A longer one, which it did not write, is given in parts.
const logLineMax = 32 << 10

// logFiles bounds the rotated files that are looked at; a gate keeps two.
const logFiles = 8

// LogReader reads a log from its oldest rotated file on, and goes on as it grows
// and is rotated. Its Close closes what is open.
type LogReader struct {
	path string
	file *os.File
	in   *bufio.Reader
	rest []byte // the beginning of a line
	last time.Time
}

// ReadLog returns a reader of the log at path, which need not be there yet.
func ReadLog(path string) *LogReader { return &LogReader{path: path} }

// Close closes the file that is open.
func (r *LogReader) Close() error {
	if r.file == nil {
		return nil
	}
	return r.file.Close()
}

// Next returns the next line. io.EOF means that there is none at the moment: a
// later call may find one.
func (r *LogReader) Next() (LogLine, error) {
	for {
		if r.file == nil {
			if err := r.advance(); err != nil {
				return LogLine{}, err
			}
		}
		piece, err := r.in.ReadSlice('\n')
		r.rest = append(r.rest, piece...)
		switch {
		case err == nil || len(r.rest) >= logLineMax:
			line := r.parse(bytes.TrimSuffix(r.rest, []byte("\n")))
			line.Partial = line.Partial || err != nil
			r.rest = r.rest[:0]
			return line, nil
		case err == bufio.ErrBufferFull:
			continue
		case err != io.EOF:
			return LogLine{}, fmt.Errorf("cannot read the log: %w", err)
		}
		moved, err := r.rotated()
		if err != nil || !moved {
			return LogLine{}, cmpEOF(err)
		}
		// What came between the last look and the rotation is read first.
		if n, err := r.in.Peek(1); err == nil && len(n) == 1 {
			continue
		}
		if err := r.advance(); err != nil {
			return LogLine{}, err
		}
	}
}

// cmpEOF is err, or io.EOF when there is none.
func cmpEOF(err error) error {
	if err == nil {
		return io.EOF
	}
	return err
}

// rotated says whether the file that is read has got another name.
func (r *LogReader) rotated() (bool, error) {
	now, err := os.Lstat(r.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // in the middle of it, or removed with its VM
	}
	if err != nil {
		return false, err
	}
	have, err := r.file.Stat()
	return err == nil && !os.SameFile(now, have), err
}

// advance opens the file after the one that is read, the oldest at first. io.EOF
// means that there is none.
func (r *LogReader) advance() error {
	// Rotated files have the time in their names: workload-2026-11-22T15-50-06.010.log.
	ext := filepath.Ext(r.path)
	begin := strings.TrimSuffix(filepath.Base(r.path), ext) + "-"
	entries, err := os.ReadDir(filepath.Dir(r.path)) // by name, and so by age
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var files []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), begin) && strings.HasSuffix(e.Name(), ext) {
			files = append(files, filepath.Join(filepath.Dir(r.path), e.Name()))
		}
	}
	files = append(files[max(0, len(files)-logFiles):], r.path)
	if r.file != nil {
		have, err := r.file.Stat()
		if err != nil {
			return err
		}
		for i, name := range files {
			if now, err := os.Lstat(name); err == nil && os.SameFile(now, have) {
				files = files[i+1:]
				break
			}
		}
	}
	for _, name := range files {
		f, err := OpenLog(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot read the log: %w", err)
		}
		if r.file != nil {
			if err := r.file.Close(); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		r.file, r.in = f, bufio.NewReader(f)
		return nil
	}
	return io.EOF
}

// parse takes a line apart. One without a time has that of the line before it.
func (r *LogReader) parse(raw []byte) LogLine {
	line := parseLogLine(raw)
	if line.Time.IsZero() {
		line.Time = r.last
	}
	r.last = line.Time
	return line
}

// supervisorTime is how package log begins a line.
const supervisorTime = "2006/01/02 15:04:05"

// parseLogLine takes a line apart; see gate.StampFormat. What is not written so is
// text of clawvm's own, or of an older gate.
func parseLogLine(raw []byte) LogLine {
	if n := len(gate.StampFormat); len(raw) > n && raw[n] == ' ' {
		at, err := time.Parse(gate.StampFormat, string(raw[:n]))
		stream, rest, ok1 := bytes.Cut(raw[n+1:], []byte(" "))
		tag, text, ok2 := bytes.Cut(rest, []byte(" "))
		known := string(stream) == string(gate.Stdout) || string(stream) == string(gate.Stderr)
		if err == nil && ok1 && ok2 && known && (string(tag) == gate.TagFull || string(tag) == gate.TagPartial) {
			return LogLine{Time: at, Stream: gate.Stream(stream), Text: text, Partial: string(tag) == gate.TagPartial}
		}
	}
	line := LogLine{Text: raw}
	if len(raw) >= len(supervisorTime) {
		if at, err := time.ParseInLocation(supervisorTime, string(raw[:len(supervisorTime)]), time.Local); err == nil {
			line.Time = at
		}
	}
	return line
}
