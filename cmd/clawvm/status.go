package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name: "status", Usage: "say what a VM is doing, and why", ArgsUsage: "NAME",
		Description: "Exit codes: 0 ready, 3 not ready or down, 4 no such VM.",
		Flags:       []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			l, name, err := oneVM(c)
			if err != nil {
				return err
			}
			e, err := host.Look(c.Context, l, name)
			if err != nil {
				return err
			}
			if c.Bool("json") {
				err = printJSON(e)
			} else {
				err = printStatus(l, e)
			}
			if err == nil && e.State != host.Running {
				err = silent{host.ExitNotRunning}
			}
			return err
		},
	}
}

func printStatus(l host.Layout, e host.Entry) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	row := func(key, value string) {
		if value != "" {
			fmt.Fprintf(w, "  %s\t%s\n", key, value)
		}
	}
	state := string(e.State)
	if e.Step != "" {
		state += " (" + e.Step + ")"
	}
	if up := e.Uptime(); up > 0 {
		state += ", started " + human(up) + " ago"
	}
	fmt.Fprintf(w, "%s\n", e.Name)
	row("state", state)
	row("problem", e.Problem)
	if e.End != nil {
		why := e.End.Reason
		if why == "" {
			why = "as asked"
		}
		row("last end", fmt.Sprintf("%s, exit code %d: %s", e.End.Time.Local().Format(time.DateTime), e.End.Code, why))
	}
	if !e.Ready.IsZero() {
		row("ready", fmt.Sprintf("%s after its start", human(e.Ready.Sub(e.Started))))
	}
	row("vmm", e.VMM)
	row("address", e.Address)
	row("cpus", number(e.VCPUs))
	row("memory", size(e.Memory))
	row("ports", strings.Join(e.Ports, ", "))
	row("image", e.Image)
	row("kernel", e.Kernel)
	row("reboots", number(e.Reboots))
	row("restarts", number(e.Restarts))
	row("workload", e.Workload)
	row("agent", e.Lost)
	row("supervisor", number(e.PID))
	row("logs", l.VM(e.Name).Log)
	if err := w.Flush(); err != nil {
		return err
	}
	lines, err := host.Tail(l.VM(e.Name).WorkloadLog(), statusLines)
	if err != nil {
		return err
	}
	for _, line := range lines {
		fmt.Println("  |", line)
	}
	return nil
}

// statusLines is how many of the workload's last lines status shows.
const statusLines = 5
