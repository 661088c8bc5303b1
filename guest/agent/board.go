package agent

import (
	"context"
	"sync"
)

// Board holds what a guest has to say about itself: the present state for who comes late, and each change for who listens.
type Board struct {
	mu      sync.Mutex
	present []Event // what still holds, oldest first
	recent  []Event // the last events, for listeners
	seq     int     // events ever posted
	told    int     // events that a listener has sent on
	wake    chan struct{}
}

// recentEvents is how many events a listener may be behind before it is given the present state instead.
const recentEvents = 64

// NewBoard returns an empty board.
func NewBoard() *Board { return &Board{wake: make(chan struct{})} }

// Post announces an event.
func (b *Board) Post(e Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch e.Kind {
	case WorkloadStarted, WorkloadExited:
		b.present = nil // a new start, or an end, makes void what was said about the run before
	case HealthChecked:
		b.present = dropKind(b.present, HealthChecked)
	case Ready:
		b.present = dropKind(b.present, NotReady)
	}
	b.present = append(b.present, e)
	b.recent = append(b.recent, e)
	if len(b.recent) > recentEvents {
		b.recent = append([]Event(nil), b.recent[len(b.recent)-recentEvents:]...)
	}
	b.seq++
	b.signal()
}

func dropKind(events []Event, k EventKind) (kept []Event) {
	for _, e := range events {
		if e.Kind != k {
			kept = append(kept, e)
		}
	}
	return kept
}

func (b *Board) signal() {
	close(b.wake)
	b.wake = make(chan struct{})
}

// after waits for events after the first seq ones and returns them with the new seq. With seq < 0, or when they are no longer
// kept, it returns the present state at once.
func (b *Board) after(ctx context.Context, seq int) ([]Event, int, error) {
	for {
		b.mu.Lock()
		now, wake := b.seq, b.wake
		var events []Event
		switch {
		case seq < 0 || now-seq > len(b.recent):
			events = append(events, b.present...)
			b.mu.Unlock()
			return events, now, nil
		case seq < now:
			events = append(events, b.recent[len(b.recent)-(now-seq):]...)
			b.mu.Unlock()
			return events, now, nil
		}
		b.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, seq, ctx.Err()
		case <-wake:
		}
	}
}

// sent says that a listener has passed on the first seq events.
func (b *Board) sent(seq int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if seq > b.told {
		b.told = seq
		b.signal()
	}
}

// Delivered waits until a listener has passed on all that was posted, or the context ends; it says whether one has.
func (b *Board) Delivered(ctx context.Context) bool {
	for {
		b.mu.Lock()
		done, wake := b.told >= b.seq, b.wake
		b.mu.Unlock()
		if done {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-wake:
		}
	}
}
