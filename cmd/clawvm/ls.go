package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host"
)

// lsGarbage is how much garbage ls lets lie, in percent of what it holds.
const lsGarbage = 400

func lsCommand() *cli.Command {
	return &cli.Command{
		Name: "ls", Aliases: []string{"ps", "list"}, Usage: "list the VMs",
		Description: "Those that are down in order are listed with --all only.",
		Flags: []cli.Flag{
			jsonFlag(),
			&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "list those that are down, too"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print names only"},
		},
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			// Reading a thousand declarations makes 50 MiB of garbage, and the process
			// ends at once: at Go's usual pace a quarter of the work is to collect it.
			debug.SetGCPercent(lsGarbage)
			entries, err := host.List(c.Context, l)
			if err != nil {
				return err
			}
			idle := 0
			if !c.Bool("all") {
				declared := len(entries)
				entries = slices.DeleteFunc(entries, host.Entry.Idle)
				idle = declared - len(entries)
			}
			switch {
			case c.Bool("json"):
				return printJSON(entries)
			case c.Bool("quiet"):
				for _, e := range entries {
					fmt.Println(e.Name)
				}
				return nil
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tSTATE\tHEALTH\tVMM\tADDRESS\tCPUS\tMEMORY\tPORTS\tUPTIME")
			for _, e := range entries {
				uptime := "-"
				if up := e.Uptime(); up > 0 {
					uptime = human(up)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Name, e.State, dash(e.Health), dash(e.VMM), dash(e.Address),
					dash(number(e.VCPUs)), dash(size(e.Memory)), dash(strings.Join(e.Ports, ", ")), uptime)
			}
			if err := w.Flush(); err != nil {
				return err
			}
			for _, e := range entries {
				if e.Problem != "" {
					fmt.Fprintf(os.Stderr, "%s: %s\n", e.Name, pasteable(c.App, l, e.Problem))
				}
				if needs, why := host.Reasons(e.Pending); needs != "" {
					fmt.Fprintf(os.Stderr, "%s: a %s is pending: %s\n", e.Name, needs, strings.Join(why, "; "))
				}
				if e.Why != "" {
					fmt.Fprintf(os.Stderr, "%s: %s\n", e.Name, pasteable(c.App, l, e.Why))
				}
			}
			if idle > 0 && onTerminal(os.Stdout) {
				fmt.Fprintf(os.Stderr, "(%d more are down: %s ls --all)\n", idle, self(l))
			}
			return nil
		},
	}
}

func printJSON(v any) error {
	enc := json.NewEncoder(os.Stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func number(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func size(bytes int64) string {
	if bytes == 0 {
		return ""
	}
	return config.Size(bytes).String()
}
