package host

import (
	"sync"
	"time"
)

// Progress is one event of a VM's way up, as the supervisor tells it to whoever
// follows.
type Progress struct {
	Time time.Time `json:"time"`
	// Step is the step that this is about, one of the names in up.go.
	Step string `json:"step,omitempty"`
	// Phase is what the step is part of, for people: check, disks, network, VM,
	// guest or ready.
	Phase string        `json:"phase,omitempty"`
	State ProgressState `json:"state"`
	// Text is a note, or why the step failed.
	Text string `json:"text,omitempty"`
	// Took is how long the step took, in milliseconds; of Done and Failed.
	Took int64 `json:"took,omitempty"`
}

// ProgressState is what happened to a step.
type ProgressState string

// The states of a step, and the two ends.
const (
	StepBegun  ProgressState = "begun"
	StepNote   ProgressState = "note" // something that the owner should know
	StepDone   ProgressState = "done"
	StepFailed ProgressState = "failed"
	VMReady    ProgressState = "ready"
	VMEnded    ProgressState = "ended" // Text says why
)

// Last says whether nothing follows that one who waits for the VM needs.
func (p Progress) Last() bool { return p.State == VMReady || p.State == VMEnded }

// journal keeps a start's progress for those who come to follow it later.
type journal struct {
	mu     sync.Mutex
	before int // events of earlier lives
	events []Progress
	grown  chan struct{} // closed and replaced when there is more
}

// journalMax bounds the events of one life: some twenty steps and their notes.
const journalMax = 500

func newJournal() *journal { return &journal{grown: make(chan struct{})} }

func (j *journal) add(p Progress) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.events) >= journalMax && !p.Last() {
		return
	}
	p.Time = time.Now().UTC()
	j.events = append(j.events, p)
	close(j.grown)
	j.grown = make(chan struct{})
}

// restart forgets the last life's events.
func (j *journal) restart() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.before += len(j.events)
	j.events = nil
}

// from returns the events of this life after the first n of all lives, how many
// there have been by then, and a channel that is closed when there are more.
func (j *journal) from(n int) ([]Progress, int, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n = max(n-j.before, 0)
	return append([]Progress(nil), j.events[n:]...), j.before + len(j.events), j.grown
}
