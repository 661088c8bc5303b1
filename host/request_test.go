package host

import (
	"strings"
	"testing"
	"time"
)

// TestARequestToAVMThatBeginsToEndIsRefused at once: nobody will do it.
func TestARequestToAVMThatBeginsToEndIsRefused(t *testing.T) {
	s := &Supervisor{name: "x", requests: make(chan request), status: Status{State: Running}}
	answered := make(chan error, 1)
	go func() { answered <- s.ask(t.Context(), "reload", func(*life) error { return nil }) }()
	select {
	case err := <-answered:
		t.Fatalf("a VM that is busy: %v", err)
	case <-time.After(5 * requestPoll):
	}
	s.mu.Lock()
	s.status.State = Stopping
	s.mu.Unlock()
	select {
	case err := <-answered:
		if err == nil || !strings.Contains(err.Error(), "cannot reload VM x: it is stopping") {
			t.Error(err)
		}
	case <-time.After(requestWait / 2):
		t.Error("it waits for a VM that ends")
	}
}
