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
				err = printStatus(c.App, l, e)
			}
			if err == nil && e.State != host.Running {
				err = silent{host.ExitNotRunning}
			}
			return err
		},
	}
}

func printStatus(app *cli.App, l host.Layout, e host.Entry) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	row := func(key, value string) {
		if value != "" {
			fmt.Fprintf(w, "  %s\t%s\n", key, pasteable(app, l, value))
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
	if !e.Again.IsZero() {
		state += fmt.Sprintf(", starting again in %s", human(max(time.Until(e.Again), 0)))
	}
	row("state", state)
	row("health", e.Health)
	row("why", e.Why)
	row("problem", e.Problem)
	end, faults := e.End, e.Faults
	if end == nil {
		end = e.Previous
	} else {
		faults = end.Faults
	}
	if end != nil {
		row("last end", end.String())
	}
	for i := len(faults) - 1; i >= 0; i-- { // the last one first
		key := ""
		if i == len(faults)-1 {
			key = "faults"
		}
		fmt.Fprintf(w, "  %s\t%s\n", key, pasteable(app, l, faults[i].String()))
	}
	if !e.Ready.IsZero() {
		row("ready", fmt.Sprintf("%s after its start", human(e.Ready.Sub(e.Started))))
	}
	if c := e.Check; c != nil {
		found := "passes since"
		if c.Failures > 0 {
			found = c.String() + "; at"
		}
		row("check", found+" "+c.Time.Local().Format(time.DateTime))
	}
	row("vmm", e.VMM)
	row("address", e.Address)
	row("cpus", number(e.VCPUs))
	row("memory", size(e.Memory))
	row("ports", strings.Join(e.Ports, ", "))
	row("image", e.Image)
	row("kernel", e.Kernel)
	row("reboots", number(e.Reboots))
	row("restarts", counted(e.VMRestarts, "of the VM", e.Restarts, "of the workload"))
	row("workload", e.Workload)
	row("agent", e.Lost)
	if e.Enabled {
		row("at boot", "systemd brings it up, as "+host.Unit(e.Name))
	}
	row("supervisor", number(e.PID))
	for _, p := range e.Pending {
		row(p.Needs+" pending", p.String())
	}
	if m := e.Made; m != nil {
		row("clawvm", m.Clawvm)
	}
	if e.Limits != nil {
		row("limits", e.Limits.String())
		row("cgroup", e.Limits.Cgroup)
	}
	row("logs", l.VM(e.Name).Log)
	if err := w.Flush(); err != nil {
		return err
	}
	for _, log := range lastWords(l, e) {
		lines, err := host.Tail(log.path, statusLines)
		if err != nil {
			return err
		}
		if len(lines) > 0 {
			fmt.Printf("  the end of what %s said:\n", log.who)
		}
		for _, line := range lines {
			fmt.Println("  |", line)
		}
	}
	return nil
}

// namedLog is a log, and who wrote it.
type namedLog struct{ who, path string }

// lastWords are the logs whose ends explain the VM's state: the workload's, and
// of a VM that is not as it should be those of who keeps it and runs it, too.
func lastWords(l host.Layout, e host.Entry) []namedLog {
	p := l.VM(e.Name)
	logs := []namedLog{{"the workload", p.WorkloadLog()}}
	if e.State == host.Failed || e.State == host.Restarting || e.Health == host.HealthCrashLoop || e.Health == host.HealthUnreachable {
		logs = append(logs, namedLog{"the guest's console", p.ConsoleLog()}, namedLog{"the supervisor", p.SupervisorLog()})
	}
	return logs
}

// counted is numbers with what they count, those that are not 0.
func counted(n int, of string, m int, alsoOf string) string {
	var parts []string
	for _, c := range []struct {
		n  int
		of string
	}{{n, of}, {m, alsoOf}} {
		if c.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", c.n, c.of))
		}
	}
	return strings.Join(parts, ", ")
}

// statusLines is how many of a log's last lines status shows.
const statusLines = 5
