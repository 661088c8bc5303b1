package host

import (
	"context"
	"fmt"
	"time"
)

// request is something that is to be done to a running VM. The goroutine that
// waits for the VM's end does it, between two of the things that it waits for, so
// that nothing else happens to the VM meanwhile.
type request struct {
	do   func(*life) error
	done chan error
}

// requestWait bounds the wait for a VM that is busy with another request.
const requestWait = 15 * time.Second

// requestPoll is how often is looked whether there is anyone to wait for.
const requestPoll = 20 * time.Millisecond

// ask has do done to the running VM. A VM that is not ready, or ends before it
// comes to it, is an error; to says for it what was asked.
func (s *Supervisor) ask(ctx context.Context, to string, do func(*life) error) error {
	refusal := func() error {
		st := s.Status()
		if st.State == Running || st.State == Paused {
			return nil
		}
		return fmt.Errorf("cannot %s VM %s: it is %s", to, s.name, st.State)
	}
	if err := refusal(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestWait)
	defer cancel()
	tick := time.NewTicker(requestPoll)
	defer tick.Stop()
	r := request{do, make(chan error, 1)}
	for {
		select {
		case s.requests <- r:
			return <-r.done
		case <-tick.C:
			// It may have begun to end before it came to this.
			if err := refusal(); err != nil {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("cannot %s VM %s: it is busy with another request: %w", to, s.name, context.Cause(ctx))
		}
	}
}
