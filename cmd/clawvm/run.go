package main

import (
	"errors"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name:      "run",
		Usage:     "be the supervisor of a VM, in the foreground (what a unit starts)",
		ArgsUsage: "NAME",
		Description: "Ends with the VM. SIGTERM takes it down in order. Exit codes: 0 asked to end or powered off,\n" +
			"78 the declaration is wrong, 124 not ready in time, else the workload's own or 1.",
		Action: func(c *cli.Context) error {
			l, name, err := oneVM(c)
			if err != nil {
				return err
			}
			if err := host.EnterMountNamespace(); err != nil {
				return err
			}
			out, err := host.SupervisorOutput(l, name, os.Stderr)
			if err != nil {
				return err
			}
			err = host.Supervise(c.Context, l, name, out)
			code := host.UnitExit(err)
			var logged *host.LoggedError
			if errors.As(err, &logged) {
				return silent{code}
			}
			return err
		},
	}
}
