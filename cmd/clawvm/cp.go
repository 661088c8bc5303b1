package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/guest/tree"
	"github.com/clawvm/clawvm/host"
)

func cpCommand() *cli.Command {
	return &cli.Command{
		Name: "cp", Usage: "copy files to, from or between VMs", ArgsUsage: "[NAME:]SOURCE [NAME:]DESTINATION",
		Description: "One of the two at least is in a VM: NAME:PATH. As with docker cp: into DESTINATION when it is a directory, else in\n" +
			"its place; DIR/. is what is in DIR; - is a tar stream on standard input or output. Files are read and written\n" +
			"in the VM as its workload could. What a VM sends is written beneath DESTINATION and nowhere else.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "archive", Aliases: []string{"a"}, Usage: "keep owners (into a VM: with --root)"},
			&cli.BoolFlag{Name: "follow-link", Aliases: []string{"L"}, Usage: "when SOURCE is a symbolic link, copy what it leads to"},
			&cli.BoolFlag{Name: "root", Usage: "as root of the guest, outside the workload's sandbox"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "show no progress on a terminal"},
		},
		Action: copyFiles,
	}
}

func copyFiles(c *cli.Context) error {
	l, err := privileged(c)
	if err != nil {
		return err
	}
	if c.NArg() != 2 {
		return usageError{errors.New("clawvm cp wants a source and a destination, one of them in a VM: NAME:PATH")}
	}
	from, err := parsePlace(c.Args().Get(0))
	if err != nil {
		return err
	}
	to, err := parsePlace(c.Args().Get(1))
	if err != nil {
		return err
	}
	switch {
	case from.VM == "" && to.VM == "":
		return usageError{fmt.Errorf("neither %s nor %s is in a VM: one is NAME:PATH", from, to)}
	case to.VM != "" && c.Bool("archive") && !c.Bool("root"):
		return usageError{errors.New("--archive sets owners, which in a VM only root can: add --root, or leave it away")}
	case to.Path == "-" && to.VM == "" && onTerminal(os.Stdout):
		return usageError{errors.New("standard output is a terminal, and a tar stream would spoil it: redirect it")}
	case from.Path == "-" && from.VM == "" && onTerminal(os.Stdin):
		return usageError{errors.New("standard input is a terminal, and not a tar stream: redirect it")}
	}
	// The end of the terminal ends the copy in order too.
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGHUP)
	defer stop()
	count := &tree.Count{}
	show := newCopyScreen(count, c.Bool("quiet"))
	err = host.Copy(ctx, l, from, to, host.CopyOptions{
		Follow: c.Bool("follow-link"), Owners: c.Bool("archive"), Root: c.Bool("root"), Self: self(l),
		Stdin: os.Stdin, Stdout: os.Stdout, Warn: show.warn, Count: count,
	})
	show.end(err)
	return err
}

// parsePlace reads NAME:PATH, a path of the host, or -. A path with a colon in it
// is the host's when it has a slash before it.
func parsePlace(arg string) (host.Place, error) {
	name, path, inVM := strings.Cut(arg, ":")
	if !inVM || strings.Contains(name, "/") {
		if arg == "" {
			return host.Place{}, usageError{errors.New("an empty path names nothing")}
		}
		return host.Place{Path: arg}, nil
	}
	if err := config.ValidName(name); err != nil {
		return host.Place{}, usageError{fmt.Errorf("%w (a path of the host with a colon in it is written ./%s)", err, onScreen(arg))}
	}
	if path == "" {
		return host.Place{}, usageError{fmt.Errorf("%s: names no path in the VM, as in %s:/tmp", name, name)}
	}
	return host.Place{VM: name, Path: path}, nil
}

// copyTick is how often the progress of a copy is shown.
const copyTick = 200 * time.Millisecond

// copyScreen shows what a copy has done, on a terminal only.
type copyScreen struct {
	*screen
	count *tree.Count
	began time.Time
	stop  chan struct{}
	done  sync.WaitGroup
}

func newCopyScreen(count *tree.Count, quiet bool) *copyScreen {
	s := &copyScreen{screen: newScreen(os.Stderr, false), count: count, began: time.Now(), stop: make(chan struct{})}
	if quiet {
		s.terminal = false
	}
	if s.terminal {
		s.done.Go(s.tick)
	}
	return s
}

func (s *copyScreen) tick() {
	t := time.NewTicker(copyTick)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
			s.passing("", s.text())
		}
	}
}

func (s *copyScreen) text() string {
	text := approximate(s.count.Bytes()) + " in " + human(time.Since(s.began))
	if n := s.count.Entries(); n == 1 {
		text = "1 file, " + text
	} else if n > 0 {
		text = fmt.Sprintf("%d files, %s", n, text)
	}
	return text
}

func (s *copyScreen) warn(text string) { s.line("", "clawvm: "+onScreen(text)) }

// end takes the progress away; a copy that worked says how much it was.
func (s *copyScreen) end(err error) {
	close(s.stop)
	s.done.Wait()
	s.mu.Lock()
	s.clear()
	s.mu.Unlock()
	if s.terminal && err == nil {
		s.line("", "copied "+s.text())
	}
}

// approximate is a number of bytes for people.
func approximate(n int64) string {
	for _, u := range []struct {
		name string
		size int64
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.size {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.size), u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
