package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/host/gate"
)

func logsCommand() *cli.Command {
	return &cli.Command{
		Name: "logs", Usage: "print what the workload of VMs wrote", ArgsUsage: "NAME...",
		Description: "TIME is a duration (10m, 2h, 3d: so long ago), a time (15:04, 2026-11-22, 2026-11-22 15:04:05, with the host's\n" +
			"clock, or RFC 3339) or @SECONDS since 1970. On a terminal control characters are made visible.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on as it grows, also when the VM starts again"},
			&cli.BoolFlag{Name: "console", Usage: "the console: the guest's kernel and init"},
			&cli.BoolFlag{Name: "supervisor", Usage: "clawvm's own log of the VM"},
			&cli.IntFlag{Name: "tail", Aliases: []string{"n"}, Value: -1, Usage: "only the last `N` lines"},
			&cli.StringFlag{Name: "since", Aliases: []string{"S"}, Usage: "only what is not older than `TIME`"},
			&cli.StringFlag{Name: "until", Aliases: []string{"U"}, Usage: "only what is not newer than `TIME`"},
			&cli.BoolFlag{Name: "timestamps", Aliases: []string{"t"}, Usage: "with the time of each line"},
			&cli.BoolFlag{Name: "raw", Usage: "on a terminal too, print bytes as the guest wrote them"},
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			l, names, err := someVMs(c)
			if err != nil {
				return err
			}
			p, err := newLogPrinter(c, time.Now(), len(names) > 1)
			if err != nil {
				return err
			}
			if c.Bool("console") && c.Bool("supervisor") {
				return usageError{errors.New("--console and --supervisor are two logs: choose one")}
			}
			var sources []*logSource
			for _, name := range names {
				if _, err := host.Look(c.Context, l, name); err != nil {
					return err
				}
				file := l.VM(name).WorkloadLog()
				switch {
				case c.Bool("console"):
					file = l.VM(name).ConsoleLog()
				case c.Bool("supervisor"):
					file = l.VM(name).SupervisorLog()
				}
				s := &logSource{vm: name, log: host.ReadLog(file)}
				defer s.log.Close()
				sources = append(sources, s)
			}
			return errors.Join(p.print(c.Context, sources, c.Int("tail"), c.Bool("follow")), p.close())
		},
	}
}

// followPoll is how often a followed log is looked at: its directory belongs to
// another uid, and a look costs microseconds.
const followPoll = 250 * time.Millisecond

// logSource is the log of one VM.
type logSource struct {
	vm  string
	log *host.LogReader
}

// logPrinter prints lines of logs.
type logPrinter struct {
	out          *bufio.Writer
	text         io.Writer // out, with what a guest wrote made visible when it is a terminal
	vms          bool      // whose line it is
	stamps, json bool
	since, until time.Time // zero: no bound
	open         string    // whose line has no end yet
}

func newLogPrinter(c *cli.Context, now time.Time, several bool) (*logPrinter, error) {
	p := &logPrinter{out: bufio.NewWriter(os.Stdout), vms: several, stamps: c.Bool("timestamps"), json: c.Bool("json")}
	p.text = p.out
	// A guest must not write to its owner's screen what it likes.
	if onTerminal(os.Stdout) && !c.Bool("raw") {
		p.text = &visible{out: p.out}
	}
	for flag, at := range map[string]*time.Time{"since": &p.since, "until": &p.until} {
		if text := c.String(flag); text != "" {
			var err error
			if *at, err = parseWhen(text, now); err != nil {
				return nil, usageError{fmt.Errorf("--%s: %w", flag, err)}
			}
		}
	}
	if !p.since.IsZero() && !p.until.IsZero() && p.until.Before(p.since) {
		return nil, usageError{errors.New("--until is before --since: nothing lies between them")}
	}
	return p, nil
}

// print prints what the logs have, from the last n lines of each on (all: -1),
// in the order of time, and goes on when it is to follow.
func (p *logPrinter) print(ctx context.Context, sources []*logSource, n int, follow bool) error {
	if err := p.history(sources, n); err != nil {
		return err
	}
	for follow && (p.until.IsZero() || time.Now().Before(p.until)) {
		if err := p.out.Flush(); err != nil {
			return err
		}
		if !pause(ctx, followPoll) {
			break
		}
		for _, s := range sources {
			if err := s.each(p.line); err != nil {
				return err
			}
		}
	}
	return nil
}

// each calls f with every line that there is at the moment.
func (s *logSource) each(f func(vm string, line host.LogLine) error) error {
	for {
		line, err := s.log.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("VM %s: %w", s.vm, err)
		}
		if err := f(s.vm, line); err != nil {
			return err
		}
	}
}

// keptLine is a line with its VM.
type keptLine struct {
	vm string
	host.LogLine
}

// history prints what is there already. The logs' size is bounded, and so is what
// is held of them.
func (p *logPrinter) history(sources []*logSource, n int) error {
	if n < 0 && len(sources) == 1 {
		return sources[0].each(p.line)
	}
	var all []keptLine
	for _, s := range sources {
		var kept []keptLine
		whole := 0
		err := s.each(func(vm string, line host.LogLine) error {
			if !p.wanted(line) {
				return nil
			}
			line.Text = slices.Clone(line.Text)
			kept = append(kept, keptLine{vm, line})
			if !line.Partial {
				whole++
			}
			for n >= 0 && whole > n {
				if !kept[0].Partial {
					whole--
				}
				kept = kept[1:]
			}
			return nil
		})
		if err != nil {
			return err
		}
		if n == 0 {
			kept = nil
		}
		all = append(all, kept...)
	}
	slices.SortStableFunc(all, func(a, b keptLine) int { return a.Time.Compare(b.Time) })
	for _, k := range all {
		if err := p.line(k.vm, k.LogLine); err != nil {
			return err
		}
	}
	return nil
}

func (p *logPrinter) wanted(line host.LogLine) bool {
	return (p.since.IsZero() || !line.Time.Before(p.since)) && (p.until.IsZero() || !line.Time.After(p.until))
}

// jsonLine is a line as --json prints it.
type jsonLine struct {
	Time    *time.Time  `json:"time,omitempty"`
	VM      string      `json:"vm"`
	Stream  gate.Stream `json:"stream,omitempty"`
	Text    string      `json:"text"`
	Partial bool        `json:"partial,omitempty"`
}

// line prints one line, or a part of one, when it is wanted.
func (p *logPrinter) line(vm string, line host.LogLine) error {
	if !p.wanted(line) {
		return nil
	}
	if p.json {
		j := jsonLine{VM: vm, Stream: line.Stream, Text: string(line.Text), Partial: line.Partial}
		if !line.Time.IsZero() {
			j.Time = &line.Time
		}
		return json.NewEncoder(p.out).Encode(j)
	}
	whose := vm + " " + string(line.Stream)
	if p.open != "" && p.open != whose {
		if err := p.endLine(); err != nil {
			return err
		}
	}
	if p.open == "" {
		var head string
		if p.vms {
			head = vm + " | "
		}
		if p.stamps && !line.Time.IsZero() {
			head += line.Time.UTC().Format(gate.StampFormat) + " "
		}
		if _, err := p.out.WriteString(head); err != nil {
			return err
		}
	}
	if _, err := p.text.Write(line.Text); err != nil {
		return err
	}
	if p.open = whose; line.Partial {
		return nil
	}
	return p.endLine()
}

// endLine ends a line.
func (p *logPrinter) endLine() error {
	p.open = ""
	_, err := p.text.Write([]byte{'\n'})
	return err
}

// close writes what waits.
func (p *logPrinter) close() error {
	if v, ok := p.text.(*visible); ok {
		if err := v.Close(); err != nil {
			return err
		}
	}
	return p.out.Flush()
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

// whenFormats are the ways to write a time, on the host's clock but for the first.
var whenFormats = []string{time.RFC3339Nano, "2006-01-02 15:04:05", "2006-01-02T15:04:05", "2006-01-02 15:04", "2006-01-02"}

// parseWhen reads a time as docker logs and journalctl take it.
func parseWhen(text string, now time.Time) (time.Time, error) {
	ago := text
	if days, ok := strings.CutSuffix(text, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			ago = fmt.Sprintf("%dh", 24*n)
		}
	}
	if d, err := time.ParseDuration(ago); err == nil {
		if d < 0 {
			return time.Time{}, fmt.Errorf("%s is in the future", text)
		}
		return now.Add(-d), nil
	}
	if seconds, ok := strings.CutPrefix(text, "@"); ok {
		if n, err := strconv.ParseInt(seconds, 10, 64); err == nil {
			return time.Unix(n, 0), nil
		}
	}
	for _, f := range whenFormats {
		if t, err := time.ParseInLocation(f, text, now.Location()); err == nil {
			return t, nil
		}
	}
	for _, f := range []string{"15:04:05", "15:04"} {
		if t, err := time.Parse(f, text); err == nil {
			y, m, d := now.Date()
			return time.Date(y, m, d, t.Hour(), t.Minute(), t.Second(), 0, now.Location()), nil
		}
	}
	return time.Time{}, fmt.Errorf("cannot read %q as a time: 10m and 3d are so long ago, 15:04 is today, 2026-11-22 15:04:05 a day's", text)
}
