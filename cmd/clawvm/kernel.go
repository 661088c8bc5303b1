package main

import (
	"errors"
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/guest/kernel"
)

// defaultKernel is Debian's kernel for virtual machines.
const defaultKernel = "linux-image-cloud-amd64"

func kernelCommand() *cli.Command {
	return &cli.Command{
		Name: "kernel", Usage: "get and list kernels for guests",
		Subcommands: []*cli.Command{
			{
				Name: "pull", Usage: "download a distribution's kernel for guests, without installing it on the host", ArgsUsage: "[PACKAGE]",
				Description: "PACKAGE is Debian's; " + defaultKernel + " unless another is named. apt downloads it, as this machine has it set up.",
				Flags:       []cli.Flag{&cli.BoolFlag{Name: "missing", Usage: "only when there is no kernel that guests can boot, neither in the store nor the host's own"}},
				Action: func(c *cli.Context) error {
					l, err := privileged(c)
					if err != nil {
						return err
					}
					if c.Bool("missing") {
						k, err := kernel.Find("", l.Store())
						if err == nil {
							fmt.Printf("kernel %s is there (%s)\n", k.Release, k.Origin)
							return nil
						}
						if !errors.Is(err, kernel.ErrNoKernel) {
							return err
						}
					}
					pkg := c.Args().First()
					if pkg == "" {
						pkg = defaultKernel
					}
					k, err := kernel.Pull(c.Context, l.Store(), pkg, os.Stdout)
					if err != nil {
						return err
					}
					fmt.Printf("kernel %s is there\n", k.Release)
					return nil
				},
			},
			{
				Name: "ls", Usage: "list the kernels in the store", Flags: []cli.Flag{jsonFlag()},
				Action: func(c *cli.Context) error {
					l, err := privileged(c)
					if err != nil {
						return err
					}
					list, err := kernel.List(l.Store())
					if err != nil {
						return err
					}
					if c.Bool("json") {
						return printJSON(list)
					}
					w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
					fmt.Fprintln(w, "RELEASE\tIMAGE")
					for _, k := range list {
						fmt.Fprintf(w, "%s\t%s\n", k.Release, k.Image)
					}
					return w.Flush()
				},
			},
		},
	}
}
