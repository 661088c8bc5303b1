package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host"
)

// version is set by the build (-ldflags -X main.version=…).
var version = "devel"

// run is the program: it returns the exit code.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	app := newApp()
	err := app.RunContext(ctx, flagsFirst(app, args))
	if err == nil {
		return host.ExitOK
	}
	var quiet silent
	if !errors.As(err, &quiet) {
		fmt.Fprintln(os.Stderr, "clawvm:", strings.TrimRight(err.Error(), "\n"))
	}
	return exitCode(err)
}

// silent is an exit code without a message: everything is said already.
type silent struct{ code int }

func (s silent) Error() string { return fmt.Sprintf("exit code %d", s.code) }

// usageError is a command line that is wrong.
type usageError struct{ error }

func exitCode(err error) int {
	var quiet silent
	var usage usageError
	switch {
	case errors.As(err, &quiet):
		return quiet.code
	case errors.As(err, &usage):
		return host.ExitUsage
	}
	return host.ExitCode(err)
}

func newApp() *cli.App {
	app := &cli.App{
		Name:                   "clawvm",
		Usage:                  "run programs that nobody should trust, each in a microVM of its own",
		Version:                version,
		UseShortOptionHandling: true,
		Suggest:                true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Value: "/", EnvVars: []string{"CLAWVM_ROOT"}, Usage: "keep everything below `DIR`, for a try-out that touches nothing of the system"},
		},
		Commands: []*cli.Command{
			upCommand(), downCommand(), restartCommand(), rmCommand(),
			lsCommand(), statusCommand(), logsCommand(), netCommand(),
			execCommand(), shellCommand(),
			imageCommand(), kernelCommand(), secretCommand(), configCommand(),
			gcCommand(), runCommand(),
		},
		// Kept apart, because exec has a flag of the same name.
		Before: func(c *cli.Context) error {
			c.App.Metadata = map[string]any{rootKey: c.String("root")}
			return nil
		},
		// Errors are said and coded in one place: run.
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   onUsageError,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usageError{fmt.Errorf("%q is not a command; clawvm help lists them", c.Args().First())}
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, c := range allCommands(app.Commands) {
		c.OnUsageError = onUsageError
		c.UseShortOptionHandling = true
	}
	return app
}

func onUsageError(c *cli.Context, err error, _ bool) error {
	return usageError{fmt.Errorf("%w; clawvm %s --help says more", err, c.Command.Name)}
}

func allCommands(list []*cli.Command) []*cli.Command {
	all := append([]*cli.Command(nil), list...)
	for _, c := range list {
		all = append(all, allCommands(c.Subcommands)...)
	}
	return all
}

// jsonFlag is the flag of every command that prints something.
func jsonFlag() cli.Flag { return &cli.BoolFlag{Name: "json", Usage: "print JSON"} }

// layout opens the root that the command works on.
func layout(c *cli.Context) (host.Layout, error) {
	root, ok := c.App.Metadata[rootKey].(string)
	if !ok {
		root = "/"
	}
	return host.OpenLayout(root)
}

// rootKey is where the app keeps --root.
const rootKey = "root"

// needRoot refuses to go on as another user: every command that changes the host
// needs its privileges.
func needRoot() error {
	if os.Geteuid() != 0 {
		return &host.CodedError{Code: host.ExitNoPerm, Err: errors.New("this needs root: it makes network devices and starts processes under other users; try sudo")}
	}
	return nil
}

// privileged is layout for commands that need root.
func privileged(c *cli.Context) (host.Layout, error) {
	if err := needRoot(); err != nil {
		return host.Layout{}, err
	}
	return layout(c)
}

// oneName returns the one VM that the command line names.
func oneName(c *cli.Context) (string, error) {
	if c.NArg() != 1 {
		return "", usageError{fmt.Errorf("clawvm %s wants the name of one VM", c.Command.FullName())}
	}
	return validName(c.Args().First())
}

// someNames returns the VMs that the command line names, at least one.
func someNames(c *cli.Context) ([]string, error) {
	if !c.Args().Present() {
		return nil, usageError{fmt.Errorf("clawvm %s wants the name of a VM", c.Command.FullName())}
	}
	for _, n := range c.Args().Slice() {
		if _, err := validName(n); err != nil {
			return nil, err
		}
	}
	return c.Args().Slice(), nil
}

func validName(name string) (string, error) {
	if err := config.ValidName(name); err != nil {
		return "", usageError{err}
	}
	return name, nil
}

// self is how the user called this program, for commands to paste.
func self(l host.Layout) string {
	words := []string{filepath.Base(os.Args[0])}
	if strings.Contains(os.Args[0], "/") {
		words[0] = os.Args[0]
	}
	if !l.IsSystem() && os.Getenv("CLAWVM_ROOT") == "" {
		words = append(words, "--root", shellQuote(l.Root))
	}
	return strings.Join(words, " ")
}

// shellQuote is word as a POSIX shell reads it back.
func shellQuote(word string) string {
	if word != "" && strings.IndexFunc(word, func(r rune) bool {
		return !(r == '/' || r == '.' || r == '-' || r == '_' || r == ':' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z')
	}) < 0 {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// onTerminal says whether f is a terminal.
func onTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }
