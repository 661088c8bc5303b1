package main

import (
	"encoding/json"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/network/egress"
)

func netCommand() *cli.Command {
	return &cli.Command{
		Name: "net", Usage: "print a VM's queries and connections", ArgsUsage: "NAME",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on as they come"},
			&cli.BoolFlag{Name: "denied", Usage: "print what was refused alone"},
			&cli.BoolFlag{Name: "json", Usage: "print JSON lines, as they are kept"},
		},
		Action: func(c *cli.Context) error {
			l, name, err := oneVM(c)
			if err != nil {
				return err
			}
			if _, err := host.Look(c.Context, l, name); err != nil {
				return err
			}
			each := func(e egress.Event) error { return egress.Print(os.Stdout, e, onTerminal(os.Stdout)) }
			if c.Bool("json") {
				enc := json.NewEncoder(os.Stdout)
				each = func(e egress.Event) error { return enc.Encode(e) }
			}
			if c.Bool("denied") {
				all := each
				each = func(e egress.Event) error {
					if e.Verdict != egress.Refused {
						return nil
					}
					return all(e)
				}
			}
			return egress.Read(c.Context, l.VM(name).NetLog(), c.Bool("follow"), each)
		},
	}
}
