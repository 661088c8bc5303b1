package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/secrets"
)

func secretCommand() *cli.Command {
	return &cli.Command{
		Name: "secret", Usage: "give, list and rotate secrets",
		Subcommands: []*cli.Command{secretSetCommand(), secretLsCommand(), secretRotateCommand()},
	}
}

func secretSetCommand() *cli.Command {
	return &cli.Command{
		Name: "set", Usage: "keep a secret that is read from standard input", ArgsUsage: "VM NAME",
		Description: "The declaration names it with `NAME: {stdin: true}`. A VM that is up sees it at once.",
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			if c.NArg() != 2 {
				return usageError{errors.New("clawvm secret set wants the name of a VM and the name of a secret")}
			}
			vm, err := validName(c.Args().Get(0))
			if err != nil {
				return err
			}
			name := c.Args().Get(1)
			declared, err := host.Secrets(c.Context, l, vm)
			if err != nil {
				return err
			}
			if err := takesInput(declared, vm, name); err != nil {
				return err
			}
			var in io.Reader = os.Stdin
			if onTerminal(os.Stdin) {
				// Not shown while it is typed, and in no shell's history.
				fmt.Fprintf(os.Stderr, "secret %s of VM %s: ", name, vm)
				typed, err := term.ReadPassword(int(os.Stdin.Fd()))
				fmt.Fprintln(os.Stderr)
				if err != nil {
					return fmt.Errorf("cannot read the secret: %w", err)
				}
				in = &wiped{typed}
			}
			if err := secrets.Set(l.VM(vm).KeptSecrets(), name, in); err != nil {
				return err
			}
			err = l.Dial(vm).Rotate(c.Context)
			if errors.Is(err, host.ErrNotRunning) {
				return nil
			}
			return err
		},
	}
}

// takesInput refuses a secret that the declaration takes from elsewhere.
func takesInput(declared []secrets.Secret, vm, name string) error {
	for _, s := range declared {
		if s.Name != name {
			continue
		}
		if !s.Stdin {
			return fmt.Errorf("secret %s of VM %s is not read from standard input: its declaration says otherwise (clawvm config show %s)", name, vm, vm)
		}
		return nil
	}
	return fmt.Errorf("VM %s has no secret %s: declare it first, as `%s: {stdin: true}` under `secrets:`", vm, name, name)
}

// wiped is a reader that overwrites what it has given.
type wiped struct{ rest []byte }

func (w *wiped) Read(p []byte) (int, error) {
	if len(w.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, w.rest)
	clear(w.rest[:n])
	w.rest = w.rest[n:]
	return n, nil
}

func secretLsCommand() *cli.Command {
	return &cli.Command{
		Name: "ls", Usage: "list a VM's secrets and where they come from, never what they are", ArgsUsage: "VM",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			l, name, err := oneVM(c)
			if err != nil {
				return err
			}
			declared, err := host.Secrets(c.Context, l, name)
			if err != nil {
				return err
			}
			list := secrets.List(l.VM(name).KeptSecrets(), declared)
			if c.Bool("json") {
				return printJSON(list)
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tSOURCE\tMODIFIED\tPROBLEM")
			for _, s := range list {
				modified := ""
				if !s.Modified.IsZero() {
					modified = s.Modified.Local().Format(time.DateTime)
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", s.Name, s.Source, dash(modified), dash(s.Problem))
			}
			return w.Flush()
		},
	}
}

func secretRotateCommand() *cli.Command {
	return &cli.Command{
		Name: "rotate", Usage: "stage a running VM's secrets anew from their sources", ArgsUsage: "VM",
		Description: "A changed source is noticed without it; rotate says when something is wrong with one.",
		Action: func(c *cli.Context) error {
			l, name, err := oneVM(c)
			if err != nil {
				return err
			}
			return l.Dial(name).Rotate(c.Context)
		},
	}
}
