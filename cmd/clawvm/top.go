package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

// How long processor time is counted before it is shown.
const (
	topFirst = time.Second
	topEvery = 2 * time.Second
)

func topCommand() *cli.Command {
	return &cli.Command{
		Name: "top", Usage: "show what VMs take of the host", ArgsUsage: "[NAME...]",
		Description: "Without a name, all that are up. On a terminal it is shown anew every two seconds, until ^C;\n" +
			"elsewhere, and with --json, once. CPU is in percent of one processor.",
		Flags: []cli.Flag{jsonFlag(), &cli.BoolFlag{Name: "no-stream", Usage: "show it once"}},
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			var names []string
			if c.Args().Present() {
				if names, err = someNames(c); err != nil {
					return err
				}
			}
			top, err := host.NewTop(l)
			if err != nil {
				return err
			}
			if _, err := top.Look(c.Context, names); err != nil {
				return err
			}
			stream := onTerminal(os.Stdout) && !c.Bool("no-stream") && !c.Bool("json")
			for wait := topFirst; ; wait = topEvery {
				select {
				case <-time.After(wait):
				case <-c.Context.Done():
					return nil
				}
				list, err := top.Look(c.Context, names)
				if err != nil && c.Context.Err() != nil && errors.Is(err, c.Context.Err()) {
					return nil
				}
				if err != nil {
					return err
				}
				switch {
				case c.Bool("json"):
					return printJSON(list)
				case !stream:
					return printTop(os.Stdout, list)
				}
				var page strings.Builder
				if err := printTop(&page, list); err != nil {
					return err
				}
				fmt.Print(overwrite(page.String()))
			}
		},
	}
}

// overwrite is a page that takes the terminal's place of the one before, without
// a moment in which it is empty (ECMA-48 CUP, EL, ED).
func overwrite(page string) string {
	return "\x1b[H" + strings.ReplaceAll(page, "\n", "\x1b[K\n") + "\x1b[J"
}

// printTop prints a line for each VM.
func printTop(out io.Writer, list []host.Usage) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tSTATE\tCPU\tMEMORY\tOF\tIN\tOUT\tREAD\tWRITTEN\tDISK\tTASKS")
	for _, u := range list {
		fmt.Fprintf(w, "%s\t%s\t%.1f%%\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\n", u.Name, u.State, u.CPU,
			amount(uint64(u.Memory)), amount(uint64(u.MemoryMax)), amount(u.Received), amount(u.Sent),
			amount(u.Read), amount(u.Written), amount(uint64(u.Disk)), u.Tasks)
	}
	return w.Flush()
}

// amount is a number of bytes for people, such as 1.5GiB.
func amount(bytes uint64) string { return strings.ReplaceAll(humanize.IBytes(bytes), " ", "") }
