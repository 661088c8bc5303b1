package main

import (
	"fmt"
	"os"
	"os/user"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func allowCommand() *cli.Command {
	return &cli.Command{
		Name: "allow", Usage: "let a VM that is up reach more, for a time or until it is taken down", ArgsUsage: "NAME [HOST...]",
		Description: "A HOST is what egress.allow takes: a name, *.example.com, an address or network, HOST:PORT, a bundle.\n" +
			"Without one, what the VM may reach is printed. The declaration stays as it is.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "for", Usage: "for `TIME` alone, such as 10m"},
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			if c.IsSet("for") && (c.Duration("for") < time.Second || c.NArg() < 2) {
				return usageError{fmt.Errorf("clawvm allow --for wants a HOST, and a time of a second or more")}
			}
			return changeReach(c, func(client *host.Client, hosts []string) (host.Reach, error) {
				if len(hosts) == 0 {
					return client.Reach(c.Context)
				}
				return client.Allow(c.Context, hosts, c.Duration("for"), caller())
			})
		},
	}
}

func denyCommand() *cli.Command {
	return &cli.Command{
		Name: "deny", Usage: "take from a VM that is up something that it may reach, until it is taken down", ArgsUsage: "NAME HOST...",
		Description: "A HOST is an entry of its list, as `clawvm allow NAME` prints it; without ports, all entries of that name.\n" +
			"Its connections are cut. The declaration stays as it is.",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			if c.NArg() == 1 {
				return usageError{fmt.Errorf("clawvm deny wants a HOST")}
			}
			return changeReach(c, func(client *host.Client, hosts []string) (host.Reach, error) {
				return client.Deny(c.Context, hosts, caller())
			})
		},
	}
}

// changeReach does something about what the VM may reach that the command line
// names, and prints what that is then.
func changeReach(c *cli.Context, do func(*host.Client, []string) (host.Reach, error)) error {
	l, err := privileged(c)
	if err != nil {
		return err
	}
	if !c.Args().Present() {
		return usageError{fmt.Errorf("%s wants the name of a VM", commandName(c))}
	}
	name, err := validName(c.Args().First())
	if err != nil {
		return err
	}
	if _, err := host.Look(c.Context, l, name); err != nil {
		return err
	}
	r, err := do(l.Dial(name), c.Args().Tail())
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(r)
	}
	printReach(r)
	return nil
}

func printReach(r host.Reach) {
	if r.Mode != "allowlist" {
		fmt.Printf("%s: egress mode %s\n", r.Name, r.Mode)
		return
	}
	if len(r.Allow) == 0 {
		fmt.Printf("%s may reach nothing\n", r.Name)
	}
	for _, e := range r.Allow {
		switch {
		case e.Denied:
			fmt.Printf("%s  denied until %s is taken down\n", e.Entry, r.Name)
		case e.Declared:
			fmt.Println(e.Entry)
		case e.Until.IsZero():
			fmt.Printf("%s  until %s is taken down\n", e.Entry, r.Name)
		default:
			fmt.Printf("%s  until %s\n", e.Entry, e.Until.Local().Format(time.DateTime))
		}
	}
}

// caller is who runs the command, for the record.
func caller() string {
	if name := os.Getenv("SUDO_USER"); name != "" {
		return name
	}
	u, err := user.Current()
	if err != nil {
		return fmt.Sprintf("uid %d", os.Getuid())
	}
	return u.Username
}
