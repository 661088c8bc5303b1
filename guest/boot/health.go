package boot

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
)

// watchHealth looks at a workload that is ready until the run is over, and posts what it finds. It returns an error when the
// workload is unhealthy and is to be stopped for that.
func watchHealth(ctx context.Context, h *guest.Health, look func(context.Context) error, post func(agent.Event)) error {
	tick := time.NewTicker(time.Duration(h.Interval) * time.Second)
	defer tick.Stop()
	for failures, told := 0, false; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		one, cancel := context.WithTimeout(ctx, time.Duration(h.Timeout)*time.Second)
		err := look(one)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			if !told || failures > 0 {
				post(agent.Event{Kind: agent.HealthChecked})
			}
			failures, told = 0, true
			continue
		}
		failures++
		sick := failures >= h.Retries
		post(agent.Event{Kind: agent.HealthChecked, Failures: failures, Unhealthy: sick, Detail: err.Error()})
		if sick && h.Restart {
			return err
		}
	}
}

// killedSoFar is how many processes the kernel has killed for want of memory, as far as that can be found out.
func (s *supervisor) killedSoFar() int {
	if s.killed == nil {
		return 0
	}
	n, err := s.killed()
	if err != nil {
		warn("%v", err)
	}
	return n
}

// killedForMemory counts the processes that the kernel has killed for want of memory since its start.
func killedForMemory() (int, error) {
	data, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0, fmt.Errorf("cannot count what was killed for want of memory: %w", err)
	}
	return readKilled(string(data))
}

func readKilled(vmstat string) (int, error) {
	for line := range strings.Lines(vmstat) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.Atoi(strings.TrimSpace(n))
		}
	}
	return 0, fmt.Errorf("cannot count what was killed for want of memory: the kernel does not")
}

// explain adds to an outcome what ended the run beside the workload itself: sick is why it was stopped as unhealthy, killed how many
// processes were killed for want of memory meanwhile, stopped that it was asked to end.
func (o *outcome) explain(sick error, killed int, stopped bool) {
	switch {
	case sick != nil && !stopped:
		o.Cause, o.Detail = agent.CauseHealth, "it was unhealthy and stopped: "+sick.Error()
		if o.Code == 0 {
			o.Code = 1 // it ended as it was asked to, which is a failure all the same
		}
	case killed > 0 && o.Signal == sigKill && !stopped:
		o.Cause, o.Detail = agent.CauseMemory, "killed by the guest's kernel for want of memory"
	case killed > 0 && o.Detail == "":
		o.Detail = fmt.Sprintf("while it ran the guest's kernel killed processes for want of memory: %d", killed)
	}
}

const sigKill = 9
