package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func upCommand() *cli.Command {
	return &cli.Command{
		Name:      "up",
		Usage:     "bring VMs up and wait until they are ready",
		ArgsUsage: "FILE|NAME...",
		Description: "A FILE is a declaration called NAME.yaml; up links it among the declarations.\n" +
			"A VM that is up stays as it is, unless --recreate is given: then what it wrote outside its volumes is lost.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "timeout", Usage: "stop waiting after `TIME` (exit code 124); the VM goes on"},
			&cli.BoolFlag{Name: "recreate", Aliases: []string{"force-recreate"}, Usage: "take down those that are up, and begin with an empty overlay; volumes and kept secrets stay"},
			&cli.BoolFlag{Name: "no-wait", Usage: "return when the start has begun"},
		},
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			if !c.Args().Present() {
				return usageError{errors.New("clawvm up wants a declaration's file or the name of a VM")}
			}
			var names, linked []string
			var errs []error
			for _, arg := range c.Args().Slice() {
				name, made, err := declared(l, arg)
				names, errs = append(names, name), append(errs, err)
				if made {
					linked = append(linked, name)
				}
			}
			ctx := c.Context
			if t := c.Duration("timeout"); t > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeoutCause(ctx, t, errWaited{t})
				defer cancel()
			}
			// All that is wrong is said before anything is started, and then nothing
			// stays declared that was not.
			if err := errors.Join(errs...); err != nil {
				return errors.Join(append(errs, undeclare(l, linked))...)
			}
			if err := checkAll(ctx, l, names, c.Bool("recreate")); err != nil {
				return errors.Join(err, undeclare(l, linked))
			}
			if c.Bool("recreate") {
				if err := downAll(c.Context, l, names, defaultDown, false); err != nil {
					return err
				}
				for _, n := range names {
					if err := host.DropOverlay(c.Context, l, n); err != nil {
						return err
					}
				}
			}
			return upAll(ctx, l, names, !c.Bool("no-wait"))
		},
	}
}

// errWaited is the cause of a wait that ended by --timeout.
type errWaited struct{ after time.Duration }

func (e errWaited) Error() string { return fmt.Sprintf("not ready within %s", e.after) }

// declared returns the name of the VM that an argument of up stands for, and
// whether it is declared only by this.
func declared(l host.Layout, arg string) (name string, made bool, err error) {
	if strings.ContainsRune(arg, '/') || strings.HasSuffix(arg, ".yaml") || strings.HasSuffix(arg, ".yml") || strings.HasSuffix(arg, ".json") {
		return host.Declare(l, arg)
	}
	if name, err = validName(arg); err != nil {
		return "", false, err
	}
	_, err = l.Declaration(name)
	return name, false, err
}

func undeclare(l host.Layout, names []string) error {
	var errs []error
	for _, n := range names {
		errs = append(errs, host.Undeclare(l, n))
	}
	return errors.Join(errs...)
}

// checkAll says all that is wrong with VMs that are to be started: those that are
// not up, or all.
func checkAll(ctx context.Context, l host.Layout, names []string, all bool) error {
	var errs []error
	for _, n := range names {
		runs := func() bool {
			_, err := l.Dial(n).Status(ctx)
			return !errors.Is(err, host.ErrNotRunning)
		}
		was := runs()
		if was && !all {
			continue
		}
		err := host.Check(ctx, l, n)
		if err != nil && !was && runs() {
			// It was started meanwhile, and has the ports that were found in use.
			err = nil
			if all {
				err = host.Check(ctx, l, n)
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// upAll brings VMs up side by side.
func upAll(ctx context.Context, l host.Layout, names []string, wait bool) error {
	screen := newScreen(os.Stdout, len(names) > 1)
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() { errs[i] = upOne(ctx, l, n, wait, screen) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func upOne(ctx context.Context, l host.Layout, name string, wait bool, screen *screen) error {
	for {
		again, err := upOnce(ctx, l, name, wait, screen)
		if !again {
			return err
		}
	}
}

// upOnce brings a VM up. again: one that was about to end has ended, and can be
// started.
func upOnce(ctx context.Context, l host.Layout, name string, wait bool, screen *screen) (again bool, err error) {
	began := time.Now()
	before, err := host.LastEnd(l, name)
	if err != nil {
		before = nil // a record that can't be read is replaced by the next
	}
	started, unit, err := host.Start(ctx, l, name)
	if err != nil {
		return false, err
	}
	if unit != "" {
		screen.say(name, fmt.Sprintf("systemd starts it, as %s", unit))
	}
	var ends host.Status // of a VM that was about to end
	if !started {
		st, err := l.Dial(name).Settled(ctx)
		if errors.Is(err, host.ErrNotRunning) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		switch st.State {
		case host.Paused:
			return false, fmt.Errorf("VM %s is paused: %s resume %s lets it go on", name, self(l), name)
		case host.Restarting:
			if err := l.Dial(name).Start(ctx); err != nil {
				return false, err
			}
		case host.Running:
			screen.say(name, fmt.Sprintf("%s is up already (for %s)", name, human(time.Since(st.Started))))
			return false, nil
		case host.Stopping:
			screen.line(name, fmt.Sprintf("%-8s it is about to end: waiting for that", ""))
			ends = st
		}
	}
	if !wait && ends.State == "" {
		return false, nil
	}
	show := screen.follow(name, l.VM(name).WorkloadLog())
	last, err := l.Dial(name).Follow(ctx, show.step)
	show.end()
	if err != nil && ctx.Err() != nil {
		if waited, ok := context.Cause(ctx).(errWaited); ok {
			return false, &host.CodedError{Code: host.ExitTimeout, Err: fmt.Errorf("VM %s is %w; it goes on starting: %s status %s shows it, %s down %s ends it",
				name, waited, self(l), name, self(l), name)}
		}
		return false, fmt.Errorf("interrupted: VM %s goes on starting; %s down %s ends it", name, self(l), name)
	}
	ended := err != nil || last.State == host.VMEnded
	if ended && ends.State != "" {
		_, err := host.WaitDown(ctx, l, ends)
		return err == nil, err
	}
	if err != nil {
		// The supervisor was killed, or ended in between.
		last = host.Progress{State: host.VMEnded, Text: host.WhyNot(l, name, before, err).Error()}
	}
	if ended {
		return false, failed(l, name, last.Text, began)
	}
	screen.say(name, nextSteps(ctx, l, name, time.Since(began)))
	return false, nil
}

// lastLines is how much of a guest's logs is shown when a start fails.
const lastLines = 15

// failed explains a start that failed: the error, and the ends of what the guest
// said since it began.
func failed(l host.Layout, name, why string, began time.Time) error {
	var b strings.Builder
	if why == "" {
		why = host.TakenDown(name).Error()
	}
	b.WriteString(why)
	p := l.VM(name)
	for _, log := range []struct{ what, path string }{
		{"the console", p.ConsoleLog()}, {"the workload", p.WorkloadLog()}, {"the VMM", p.VMMLog()},
	} {
		if !writtenSince(log.path, began) {
			continue
		}
		lines, err := host.Tail(log.path, lastLines)
		if err != nil {
			fmt.Fprintf(&b, "\n(cannot read %s: %v)", log.path, err)
		}
		if len(lines) > 0 {
			fmt.Fprintf(&b, "\nthe end of what %s said (%s):", log.what, log.path)
			for _, line := range lines {
				b.WriteString("\n  | " + line)
			}
		}
	}
	code := host.ExitFailed
	if end, err := host.LastEnd(l, name); err == nil && end.Failed() {
		code = end.Code
	}
	return &host.CodedError{Code: code, Err: errors.New(b.String())}
}

// nextSteps is what a user needs when a VM is ready.
func nextSteps(ctx context.Context, l host.Layout, name string, took time.Duration) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s is ready after %s\n", name, human(took))
	st, err := l.Dial(name).Status(ctx)
	if err != nil {
		return b.String()
	}
	fmt.Fprintf(&b, "  address    %s\n", st.Address)
	for _, p := range st.Ports {
		fmt.Fprintf(&b, "  published  %s\n", p)
	}
	for _, hint := range host.Hints(l, name) {
		fmt.Fprintf(&b, "  try        %s\n", hint)
	}
	me := self(l)
	fmt.Fprintf(&b, "  look       %s ls · %s logs -f %s · %s net -f %s\n", me, me, name, me, name)
	fmt.Fprintf(&b, "  enter      %s shell %s · %s exec %s -- id\n", me, name, me, name)
	fmt.Fprintf(&b, "  end        %s down %s", me, name)
	return b.String()
}

// writtenSince says whether a log was written to since began, and not only by an
// earlier start, be it of before the clock was set back.
func writtenSince(log string, began time.Time) bool {
	st, err := os.Lstat(log)
	return err == nil && !st.ModTime().Before(began) && !st.ModTime().After(time.Now().Add(time.Minute))
}
