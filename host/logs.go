package host

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/host/gate"
)

// OpenLog opens a log that the gate wrote. The directory is the gate's, so that
// what lies there may be anything: only a regular file is opened.
func OpenLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// tailBytes is how much of a log's end is looked at for its last lines.
const tailBytes = 32 << 10

// Tail returns up to n of the last lines of a log, printable; none when there is
// no log.
func Tail(path string, n int) ([]string, error) {
	f, err := OpenLog(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	from := max(0, size-tailBytes)
	raw, err := io.ReadAll(io.NewSectionReader(f, from, tailBytes))
	if err != nil {
		return nil, err
	}
	if from > 0 {
		if i := bytes.IndexByte(raw, '\n'); i >= 0 {
			raw = raw[i+1:]
		}
	}
	var lines []string
	for line := range strings.Lines(string(raw)) {
		line = string(parseLogLine([]byte(strings.TrimRight(line, "\r\n"))).Text)
		if line = strings.TrimSpace(gate.Printable(line, lineMax)); line != "" {
			lines = append(lines, line)
		}
	}
	return lines[max(0, len(lines)-n):], nil
}

// lineMax bounds a line of a guest's log on the terminal.
const lineMax = 1000

// lastLine is the last line of what a program said.
func lastLine(said []byte) string {
	lines := strings.Split(strings.TrimSpace(string(said)), "\n")
	return lines[len(lines)-1]
}
