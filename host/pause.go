package host

import (
	"context"
	"fmt"
	"time"

	"github.com/clawvm/clawvm/host/gate"
)

// pauseWait bounds what a VMM is asked for a pause or its end.
const pauseWait = 10 * time.Second

// clockWait is how long a resume waits until the guest's clock is right. The
// guest goes on either way.
const clockWait = 10 * time.Second

// pause stops the VM where it stands: its processors, and its VMM's process.
// The gate stays: ports accept, and wait. changed is false for one that is paused
// already.
func (s *Supervisor) pause(ctx context.Context) (changed bool, err error) {
	err = s.ask(ctx, "pause", func(l *life) error {
		if l.paused {
			return nil
		}
		ctx, cancel := context.WithTimeout(context.Background(), pauseWait)
		defer cancel()
		if err := l.instance.Pause(ctx); err != nil {
			return fmt.Errorf("cannot pause VM %s: %w; clawvm down --timeout 0 %s kills it", l.name, err, l.name)
		}
		changed, l.paused = true, true
		l.update(func(st *Status) { st.State = Paused })
		l.logf("paused")
		return l.gate.conn.Send(gate.Message{Kind: gate.Paused})
	})
	return changed, err
}

// resume lets a paused VM go on and returns when its clock is right again.
func (s *Supervisor) resume(ctx context.Context) (changed bool, err error) {
	var clock <-chan struct{}
	err = s.ask(ctx, "resume", func(l *life) error {
		if !l.paused {
			return nil
		}
		changed, clock = true, l.clockSet
		if err := l.goOn(); err != nil {
			return err
		}
		l.update(func(st *Status) { st.State = Running })
		return nil
	})
	if clock == nil || err != nil {
		return changed, err
	}
	select {
	case <-clock:
	case <-after(clockWait):
		s.logf("resumed, and the guest does not say that its clock is right")
	case <-ctx.Done():
	}
	return changed, nil
}

// goOn resumes the VM and has its clock set.
func (l *life) goOn() error {
	select {
	case <-l.clockSet: // of a resume that nobody waited for
	default:
	}
	ctx, cancel := context.WithTimeout(context.Background(), pauseWait)
	defer cancel()
	if err := l.instance.Resume(ctx); err != nil {
		return fmt.Errorf("cannot resume VM %s: %w; clawvm restart %s starts it anew", l.name, err, l.name)
	}
	l.paused = false
	l.logf("resumed")
	return l.gate.conn.Send(gate.Message{Kind: gate.Resumed})
}

// wakeToEnd lets a paused VM go on so that its guest can end by itself, and says
// whether it does. Without a grace it is not let go on: whoever pulled the brake may
// want it never to execute anything again. It is killed then.
func (l *life) wakeToEnd(grace time.Duration) bool {
	if grace <= 0 {
		l.logf("the VM is paused, and its guest gets no time to end: it is killed")
		return false
	}
	if err := l.goOn(); err != nil {
		l.logf("%v: it is killed", err)
		return false
	}
	return true
}

// heedClock takes note of the gate's answer to a resume.
func (l *life) heedClock(m gate.Message) {
	if m.Detail != "" {
		l.logf("the guest's clock could not be set after the pause: %s", m.Detail)
	}
	select {
	case l.clockSet <- struct{}{}:
	default:
	}
}
