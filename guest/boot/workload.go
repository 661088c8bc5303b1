package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
)

// Pauses before a workload is started again: doubled from the first to the longest, and from the first again after a run that was
// long enough to call it a success.
const (
	firstPause   = time.Second
	longestPause = time.Minute
	goodRun      = time.Minute
)

// defaultStop is how long a workload may take to end when its declaration doesn't say.
const defaultStop = 30 * time.Second

// outcome is how a run of the workload ended.
type outcome struct {
	Code   int // 128+n for signal n
	Signal int
	Cause  string // agent.CauseMemory or CauseHealth; "": itself
	Detail string // of that, and why it could not be started
}

// pauseAfter is the pause after so many failures in a row, one at least.
func pauseAfter(failures int) time.Duration {
	if failures > 6 {
		return longestPause
	}
	return min(firstPause<<max(failures-1, 0), longestPause)
}

// startsAgain is the restart policy.
func startsAgain(w *guest.Workload, o outcome) bool {
	if slices.Contains(w.NoRestart, o.Code) {
		return false
	}
	switch w.Restart {
	case guest.RestartAlways:
		return true
	case guest.RestartOnFailure:
		return o.Code != 0
	}
	return false
}

// supervisor keeps the workload running.
type supervisor struct {
	workload *guest.Workload
	command  func(status *os.File) (*exec.Cmd, []*os.File, error) // prepares one run
	probe    func(context.Context) error                          // one look whether it is ready; nil: it is as soon as it runs
	health   func(context.Context) error                          // one look at a workload that is ready; nil: nobody looks
	killed   func() (int, error)                                  // processes that the kernel has killed for want of memory
	children *children
	group    *cgroup
	log      *agent.Log
	board    *agent.Board
	uptime   func() float64

	mu       sync.Mutex
	stopping chan struct{}
	grace    time.Duration
}

// stop asks the workload to end, within grace (0: the declared time), and not to start again. run returns then.
func (s *supervisor) stop(grace time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.stopping:
	default:
		s.grace = grace
		close(s.stopping)
	}
}

// run starts the workload, and starts it again as its policy says, until it has ended for good. Its exit code is the last run's.
func (s *supervisor) run() outcome {
	restarts, failures := 0, 0
	for {
		begun := time.Now()
		o := s.once(restarts)
		if time.Since(begun) >= goodRun {
			failures = 0
		}
		failures++
		pause := pauseAfter(failures)
		again := startsAgain(s.workload, o) && !s.stopped()
		e := agent.Event{Kind: agent.WorkloadExited, Uptime: s.uptime(), Code: o.Code, Signal: o.Signal, Restarts: restarts, Cause: o.Cause, Detail: o.Detail, Final: !again}
		if again {
			e.Next = pause.Seconds()
		}
		s.board.Post(e)
		if !again {
			return o
		}
		select {
		case <-s.stopping:
			return o
		case <-time.After(pause):
		}
		restarts++
	}
}

func (s *supervisor) stopped() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

// once runs the workload once, to the end of all that it started.
func (s *supervisor) once(restarts int) outcome {
	killed := s.killedSoFar()
	cmd, output, err := s.start()
	if err != nil {
		o := outcome{Code: exitStage, Detail: err.Error()}
		var start *startError
		if errors.As(err, &start) {
			o.Code = start.code
		}
		return o
	}
	s.board.Post(agent.Event{Kind: agent.WorkloadStarted, Uptime: s.uptime(), Restarts: restarts})
	ended := make(chan struct{})
	var work sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	sick := make(chan error, 1)
	var why error // it is unhealthy and to be stopped
	work.Go(func() {
		if !s.awaitReady(ctx, restarts) || s.health == nil {
			return
		}
		err := watchHealth(ctx, s.workload.Health, s.health, func(e agent.Event) {
			e.Uptime, e.Restarts = s.uptime(), restarts
			s.board.Post(e)
		})
		if err != nil {
			sick <- err
		}
	})
	work.Go(func() { why = s.awaitStop(cmd.Process, ended, sick) })
	o := outcomeOf(s.children.Wait(cmd))
	cancel()
	close(ended)
	work.Wait()
	o.explain(why, s.killedSoFar()-killed, s.stopped())
	if err := s.group.empty(); err != nil {
		o.Detail = err.Error()
	}
	output.Wait() // all writers are gone, so this is the end of what they wrote
	return o
}

// start starts the workload and waits until its program runs; output is done when nobody can write to the log any more.
func (s *supervisor) start() (cmd *exec.Cmd, output *sync.WaitGroup, err error) {
	statusR, statusW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, statusR.Close()) }()
	closing := []*os.File{statusW}
	closeAll := func() (err error) {
		for _, f := range closing {
			err = errors.Join(err, f.Close())
		}
		closing = nil
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	cmd, files, err := s.command(statusW)
	if err != nil {
		return nil, nil, err
	}
	closing = append(closing, files...)
	dir, err := s.group.place(cmd)
	if err != nil {
		return nil, nil, err
	}
	closing = append(closing, dir)
	cmd.SysProcAttr.Setsid = true
	output = &sync.WaitGroup{}
	for _, stream := range []agent.Stream{agent.Stdout, agent.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, nil, err
		}
		closing = append(closing, w)
		if stream == agent.Stdout {
			cmd.Stdout = w
		} else {
			cmd.Stderr = w
		}
		output.Go(func() { s.copyLog(stream, r) })
	}
	if err := s.children.Start(cmd); err != nil {
		return nil, nil, fmt.Errorf("cannot start the workload: %w", err)
	}
	if err := closeAll(); err != nil {
		return nil, nil, err
	}
	why, err := io.ReadAll(io.LimitReader(statusR, 1<<10))
	if err == nil && len(why) > 0 {
		err = errors.New(string(why))
	}
	if err != nil {
		o := outcomeOf(s.children.Wait(cmd))
		output.Wait()
		return nil, nil, &startError{o.Code, err}
	}
	return cmd, output, nil
}

// startError is why a program could not be started, with the exit code that a shell would give.
type startError struct {
	code int
	err  error
}

func (e *startError) Error() string { return e.err.Error() }
func (e *startError) Unwrap() error { return e.err }

func (s *supervisor) copyLog(stream agent.Stream, r *os.File) {
	_, copyErr := io.Copy(s.log.Writer(stream), r)
	if err := errors.Join(copyErr, r.Close()); err != nil {
		warn("the workload's output: %v", err)
	}
}

func outcomeOf(err error) outcome {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return outcome{}
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return outcome{Code: 128 + int(ws.Signal()), Signal: int(ws.Signal())}
		}
		return outcome{Code: exit.ExitCode()}
	}
	return outcome{Code: exitStage, Detail: err.Error()}
}

// awaitStop stops the run when it is asked to, or is sick, which it returns: the declared signal to the program, which ends its own
// children, and KILL to all that is left when the time is over.
func (s *supervisor) awaitStop(p *os.Process, ended <-chan struct{}, sick <-chan error) (why error) {
	select {
	case <-ended:
		return nil
	case <-s.stopping:
	case why = <-sick:
	}
	s.mu.Lock()
	limit := s.grace
	s.mu.Unlock()
	if limit == 0 {
		if limit = time.Duration(s.workload.Stop.Timeout) * time.Second; limit == 0 {
			limit = defaultStop
		}
	}
	if err := p.Signal(stopSignal(s.workload)); err != nil && !errors.Is(err, os.ErrProcessDone) {
		warn("cannot signal the workload: %v", err)
	}
	select {
	case <-ended:
	case <-time.After(limit):
		if err := s.group.kill(); err != nil {
			warn("%v", err)
		}
	}
	return why
}

func stopSignal(w *guest.Workload) syscall.Signal {
	if n, ok := guest.Signals[w.Stop.Signal]; ok {
		return syscall.Signal(n)
	}
	return syscall.SIGTERM
}

// Pauses between two looks whether the workload is ready: close at first, because a small one is ready at once.
const (
	firstLook   = 50 * time.Millisecond
	longestLook = time.Second
)

// awaitReady looks until the workload is ready, or the run is over, and says whether it is ready.
func (s *supervisor) awaitReady(ctx context.Context, restarts int) bool {
	post := func(k agent.EventKind, detail string) {
		s.board.Post(agent.Event{Kind: k, Uptime: s.uptime(), Restarts: restarts, Detail: detail})
	}
	if s.probe == nil {
		post(agent.Ready, "")
		return true
	}
	var late <-chan time.Time
	if t := s.workload.Ready.Timeout; t > 0 {
		timer := time.NewTimer(time.Duration(t) * time.Second)
		defer timer.Stop()
		late = timer.C
	}
	for pause := firstLook; ; pause = min(pause*3/2, longestLook) {
		err := s.probe(ctx)
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			post(agent.Ready, "")
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-late:
			late = nil
			post(agent.NotReady, err.Error())
		case <-time.After(pause):
		}
	}
}
