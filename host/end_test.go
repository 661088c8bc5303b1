package host

import (
	"io"
	"log"
	"os"
	"testing"

	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/secrets"
)

func TestWhatTheGateTellsIsInTheStatus(t *testing.T) {
	s := &Supervisor{name: "x", journal: newJournal(), log: log.New(io.Discard, "", 0)}
	l := &life{Supervisor: s}
	l.heed(gate.Message{Kind: gate.WorkloadEnded, Code: 3, Again: true, Detail: "exit code 3; started again in 1 s"})
	l.heed(gate.Message{Kind: gate.WorkloadEnded, Code: 3, Detail: "exit code 3"})
	l.heed(gate.Message{Kind: gate.Lost, Detail: "its connection ended"})
	l.heed(gate.Message{Kind: "nonsense", Detail: "ignored"})
	st := s.Status()
	if st.Restarts != 1 {
		t.Errorf("%d restarts, want 1: the last end was for good", st.Restarts)
	}
	if st.Workload != "exit code 3" || st.Lost != "its connection ended" {
		t.Errorf("status is %+v", st)
	}
	l.heed(gate.Message{Kind: gate.Ending, Code: 3, Detail: gate.EndWorkload})
	if l.announced == nil || l.announced.Code != 3 {
		t.Errorf("announced: %+v", l.announced)
	}
}

// An agent that goes with its guest, as the owner asked, is not missed.
func TestAnAgentIsNotMissedAtTheEnd(t *testing.T) {
	s := &Supervisor{name: "x", journal: newJournal(), log: log.New(io.Discard, "", 0), status: Status{State: Stopping}}
	l := &life{Supervisor: s}
	l.heed(gate.Message{Kind: gate.Lost, Detail: "unexpected EOF"})
	if st := s.Status(); st.Lost != "" {
		t.Errorf("status is %+v", st)
	}
}

// A rotation that comes before the tmpfs is mounted, or after it is gone, must
// write nothing: what is below the mount point is a disk.
func TestSecretsAreStagedOnlyWhereTheirTmpfsIs(t *testing.T) {
	dir := t.TempDir()
	s := &Supervisor{name: "x", paths: Paths{Run: dir, State: dir}, journal: newJournal(), log: log.New(io.Discard, "", 0)}
	l := &life{Supervisor: s, secrets: []secrets.Secret{{Name: "made", Generate: 32, Mode: 0o400}}}
	if err := l.restage(); err == nil {
		t.Error("staged without a tmpfs")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("written: %v, %v", entries, err)
	}
}
