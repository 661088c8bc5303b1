package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func rmCommand() *cli.Command {
	return &cli.Command{
		Name: "rm", Usage: "forget VMs that are down: overlay, logs, address, kept secrets", ArgsUsage: "NAME...",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "volumes", Aliases: []string{"v"}, Usage: "remove the volumes too, with all that is on them"},
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "take a VM that is up down first"},
		},
		Action: func(c *cli.Context) error {
			l, names, err := someVMs(c)
			if err != nil {
				return err
			}
			for _, n := range names {
				if c.Bool("force") {
					if err := downOne(c.Context, l, n, defaultDown, false); err != nil {
						return err
					}
				}
				kept, err := host.Remove(c.Context, l, n, c.Bool("volumes"))
				if err != nil {
					return err
				}
				if err := host.DisableGone(c.Context, l, n); err != nil {
					return err
				}
				fmt.Printf("%s is removed\n", n)
				for _, k := range kept {
					fmt.Printf("  kept: %s (clawvm rm --volumes %s removes it)\n", k, n)
				}
			}
			return nil
		},
	}
}
