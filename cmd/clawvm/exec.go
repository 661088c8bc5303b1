package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/guest/agent"
	"github.com/clawvm/clawvm/host"
)

func execCommand() *cli.Command {
	return &cli.Command{
		Name: "exec", Usage: "run a command in a VM, as its workload runs", ArgsUsage: "NAME [--] COMMAND [ARG...]",
		Description: "The exit code is the command's: 126 it can't be executed, 127 it isn't found, 128+n signal n ended it,\n" +
			"125 clawvm could not run it.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "interactive", Aliases: []string{"i"}, Usage: "pass standard input on"},
			&cli.BoolFlag{Name: "tty", Aliases: []string{"t"}, Usage: "on a terminal of its own"},
			&cli.BoolFlag{Name: "root", Usage: "as root of the guest, outside the workload's sandbox"},
			&cli.StringFlag{Name: "user", Aliases: []string{"u"}, Usage: "as `USER` (name or UID, :GROUP)"},
			&cli.StringFlag{Name: "workdir", Aliases: []string{"w"}, Usage: "in directory `DIR`"},
			&cli.StringSliceFlag{Name: "env", Aliases: []string{"e"}, Usage: "with `NAME=VALUE` in the environment"},
		},
		Action: func(c *cli.Context) error {
			args := c.Args().Slice()
			if len(args) > 1 && args[1] == "--" {
				args = append(args[:1:1], args[2:]...)
			}
			if len(args) < 2 {
				return usageError{errors.New("clawvm exec wants the name of a VM and a command")}
			}
			req := agent.ExecRequest{Argv: args[1:], Root: c.Bool("root"), TTY: c.Bool("tty"), User: c.String("user"), Cwd: c.String("workdir")}
			for _, v := range c.StringSlice("env") {
				key, value, ok := strings.Cut(v, "=")
				if !ok {
					return usageError{fmt.Errorf("--env %s: NAME=VALUE is wanted", v)}
				}
				if req.Env == nil {
					req.Env = make(map[string]string)
				}
				req.Env[key] = value
			}
			return execIn(c, args[0], req, c.Bool("interactive"))
		},
	}
}

// execIn runs a command in the VM name and ends with its exit code.
func execIn(c *cli.Context, name string, req agent.ExecRequest, input bool) error {
	l, err := privileged(c)
	if err != nil {
		return err
	}
	if _, err := validName(name); err != nil {
		return err
	}
	stdio := agent.Stdio{Out: os.Stdout, Err: os.Stderr}
	if input {
		stdio.In = io.Reader(os.Stdin)
	}
	if req.TTY {
		if !onTerminal(os.Stdin) || !onTerminal(os.Stdout) {
			return usageError{errors.New("--tty: standard input and output are no terminal; leave -t away")}
		}
		stdio.Terminal = os.Stdin
		if req.Env == nil {
			req.Env = make(map[string]string)
		}
		if _, set := req.Env["TERM"]; !set {
			req.Env["TERM"] = os.Getenv("TERM")
		}
	}
	dial := l.Enter(name, "run a command in", self(l), host.ExitExec)
	// Signals are the command's, so the context must not end by them.
	code, err := agent.Exec(context.WithoutCancel(c.Context), dial, req, stdio)
	if err != nil {
		var coded *host.CodedError
		var missing *host.NotDeclaredError
		switch { // what dial says needs no more words
		case errors.As(err, &coded):
			return coded
		case errors.As(err, &missing):
			return &host.CodedError{Code: host.ExitExec, Err: missing} // any other code is the command's
		}
		return &host.CodedError{Code: host.ExitExec, Err: fmt.Errorf("cannot run a command in VM %s: %w", name, err)}
	}
	if code != 0 {
		return silent{code}
	}
	return nil
}
