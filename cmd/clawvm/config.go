package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host"
)

func configCommand() *cli.Command {
	return &cli.Command{
		Name: "config", Usage: "check and show declarations",
		Subcommands: []*cli.Command{
			{
				Name: "check", Usage: "say all that is wrong with declarations (all: without an argument)", ArgsUsage: "[FILE|NAME...]",
				Action: func(c *cli.Context) error {
					l, err := layout(c)
					if err != nil {
						return err
					}
					args := c.Args().Slice()
					if len(args) == 0 {
						if args, err = l.Declared(); err != nil {
							return err
						}
					}
					var errs []error
					for _, arg := range args {
						vm, err := loadDeclaration(l, arg)
						if err != nil {
							errs = append(errs, err)
							continue
						}
						fmt.Printf("%s: good\n", vm.File)
					}
					return errors.Join(errs...)
				},
			},
			{
				Name: "show", Usage: "print a declaration with all defaults filled in", ArgsUsage: "FILE|NAME",
				Flags: []cli.Flag{&cli.BoolFlag{Name: "origin", Usage: "say where each value comes from"}},
				Action: func(c *cli.Context) error {
					l, err := layout(c)
					if err != nil {
						return err
					}
					if c.NArg() != 1 {
						return usageError{errors.New("clawvm config show wants a declaration's file or the name of a VM")}
					}
					vm, err := loadDeclaration(l, c.Args().First())
					if err != nil {
						return err
					}
					return vm.Show(os.Stdout, c.Bool("origin"))
				},
			},
		},
	}
}

// loadDeclaration loads a declaration by its file or by the VM's name.
func loadDeclaration(l host.Layout, arg string) (*config.VM, error) {
	h, err := config.LoadHost(l.HostConfig())
	if err != nil {
		return nil, &host.CodedError{Code: host.ExitDeclaration, Err: err}
	}
	file := arg
	if !strings.ContainsAny(arg, "/.") {
		if file, err = l.Declaration(arg); err != nil {
			return nil, err
		}
	}
	vm, err := config.Load(file, h)
	var problems config.Problems
	if errors.As(err, &problems) && len(problems) > 1 {
		err = fmt.Errorf("there are %d problems\n%w", len(problems), problems)
	}
	if err != nil {
		return nil, &host.CodedError{Code: host.ExitDeclaration, Err: err}
	}
	return vm, nil
}
