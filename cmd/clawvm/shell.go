package main

import (
	"os"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/guest/agent"
)

// shellScript starts the best shell that the image has.
const shellScript = "command -v bash >/dev/null 2>&1 && exec bash -l || exec sh -l"

func shellCommand() *cli.Command {
	return &cli.Command{
		Name: "shell", Usage: "open a shell in a VM", ArgsUsage: "NAME",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "root", Usage: "as root of the guest, outside the workload's sandbox"},
			&cli.StringFlag{Name: "user", Aliases: []string{"u"}, Usage: "as `USER`"},
		},
		Action: func(c *cli.Context) error {
			name, err := oneName(c)
			if err != nil {
				return err
			}
			return execIn(c, name, agent.ExecRequest{
				Argv: []string{"sh", "-c", shellScript}, Root: c.Bool("root"), User: c.String("user"),
				TTY: onTerminal(os.Stdin) && onTerminal(os.Stdout),
			}, true)
		},
	}
}
