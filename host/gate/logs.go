package gate

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"gopkg.in/natefinch/lumberjack.v2"
)

// A guest decides how much it prints, the owner how much of it is kept: the
// newest logSize × (1 + logBackups) MiB of each log.
const (
	logSize    = 8 // MiB, before a log is rotated
	logBackups = 2 // rotated logs that are kept
)

func (g *gate) netLog() string { return filepath.Join(g.Logs, "net.jsonl") }

// rotating opens one of the guest's logs for appending.
func (g *gate) rotating(name string) io.WriteCloser {
	return &lumberjack.Logger{Filename: filepath.Join(g.Logs, name), MaxSize: logSize, MaxBackups: logBackups}
}

// console writes what the guest's kernel and init print to the log. It always
// reads on, because a full pipe would stop the guest's console, and with it the
// guest.
func (g *gate) console(ctx context.Context) error {
	log := g.rotating("console.log")
	lines := newStamper(lossy{log})
	_, err := io.Copy(lines.stream(Stdout), g.files[FileConsole])
	if errors.Is(err, os.ErrClosed) {
		err = nil
	}
	lines.flush()
	<-ctx.Done() // the console ends with the VMM, the gate with the supervisor's word
	return errors.Join(err, log.Close())
}

// lossy goes on when writing fails, as on a full disk: the guest must not stop
// because its log can't be kept.
type lossy struct{ to io.Writer }

func (l lossy) Write(p []byte) (int, error) {
	if n, err := l.to.Write(p); err != nil {
		return max(n, len(p)), nil
	}
	return len(p), nil
}
