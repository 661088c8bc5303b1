package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
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
	asked, foreign := completing(args)
	if foreign {
		return host.ExitOK
	}
	if !asked {
		args = flagsFirst(app, args)
	}
	err := app.RunContext(ctx, args)
	if err == nil {
		return host.ExitOK
	}
	var quiet silent
	if !errors.As(err, &quiet) {
		say(app, err)
	}
	return exitCode(err)
}

// say prints an error on standard error: of many that are joined, each with the
// program's name before it. The commands in it are as the user has to type them,
// but for what is about the command line itself.
func say(app *cli.App, err error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok && joinedText(err, joined.Unwrap()) {
		for _, e := range joined.Unwrap() {
			say(app, e)
		}
		return
	}
	text := strings.TrimRight(err.Error(), "\n")
	var usage usageError
	if root, ok := app.Metadata[rootKey].(string); ok && !errors.As(err, &usage) {
		if l, err := host.LookLayout(root); err == nil {
			text = pasteable(app, l, text)
		}
	}
	// It may repeat what a guest, an image or a server on the network said.
	fmt.Fprintln(os.Stderr, "clawvm:", onScreen(text))
}

// joinedText says whether err is only the errors of the list, and adds nothing.
func joinedText(err error, list []error) bool { return err.Error() == errors.Join(list...).Error() }

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
	host.Version = version
	app := &cli.App{
		Name:                   "clawvm",
		Usage:                  "run programs that nobody should trust, each in a microVM of its own",
		Version:                version,
		UseShortOptionHandling: true,
		Suggest:                true,
		EnableBashCompletion:   true, // of every shell: see completion.go
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Value: "/", EnvVars: []string{"CLAWVM_ROOT"}, Usage: "keep everything below `DIR`, for a try-out that touches nothing of the system"},
		},
		Commands: []*cli.Command{
			upCommand(), downCommand(), restartCommand(), reloadCommand(), pauseCommand(), resumeCommand(), rmCommand(),
			allowCommand(), denyCommand(),
			enableCommand(), disableCommand(),
			lsCommand(), statusCommand(), logsCommand(), netCommand(), topCommand(),
			execCommand(), shellCommand(), cpCommand(),
			imageCommand(), kernelCommand(), secretCommand(), configCommand(),
			doctorCommand(), gcCommand(), runCommand(), completionCommand(),
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
				return unknownCommand(c)
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, c := range allCommands(app.Commands) {
		c.OnUsageError = onUsageError
		c.UseShortOptionHandling = true
		c.BashComplete = complete(c)
		if len(c.Subcommands) > 0 {
			c.Action = func(c *cli.Context) error {
				if c.Args().Present() {
					return unknownCommand(c)
				}
				return cli.ShowSubcommandHelp(c)
			}
		}
	}
	return app
}

// unknownCommand refuses a word that is no command.
func unknownCommand(c *cli.Context) error {
	return usageError{fmt.Errorf("there is no command %q; `%s --help` lists them", commandName(c)+" "+c.Args().First(), commandName(c))}
}

// commandName is how the command is typed, such as "clawvm image ls".
func commandName(c *cli.Context) string {
	if name := c.Command.FullName(); name != "" && name != c.App.Name {
		return "clawvm " + name
	}
	return "clawvm"
}

// badValue is what package flag says of a value that is of the wrong type.
var badValue = regexp.MustCompile(`^invalid (?:boolean )?value "(.*)" for (?:flag )?-+([^:]+): `)

// onUsageError says which flag is wrong in words of ours: those of package flag
// are about flags in a program.
func onUsageError(c *cli.Context, err error, _ bool) error {
	if m := badValue.FindStringSubmatch(err.Error()); m != nil {
		return usageError{fmt.Errorf("cannot read %q as the value of the flag %s; `%s --help` says what it takes", m[1], dashed(m[2]), commandName(c))}
	}
	if flag, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: -"); ok {
		err = fmt.Errorf("there is no flag %s", dashed(flag))
	}
	return usageError{fmt.Errorf("%w; `%s --help` lists them", err, commandName(c))}
}

// dashed is a flag's name as it is typed.
func dashed(flag string) string {
	flag = strings.TrimLeft(flag, "-")
	if len(flag) == 1 {
		return "-" + flag
	}
	return "--" + flag
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
func layout(c *cli.Context) (host.Layout, error) { return host.OpenLayout(rootOf(c)) }

// rootOf is the root that the command works on.
func rootOf(c *cli.Context) string {
	if root, ok := c.App.Metadata[rootKey].(string); ok {
		return root
	}
	return "/"
}

// rootKey is where the app keeps --root.
const rootKey = "root"

// needRoot refuses to go on as another user: every command that changes the host
// needs its privileges.
func needRoot() error {
	if os.Geteuid() != 0 {
		return &host.CodedError{Code: host.ExitNoPerm, Err: fmt.Errorf("cannot do this as uid %d: it needs root, for network devices and for processes under other users; try sudo", os.Geteuid())}
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

// oneVM is the privileged layout and the one VM that the command line names.
func oneVM(c *cli.Context) (host.Layout, string, error) {
	l, err := privileged(c)
	if err != nil {
		return host.Layout{}, "", err
	}
	name, err := oneName(c)
	return l, name, err
}

// someVMs is the privileged layout and the VMs that the command line names, at least
// one.
func someVMs(c *cli.Context) (host.Layout, []string, error) {
	l, err := privileged(c)
	if err != nil {
		return host.Layout{}, nil, err
	}
	names, err := someNames(c)
	return l, names, err
}

// oneName returns the one VM that the command line names.
func oneName(c *cli.Context) (string, error) {
	if c.NArg() != 1 {
		return "", usageError{fmt.Errorf("%s wants the name of one VM", commandName(c))}
	}
	return validName(c.Args().First())
}

// someNames returns the VMs that the command line names, at least one.
func someNames(c *cli.Context) ([]string, error) {
	if !c.Args().Present() {
		return nil, usageError{fmt.Errorf("%s wants the name of a VM", commandName(c))}
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

// pasteable is a text in which the commands of this program, which packages below
// write as `clawvm VERB`, are as the user would have to type them: with the same
// path and the same root.
func pasteable(app *cli.App, l host.Layout, text string) string {
	var verbs []string
	for _, c := range app.Commands {
		verbs = append(verbs, c.Names()...)
	}
	own := regexp.MustCompile("(^|[\\s(`])clawvm ((?:" + strings.Join(verbs, "|") + ")\\b)")
	return own.ReplaceAllString(text, "${1}"+strings.ReplaceAll(self(l), "$", "$$")+" ${2}")
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
