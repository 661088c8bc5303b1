package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/clawvm/clawvm/host"
)

// memory is RssAnon of clawvm's own two processes, in KiB, of an idle VM.
type memory struct {
	Supervisor []int `json:"supervisor"`
	Gate       []int `json:"gate"`
}

const (
	memoryStarts = 3
	// memoryIdle is how long a VM is ready before its memory is looked at.
	memoryIdle = 5 * time.Second
)

// measureMemory looks at the VM that the starts were measured with.
func (w *world) measureMemory(ctx context.Context) (*memory, error) {
	m := &memory{}
	for range memoryStarts {
		if err := w.addMemory(ctx, m); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (w *world) addMemory(ctx context.Context, m *memory) (err error) {
	if _, err := w.clawvm(ctx, "up", "one"); err != nil {
		return err
	}
	defer func() {
		_, derr := w.clawvm(context.WithoutCancel(ctx), "down", "--timeout", "10s", "one")
		err = errors.Join(err, derr)
	}()
	select {
	case <-time.After(memoryIdle):
	case <-ctx.Done():
		return ctx.Err()
	}
	var status struct {
		PID int `json:"pid"`
	}
	if err := w.supervisor("one").get(ctx, "status", &status); err != nil {
		return err
	}
	gate, err := gateOf(status.PID)
	if err != nil {
		return err
	}
	s, err := rssAnon(status.PID)
	if err != nil {
		return err
	}
	g, err := rssAnon(gate)
	if err != nil {
		return err
	}
	m.Supervisor, m.Gate = append(m.Supervisor, s), append(m.Gate, g)
	return nil
}

// gateOf finds the gate among a supervisor's children.
func gateOf(supervisor int) (int, error) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", supervisor))
	if err != nil {
		return 0, err
	}
	for _, list := range lists {
		children, err := os.ReadFile(list)
		if err != nil {
			return 0, err
		}
		for _, child := range strings.Fields(string(children)) {
			args, err := os.ReadFile("/proc/" + child + "/cmdline")
			if err != nil {
				continue // it has ended
			}
			if words := strings.Split(string(args), "\x00"); len(words) > 1 && words[1] == host.GateArgument {
				return strconv.Atoi(child)
			}
		}
	}
	return 0, fmt.Errorf("supervisor %d has no gate among its children", supervisor)
}

var rssAnonLine = regexp.MustCompile(`(?m)^RssAnon:\s+(\d+) kB$`)

// rssAnon is the memory that a process has to itself, in KiB (proc(5)).
func rssAnon(pid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	m := rssAnonLine.FindSubmatch(status)
	if m == nil {
		return 0, fmt.Errorf("process %d has no RssAnon", pid)
	}
	return strconv.Atoi(string(m[1]))
}
