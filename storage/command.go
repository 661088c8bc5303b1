package storage

import (
	"bytes"
	"context"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// maxOutput bounds what is kept of a program's output: it may print what a
// guest wrote.
const maxOutput = 64 << 10

// killDelay is how long a killed program's output is waited for.
const killDelay = 2 * time.Second

// boundedBuffer keeps the beginning of what is written to it.
type boundedBuffer struct{ text bytes.Buffer }

func (b *boundedBuffer) Write(p []byte) (int, error) {
	if room := maxOutput - b.text.Len(); room > 0 {
		b.text.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// runShort runs a program to its end and returns its output, bounded. The
// program runs in the C locale and is killed when the command's context ends
// or this process dies.
func runShort(ctx context.Context, cmd *exec.Cmd) (output string, err error) {
	var out boundedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.WaitDelay = killDelay
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	done := make(chan error, 1)
	go func() {
		// The signal is sent when the thread that started the program
		// ends, so that thread waits here.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- cmd.Run()
	}()
	err = <-done
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return out.text.String(), err
}

// excerpt returns the beginning of a program's output on one line, for a
// message, with what isn't printable made harmless.
func excerpt(output string) string {
	const shown = 300
	clean := strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case r < ' ' || r > '~':
			return '?'
		}
		return r
	}, output)
	clean = strings.Join(strings.Fields(clean), " ")
	if len(clean) > shown {
		clean = clean[:shown] + "…"
	}
	return clean
}
