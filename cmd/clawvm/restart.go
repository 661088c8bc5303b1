package main

import (
	"github.com/urfave/cli/v2"
)

func restartCommand() *cli.Command {
	return &cli.Command{
		Name: "restart", Usage: "take VMs down, and up again", ArgsUsage: "NAME...",
		Description: "A declaration that can't come up again is said before anything is taken down.",
		Flags:       []cli.Flag{timeoutFlag()},
		Action: func(c *cli.Context) error {
			l, names, err := someVMs(c)
			if err != nil {
				return err
			}
			if err := checkAll(c.Context, l, names, true); err != nil {
				return err
			}
			if err := downAll(c.Context, l, names, graceOf(c), false); err != nil {
				return err
			}
			return upAll(c.Context, l, names, true)
		},
	}
}
