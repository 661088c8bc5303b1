package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func reloadCommand() *cli.Command {
	return &cli.Command{
		Name: "reload", Usage: "apply changed declarations to VMs that are up, as far as that can be done", ArgsUsage: "NAME...",
		Description: "Secrets, published ports, nameservers and egress change at once. The rest is listed, and holds from the\n" +
			"next start on. A declaration with a mistake changes nothing.",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			l, names, err := someVMs(c)
			if err != nil {
				return err
			}
			list := []host.Reload{}
			var errs []error
			for _, n := range names {
				if _, err := host.Look(c.Context, l, n); err != nil {
					errs = append(errs, err)
					continue
				}
				r, err := l.Dial(n).Reload(c.Context)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				list = append(list, r)
			}
			if c.Bool("json") {
				errs = append(errs, printJSON(list))
			} else {
				for _, r := range list {
					printReload(self(l), r)
				}
			}
			return errors.Join(errs...)
		},
	}
}

func printReload(self string, r host.Reload) {
	if len(r.Applied)+len(r.Pending) == 0 {
		fmt.Printf("%s: nothing has changed\n", r.Name)
	}
	for _, c := range r.Applied {
		fmt.Printf("%s: %s\n", r.Name, c)
	}
	for _, c := range r.Pending {
		fmt.Printf("%s: %s: needs %s restart %s\n", r.Name, c, self, r.Name)
	}
}
