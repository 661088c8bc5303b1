package boot

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
)

// checked gives the looks of a health check their answers, and returns what is posted, in short.
func checked(t *testing.T, h guest.Health, answers ...error) (posted []string, sick error) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		looks, began := 0, time.Now()
		look := func(ctx context.Context) error {
			if looks == len(answers) {
				cancel()
				return errors.New("after the end")
			}
			looks++
			if got, want := time.Since(began), time.Duration(looks*h.Interval)*time.Second; got != want {
				t.Errorf("look %d comes after %s, want %s", looks, got, want)
			}
			if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) != time.Duration(h.Timeout)*time.Second {
				t.Errorf("look %d has until %s", looks, deadline)
			}
			return answers[looks-1]
		}
		sick = watchHealth(ctx, &h, look, func(e agent.Event) {
			posted = append(posted, fmt.Sprint(looks, " ", e.Failures, " ", e.Unhealthy, " ", e.Detail))
		})
	})
	return posted, sick
}

func TestHealthIsToldWhenItChanges(t *testing.T) {
	bad := errors.New("answered 503")
	got, sick := checked(t, guest.Health{Interval: 30, Timeout: 5, Retries: 2}, nil, nil, bad, nil, nil, bad, bad, bad, nil)
	want := []string{"1 0 false ", "3 1 false answered 503", "4 0 false ", "6 1 false answered 503", "7 2 true answered 503", "8 3 true answered 503", "9 0 false "}
	if strings.Join(got, "\n") != strings.Join(want, "\n") || sick != nil {
		t.Errorf("posted\n%s\nand %v, want\n%s", strings.Join(got, "\n"), sick, strings.Join(want, "\n"))
	}
}

func TestHealthStopsWhatIsUnhealthyWhereThatIsDeclared(t *testing.T) {
	bad := errors.New("answered 503")
	got, sick := checked(t, guest.Health{Interval: 1, Timeout: 1, Retries: 3, Restart: true}, bad, bad, nil, bad, bad, bad, nil)
	if sick != bad || len(got) != 6 || got[5] != "6 3 true answered 503" {
		t.Errorf("%v, %v", got, sick)
	}
}

func TestHealthLookAsksLoopbackFirstAndTellsTheAnswer(t *testing.T) {
	status := http.StatusOK
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		fmt.Fprint(w, `{"ready":false,"failing":["telegram"]}`)
	}))
	defer srv.Close()
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		t.Fatal(err)
	}
	// The first would be asked for a second, if it were the first.
	addresses := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("127.0.0.1")}
	look := newHealthLook(&guest.Health{Check: guest.Ready{HTTP: &guest.HTTPReady{Port: port, Path: "/readyz"}}, Timeout: 1}, addresses, nil)
	if err := look(t.Context()); err != nil {
		t.Errorf("a good answer: %v", err)
	}
	status = http.StatusServiceUnavailable
	if err := look(t.Context()); err == nil || !strings.Contains(err.Error(), `/readyz answered 503 instead of 200: {"ready":false,"failing":["telegram"]}`) {
		t.Errorf("a bad answer: %v", err)
	}
}

func TestOutcomeIsExplained(t *testing.T) {
	sick := errors.New("answered 503")
	for name, c := range map[string]struct {
		o       outcome
		sick    error
		killed  int
		stopped bool
		want    outcome
	}{
		"by itself":        {o: outcome{Code: 3}, want: outcome{Code: 3}},
		"for memory":       {o: outcome{Code: 137, Signal: 9}, killed: 1, want: outcome{Code: 137, Signal: 9, Cause: agent.CauseMemory, Detail: "killed by the guest's kernel for want of memory"}},
		"a child of it":    {o: outcome{Code: 1}, killed: 2, want: outcome{Code: 1, Detail: "while it ran the guest's kernel killed processes for want of memory: 2"}},
		"killed by a user": {o: outcome{Code: 137, Signal: 9}, want: outcome{Code: 137, Signal: 9}},
		"killed by us":     {o: outcome{Code: 137, Signal: 9}, killed: 1, stopped: true, want: outcome{Code: 137, Signal: 9, Detail: "while it ran the guest's kernel killed processes for want of memory: 1"}},
		"sick":             {o: outcome{}, sick: sick, want: outcome{Code: 1, Cause: agent.CauseHealth, Detail: "it was unhealthy and stopped: answered 503"}},
		"sick, and down":   {o: outcome{}, sick: sick, stopped: true},
	} {
		c.o.explain(c.sick, c.killed, c.stopped)
		if c.o != c.want {
			t.Errorf("%s: %+v, want %+v", name, c.o, c.want)
		}
	}
}

func TestKilledForMemoryIsCounted(t *testing.T) {
	if n, err := readKilled("oom_kill_disable 7\noom_kill 3\nx 1\n"); n != 3 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := readKilled("x 1\n"); err == nil {
		t.Error("a kernel that doesn't count is no error")
	}
	if _, err := killedForMemory(); err != nil {
		t.Error(err)
	}
}

// TestSupervisorRestartsWhatIsUnhealthy lets a real workload become unhealthy: it is stopped, which is a failure, and starts again.
func TestSupervisorRestartsWhatIsUnhealthy(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "broken")
	s := testSupervisor(t, &guest.Workload{
		Argv: []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"}, Restart: guest.RestartOnFailure,
		Health: &guest.Health{Interval: 1, Timeout: 1, Retries: 1, Restart: true},
	})
	s.health = func(context.Context) error {
		if _, err := os.Stat(broken); err == nil {
			return errors.New("it is broken")
		}
		return nil
	}
	events, _ := s.listen(t)
	done := make(chan outcome, 1)
	go func() { done <- s.run() }()
	next(t, events, agent.WorkloadStarted)
	next(t, events, agent.Ready)
	if e := next(t, events, agent.HealthChecked); e.Unhealthy || e.Failures != 0 {
		t.Errorf("%+v", e)
	}
	if err := os.WriteFile(broken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if e := next(t, events, agent.HealthChecked); !e.Unhealthy || e.Failures != 1 || e.Detail != "it is broken" {
		t.Errorf("%+v", e)
	}
	if e := next(t, events, agent.WorkloadExited); e.Final || e.Code != 1 || e.Cause != agent.CauseHealth {
		t.Errorf("%+v", e)
	}
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	next(t, events, agent.WorkloadStarted)
	next(t, events, agent.Ready)
	s.stop(time.Second)
	<-done
}
