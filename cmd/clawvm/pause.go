package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func pauseCommand() *cli.Command {
	return &cli.Command{
		Name: "pause", Usage: "stop VMs where they stand, out of their guests' reach", ArgsUsage: "NAME...",
		Description: "Processors and VMM stand still until `clawvm resume`; nothing in the guest is asked. Ports stay open and wait.\n" +
			"`clawvm down` lets a paused VM go on to end in order; `clawvm down --timeout 0` kills it as it is.",
		Action: func(c *cli.Context) error {
			return eachVM(c, "paused", "paused already", (*host.Client).Pause)
		},
	}
}

func resumeCommand() *cli.Command {
	return &cli.Command{
		Name: "resume", Aliases: []string{"unpause"}, Usage: "let paused VMs go on, with their clocks set", ArgsUsage: "NAME...",
		Action: func(c *cli.Context) error {
			return eachVM(c, "resumed", "not paused", (*host.Client).Resume)
		},
	}
}

// eachVM asks for something of each VM that the command line names, one after the
// other, and says which it changed.
func eachVM(c *cli.Context, done, already string, do func(*host.Client, context.Context) (bool, error)) error {
	l, names, err := someVMs(c)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if _, err := host.Look(c.Context, l, n); err != nil {
			errs = append(errs, err)
			continue
		}
		changed, err := do(l.Dial(n), c.Context)
		switch {
		case err != nil:
			errs = append(errs, err)
		case changed:
			fmt.Printf("%s is %s\n", n, done)
		default:
			fmt.Printf("%s is %s\n", n, already)
		}
	}
	return errors.Join(errs...)
}
