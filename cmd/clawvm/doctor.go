package main

import (
	"errors"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/host/doctor"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name: "doctor", Usage: "look whether the host can run VMs, and what one's next start would do", ArgsUsage: "[NAME]",
		Description: "Changes nothing. Without root it says what it could not look at.\n" +
			"Each VM's name servers are asked one question. With NAME, only that VM is looked at.\n" +
			"Exit codes: 0 nothing is wrong, 10 warnings only, 1 errors.",
		Flags: []cli.Flag{
			jsonFlag(),
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print only what is wrong or could not be looked at"},
			&cli.DurationFlag{Name: "timeout", Value: doctor.DefaultLimit, Usage: "give each look `TIME`; they go on side by side"},
			&cli.BoolFlag{Name: "verify", Usage: "read every image whole; takes seconds for each GiB"},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 1 {
				return usageError{errors.New("clawvm doctor wants the name of one VM, or none")}
			}
			o := doctor.Options{Verify: c.Bool("verify"), Limit: c.Duration("timeout")}
			var err error
			if c.Args().Present() {
				if o.VM, err = validName(c.Args().First()); err != nil {
					return err
				}
			}
			if o.Layout, err = host.LookLayout(rootOf(c)); err != nil {
				return err
			}
			findings, err := doctor.Run(c.Context, o)
			if err != nil {
				return err
			}
			for i := range findings {
				findings[i].Do = pasteable(c.App, o.Layout, findings[i].Do)
			}
			if c.Bool("json") {
				err = printJSON(findings)
			} else {
				err = doctor.Print(os.Stdout, findings, c.Bool("quiet"))
			}
			switch worst := doctor.Worst(findings); {
			case err != nil:
				return err
			case worst == doctor.Error:
				return silent{host.ExitFailed}
			case worst == doctor.Warning:
				return silent{host.ExitWarnings}
			}
			return nil
		},
	}
}
