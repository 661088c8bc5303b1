package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/clawvm/clawvm/host"
)

// screen shows the progress of starts: on a terminal the phase that runs, with
// its time; elsewhere a line for each.
type screen struct {
	mu       sync.Mutex
	out      io.Writer
	terminal bool
	prefixed bool // several VMs: each line says whose it is
	open     bool // the terminal's last line is one that changes
}

func newScreen(out *os.File, several bool) *screen {
	return &screen{out: out, terminal: onTerminal(out), prefixed: several}
}

// say prints text as it is.
func (s *screen) say(_, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	fmt.Fprintln(s.out, text)
}

func (s *screen) line(name, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
	fmt.Fprintln(s.out, s.prefix(name)+text)
}

// passing shows text until the next line; on a terminal and for one VM only.
func (s *screen) passing(name, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.terminal || s.prefixed {
		return
	}
	s.clear()
	fmt.Fprint(s.out, s.prefix(name)+text)
	s.open = true
}

// clear removes the passing line (ECMA-48 EL).
func (s *screen) clear() {
	if s.open {
		fmt.Fprint(s.out, "\r\x1b[K")
		s.open = false
	}
}

func (s *screen) prefix(name string) string {
	if s.prefixed {
		return name + ": "
	}
	return ""
}

// How often a phase that runs is shown anew, on a terminal and elsewhere.
const (
	tickTerminal = time.Second
	tickPlain    = 30 * time.Second
)

// start shows the start of one VM.
type start struct {
	screen *screen
	name   string
	log    string // the workload's, whose last line shows that it lives

	mu    sync.Mutex
	phase string
	began time.Time

	stop chan struct{}
	done sync.WaitGroup
}

func (s *screen) follow(name, log string) *start {
	st := &start{screen: s, name: name, log: log, stop: make(chan struct{})}
	st.done.Go(st.tick)
	return st
}

// tick shows that a long phase goes on.
func (st *start) tick() {
	every := tickPlain
	if st.screen.terminal {
		every = tickTerminal
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-st.stop:
			return
		case <-t.C:
		}
		st.mu.Lock()
		phase, began := st.phase, st.began
		st.mu.Unlock()
		if phase == "" {
			continue
		}
		text := fmt.Sprintf("%-8s %s …", phase, human(time.Since(began)))
		if phase == "ready" && writtenSince(st.log, began) {
			if lines, err := host.Tail(st.log, 1); err == nil && len(lines) > 0 {
				text += " " + cut(lines[0], 80)
			}
		}
		if st.screen.terminal {
			st.screen.passing(st.name, text)
		} else {
			st.screen.line(st.name, text)
		}
	}
}

// step shows one event of the start.
func (st *start) step(p host.Progress) {
	st.mu.Lock()
	before, began := st.phase, st.began
	if p.Phase != "" && p.Phase != st.phase {
		st.phase, st.began = p.Phase, time.Now()
	}
	phase := st.phase
	st.mu.Unlock()
	if before != "" && before != phase || p.State == host.VMReady && before != "" {
		st.screen.line(st.name, fmt.Sprintf("%-8s %s", before, human(time.Since(began))))
	}
	if p.State == host.StepNote {
		st.screen.line(st.name, fmt.Sprintf("%-8s %s", "", p.Text))
	}
	if phase != before {
		st.screen.passing(st.name, fmt.Sprintf("%-8s …", phase))
	}
}

func (st *start) end() {
	close(st.stop)
	st.done.Wait()
	st.screen.mu.Lock()
	st.screen.clear()
	st.screen.mu.Unlock()
}

// human is a duration for people.
func human(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min %d s", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days", int(d.Hours())/24)
}

// cut shortens s to max characters.
func cut(s string, max int) string {
	r := []rune(s)
	if len(r) <= max {
		return s
	}
	return string(r[:max-1]) + "…"
}
