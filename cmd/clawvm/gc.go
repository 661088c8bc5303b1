package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func gcCommand() *cli.Command {
	return &cli.Command{
		Name: "gc", Usage: "remove what killed VMs left behind",
		Description: "Touches only what carries this root's mark, and nothing of a VM that is up.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "also remove the bridge and the packet filter tables, when no VM is up"},
		},
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			removed, err := host.Collect(c.Context, l, c.Bool("all"))
			for _, r := range removed {
				fmt.Println("removed:", r)
			}
			if err == nil && len(removed) == 0 {
				fmt.Println("nothing was left behind")
			}
			return err
		},
	}
}
