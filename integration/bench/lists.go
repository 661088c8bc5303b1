package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// list is `clawvm ls` with so many VMs. Times are in milliseconds.
type list struct {
	Declared int       `json:"declared"`
	Running  int       `json:"running"`
	Took     []float64 `json:"took"`
}

// declaredCounts are the numbers of VMs that ls is tried with.
var declaredCounts = []int{1, 10, 100}

// measureLists measures ls with no VM running, and with one where one can run.
func (w *world) measureLists(ctx context.Context, runs int, canRun bool) (lists []list, err error) {
	var declared int
	more := func(n int) error {
		for ; declared < n; declared++ {
			name := fmt.Sprintf("n%02d", declared)
			if declared == 0 {
				name = "one"
			}
			if err := w.declare(name, "auto"); err != nil {
				return err
			}
		}
		return nil
	}
	for _, n := range declaredCounts {
		if err := more(n); err != nil {
			return nil, err
		}
		l, err := w.list(ctx, n, 0, runs)
		if err != nil {
			return nil, err
		}
		lists = append(lists, l)
	}
	if !canRun {
		return lists, nil
	}
	if _, err := w.clawvm(ctx, "up", "one"); err != nil {
		return nil, err
	}
	defer func() {
		_, derr := w.clawvm(context.WithoutCancel(ctx), "down", "--timeout", "10s", "one")
		err = errors.Join(err, derr)
	}()
	l, err := w.list(ctx, declared, 1, runs)
	return append(lists, l), err
}

func (w *world) list(ctx context.Context, declared, running, runs int) (list, error) {
	l := list{Declared: declared, Running: running}
	for range runs {
		began := time.Now()
		out, err := w.clawvm(ctx, "ls", "--all")
		if err != nil {
			return l, err
		}
		l.Took = append(l.Took, ms(time.Since(began)))
		if lines := strings.Count(out, "\n"); lines != declared+1 {
			return l, fmt.Errorf("%d lines for %d VMs:\n%s", lines, declared, out)
		}
	}
	return l, nil
}
