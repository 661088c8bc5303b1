package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func logsCommand() *cli.Command {
	return &cli.Command{
		Name: "logs", Usage: "print what a VM's workload wrote", ArgsUsage: "NAME",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on as it grows"},
			&cli.BoolFlag{Name: "console", Usage: "the console: the guest's kernel and init"},
			&cli.BoolFlag{Name: "supervisor", Usage: "clawvm's own log of the VM"},
			&cli.IntFlag{Name: "tail", Aliases: []string{"n"}, Value: -1, Usage: "only the last `N` lines"},
		},
		Action: func(c *cli.Context) error {
			l, name, err := oneVM(c)
			if err != nil {
				return err
			}
			if _, err := host.Look(c.Context, l, name); err != nil {
				return err
			}
			p := l.VM(name)
			file := p.WorkloadLog()
			switch {
			case c.Bool("console") && c.Bool("supervisor"):
				return usageError{errors.New("--console and --supervisor are two logs: choose one")}
			case c.Bool("console"):
				file = p.ConsoleLog()
			case c.Bool("supervisor"):
				file = p.SupervisorLog()
			}
			return printLog(c.Context, os.Stdout, file, c.Int("tail"), c.Bool("follow"))
		},
	}
}

// followPoll is how often a followed log is looked at: its directory belongs to
// another uid, and a look costs microseconds.
const followPoll = 250 * time.Millisecond

// printLog prints a log from its last n lines on (all: -1). On a terminal control
// characters are made visible: a guest must not write to its owner's screen what
// it likes.
func printLog(ctx context.Context, out *os.File, path string, n int, follow bool) error {
	var w io.Writer = out
	if onTerminal(out) {
		v := &visible{out: out}
		defer v.Close()
		w = v
	}
	f, err := host.OpenLog(path)
	for errors.Is(err, fs.ErrNotExist) {
		if !follow {
			return nil
		}
		if !pause(ctx, followPoll) {
			return nil
		}
		f, err = host.OpenLog(path)
	}
	if err != nil {
		return fmt.Errorf("cannot read the log: %w", err)
	}
	defer func() { f.Close() }()
	if n >= 0 {
		if err := seekLines(f, n); err != nil {
			return err
		}
	}
	for {
		if _, err := io.Copy(w, f); err != nil {
			return err
		}
		if !follow || !pause(ctx, followPoll) {
			return nil
		}
		// Rotated: the rest of the old one is printed, then the new one.
		if now, err := os.Lstat(path); err == nil {
			if have, err := f.Stat(); err == nil && !os.SameFile(now, have) {
				if _, err := io.Copy(w, f); err != nil {
					return err
				}
				next, err := host.OpenLog(path)
				if err != nil {
					return fmt.Errorf("cannot read the log: %w", err)
				}
				f.Close()
				f = next
			}
		}
	}
}

// pause waits, and says whether the context still lives.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// seekLines places f before its last n lines.
func seekLines(f *os.File, n int) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	const block = 16 << 10
	buf := make([]byte, block)
	lines := -1 // the file's last newline ends a line, it does not begin one
	for at := end; at > 0; {
		size := min(at, block)
		at -= size
		if _, err := f.ReadAt(buf[:size], at); err != nil {
			return err
		}
		for i := size - 1; i >= 0; i-- {
			if buf[i] != '\n' && at+i == end-1 {
				lines++ // an unfinished last line
			}
			if buf[i] == '\n' {
				if lines++; lines == n {
					_, err := f.Seek(at+i+1, io.SeekStart)
					return err
				}
			}
		}
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}
