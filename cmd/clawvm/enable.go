package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func enableCommand() *cli.Command {
	return &cli.Command{
		Name: "enable", Usage: "let systemd bring VMs up at boot", ArgsUsage: "NAME...",
		Description: "What systemctl enable clawvm@NAME does. A VM that is up without systemd stays so until its next start.",
		Flags:       []cli.Flag{&cli.BoolFlag{Name: "now", Usage: "bring them up too"}},
		Action: func(c *cli.Context) error {
			l, names, err := declaredVMs(c)
			if err != nil {
				return err
			}
			err = withUnits(c.Context, l, "enable", names, func(units *host.Units, name string) error {
				if err := units.Enable(c.Context, name); err != nil {
					return err
				}
				fmt.Printf("%s is enabled: systemd brings it up at boot\n", name)
				return nil
			})
			if err != nil || !c.Bool("now") {
				return err
			}
			if err := checkAll(c.Context, l, names, false); err != nil {
				return err
			}
			return upAll(c.Context, l, names, true)
		},
	}
}

func disableCommand() *cli.Command {
	return &cli.Command{
		Name: "disable", Usage: "bring VMs up at boot no more", ArgsUsage: "NAME...",
		Description: "A VM that is up stays up.",
		Flags:       []cli.Flag{&cli.BoolFlag{Name: "now", Usage: "take them down too"}},
		Action: func(c *cli.Context) error {
			l, names, err := someVMs(c)
			if err != nil {
				return err
			}
			err = withUnits(c.Context, l, "disable", names, func(units *host.Units, name string) error {
				if err := units.Disable(c.Context, name); err != nil {
					return err
				}
				fmt.Printf("%s is disabled\n", name)
				return nil
			})
			if err != nil || !c.Bool("now") {
				return err
			}
			return downAll(c.Context, l, names, defaultDown, true)
		},
	}
}

// declaredVMs are the VMs that the command line names, all of them declared.
func declaredVMs(c *cli.Context) (host.Layout, []string, error) {
	l, names, err := someVMs(c)
	for i := 0; err == nil && i < len(names); i++ {
		_, err = l.Declaration(names[i])
	}
	return l, names, err
}

// withUnits does something to the unit of each VM.
func withUnits(ctx context.Context, l host.Layout, verb string, names []string, do func(*host.Units, string) error) error {
	units, err := host.OpenUnits(ctx, l)
	if err != nil {
		return fmt.Errorf("cannot %s VM %s: %w", verb, names[0], err)
	}
	defer units.Close()
	for _, n := range names {
		if err := do(units, n); err != nil {
			return err
		}
	}
	return nil
}
