package host

import (
	"bytes"
	"context"
	"log"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/vmm"
)

func TestHealthInStatusAndLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said bytes.Buffer
		s := &Supervisor{name: "x", journal: newJournal(), log: log.New(&said, "", 0), status: Status{State: Running, Since: time.Now()}}
		l := &life{Supervisor: s}
		is := func(want, why string) {
			t.Helper()
			if got, gotWhy := s.Status().health(time.Now()); got != want || gotWhy != why {
				t.Errorf("health is %q, %q, want %q, %q", got, gotWhy, want, why)
			}
		}
		is(HealthReady, "")
		l.heed(gate.Message{Kind: gate.Checked})
		is(HealthHealthy, "")
		l.heed(gate.Message{Kind: gate.Checked, Failures: 1, Detail: "answered 503"})
		is(HealthHealthy, "")
		l.heed(gate.Message{Kind: gate.Checked, Failures: 2, Unhealthy: true, Detail: "answered 503"})
		is(HealthUnhealthy, "2 checks failed, the last answer: answered 503")
		time.Sleep(healthLogged)
		l.heed(gate.Message{Kind: gate.Checked})
		is(HealthHealthy, "")
		if got := said.String(); got != "the workload is unhealthy: 2 checks failed, the last answer: answered 503\nthe workload is healthy again\n" {
			t.Errorf("the log says %q", got)
		}
		// A guest that says so without end does not fill the log.
		said.Reset()
		for i := range 1000 {
			l.heed(gate.Message{Kind: gate.Checked, Failures: i % 2, Unhealthy: i%2 == 1, Detail: "x"})
		}
		if said.Len() > 100 {
			t.Errorf("the log says %q", &said)
		}
		l.heed(gate.Message{Kind: gate.WorkloadEnded, Cause: gate.CauseMemory, Code: 137, Again: true, Detail: "signal 9"})
		is(HealthRestarting, "the workload ended: signal 9")
		if f := s.Status().Faults; len(f) != 1 || f[0].Kind != EndOutOfMemory {
			t.Errorf("faults: %+v", f)
		}
	})
}

// standing is a VMM that runs until it is stopped.
type standing struct {
	vmm.Instance
	gone chan struct{}
	said []string
}

func (s *standing) Wait() vmm.Exit { <-s.gone; return vmm.Exit{Reason: vmm.ExitPoweredOff} }
func (s *standing) PowerButton(context.Context) error {
	s.said = append(s.said, "button")
	return nil
}
func (s *standing) Stop(context.Context) error {
	s.said = append(s.said, "stop")
	close(s.gone)
	return nil
}

func TestAGuestThatIsLostIsEndedWhereThatIsDeclared(t *testing.T) {
	for _, restart := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s := &Supervisor{name: "x", journal: newJournal(), log: log.New(&bytes.Buffer{}, "", 0)}
			i := &standing{gone: make(chan struct{})}
			messages := make(chan gate.Message, 1)
			l := &life{Supervisor: s, vm: &config.VM{Health: &config.Health{Restart: restart}}, instance: i, gate: &gateProcess{messages: messages, ended: make(chan struct{})}}
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			messages <- gate.Message{Kind: gate.Lost, Detail: "its connection ended"}
			kind, err := l.awaitEnd(ctx)
			if restart && (kind != EndAgent || err == nil || !strings.Contains(err.Error(), "its connection ended") || strings.Join(i.said, " ") != "button stop") {
				t.Errorf("%s, %v, %v", kind, err, i.said)
			}
			if !restart {
				if kind != EndByOwner || s.Status().Lost == "" || len(i.said) > 0 {
					t.Errorf("%s, %v, %v: want it left alone", kind, err, i.said)
				}
				close(i.gone)
			}
		})
	}
}
