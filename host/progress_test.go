package host

import "testing"

func TestJournalTellsTheLateWhatTheyMissed(t *testing.T) {
	j := newJournal()
	j.add(Progress{Step: "image", State: StepBegun})
	events, n, more := j.from(0)
	if len(events) != 1 {
		t.Fatalf("%d events, want 1", len(events))
	}
	select {
	case <-more:
		t.Fatal("told of more before there is any")
	default:
	}
	j.add(Progress{State: VMReady})
	<-more
	if events, n, _ = j.from(n); len(events) != 1 || !events[0].Last() {
		t.Errorf("after the first: %v, want the end", events)
	}
	j.restart()
	for _, step := range []string{"image", "kernel", "address"} {
		j.add(Progress{Step: step, State: StepBegun})
		if events, n, _ = j.from(n); len(events) != 1 || events[0].Step != step {
			t.Errorf("a follower of the last life got %v of the new one, want %s alone", events, step)
		}
	}
	if events, _, _ = j.from(0); len(events) != 3 {
		t.Errorf("a new follower got %v, want the new life's three", events)
	}
}

func TestJournalIsBoundedButKeepsTheEnd(t *testing.T) {
	j := newJournal()
	for range journalMax + 10 {
		j.add(Progress{State: StepNote})
	}
	j.add(Progress{State: VMEnded})
	events, _, _ := j.from(0)
	if len(events) != journalMax+1 || events[journalMax].State != VMEnded {
		t.Errorf("%d events, the last is %q", len(events), events[len(events)-1].State)
	}
}
