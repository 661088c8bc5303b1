package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

// defaultDown is the guest's grace: the workload's 30 s and what init needs.
const defaultDown = 40 * time.Second

// downSlack is what taking a VM down takes beyond the guest's grace, at most:
// power button, VMM, gate, rules.
const downSlack = 20 * time.Second

func timeoutFlag() cli.Flag {
	return &cli.GenericFlag{Name: "timeout", Aliases: []string{"t"}, Value: &grace{defaultDown}, Usage: "give the guest `TIME` to end by itself: 90s, or a number of seconds"}
}

// grace is how long a guest may take to end: a duration, or as in docker, podman and
// systemd a number of seconds.
type grace struct{ time.Duration }

func (g *grace) Set(s string) error {
	d, err := time.ParseDuration(s)
	if seconds, serr := strconv.ParseUint(s, 10, 31); serr == nil {
		d, err = time.Duration(seconds)*time.Second, nil
	}
	if err == nil && d < 0 {
		err = errors.New("it is negative")
	}
	if err == nil {
		g.Duration = d
	}
	return err
}

// graceOf is the flag's value.
func graceOf(c *cli.Context) time.Duration {
	if g, ok := c.Generic("timeout").(*grace); ok {
		return g.Duration
	}
	return defaultDown
}

func downCommand() *cli.Command {
	return &cli.Command{
		Name: "down", Usage: "take VMs down", ArgsUsage: "NAME...",
		Flags: []cli.Flag{timeoutFlag()},
		Action: func(c *cli.Context) error {
			l, names, err := someVMs(c)
			if err != nil {
				return err
			}
			return downAll(c.Context, l, names, graceOf(c), true)
		},
	}
}

// downAll takes VMs down side by side. One that is down already is said, and is
// no error.
func downAll(ctx context.Context, l host.Layout, names []string, grace time.Duration, say bool) error {
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() { errs[i] = downOne(ctx, l, n, grace, say) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func downOne(ctx context.Context, l host.Layout, name string, grace time.Duration, say bool) error {
	if _, err := host.Look(ctx, l, name); err != nil {
		return err
	}
	began := time.Now()
	client := l.Dial(name)
	st, err := client.Status(ctx)
	running := err == nil
	if running {
		err = client.Down(ctx, grace)
		if errors.Is(err, host.ErrNotRunning) || errors.Is(err, host.ErrEnded) {
			err = nil // it was about to end; how it did is asked below
		}
	}
	limited, cancel := context.WithTimeout(ctx, grace+downSlack)
	defer cancel()
	if err == nil || errors.Is(err, host.ErrNotRunning) {
		owned, err := host.StopUnit(limited, l, name)
		if err != nil {
			return err
		}
		if owned && !running {
			if say {
				fmt.Printf("%s is down: systemd does not start it again\n", name)
			}
			return nil
		}
	}
	if errors.Is(err, host.ErrNotRunning) {
		if say {
			fmt.Printf("%s is down already\n", name)
		}
		return nil
	}
	if err != nil {
		return err
	}
	switch end, err := host.WaitDown(limited, l, st); {
	case err != nil:
		return err
	case end == nil:
		return fmt.Errorf("VM %s is down, but its supervisor ended without a word: `%s logs --supervisor %s` shows how far it came, `%s gc` removes what it left", name, self(l), name, self(l))
	case end.Left:
		return errors.New(end.Reason)
	}
	if say {
		fmt.Printf("%s is down after %s\n", name, human(time.Since(began)))
	}
	return nil
}
