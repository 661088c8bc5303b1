package boot

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
	"golang.org/x/sys/unix"
)

// testGroup makes a cgroup in the machine's v2 hierarchy.
func testGroup(t *testing.T) *cgroup {
	t.Helper()
	needsRoot(t)
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(root, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		g := &cgroup{filepath.Join(root, "clawvm-test-"+strconv.Itoa(os.Getpid()))}
		if err := os.Mkdir(g.path, 0o755); err != nil {
			t.Skipf("no control group can be made: %v", err)
		}
		t.Cleanup(func() {
			if err := errors.Join(g.empty(), os.Remove(g.path)); err != nil {
				t.Error(err)
			}
		})
		if _, err := os.Stat(filepath.Join(g.path, "cgroup.kill")); err != nil {
			t.Skipf("the kernel can't kill a control group: %v", err)
		}
		return g
	}
	t.Skip("no cgroup v2 is mounted")
	return nil
}

func testSupervisor(t *testing.T, w *guest.Workload) *supervisor {
	t.Helper()
	return &supervisor{
		workload: w, children: newChildren(), group: testGroup(t), log: agent.NewLog(), board: agent.NewBoard(), uptime: uptime, stopping: make(chan struct{}),
		command: func(status *os.File) (*exec.Cmd, []*os.File, error) {
			return stageCommand(&stageSpec{Argv: w.Argv, Env: []string{"PATH=" + defaultPath}}, nil, status)
		},
	}
}

// listen serves the supervisor's board and log to a client, as a guest does.
func (s *supervisor) listen(t *testing.T) (<-chan agent.Event, *agent.LogReader) {
	t.Helper()
	c := connectTo(t, &agent.Server{Board: s.board, Log: s.log})
	events, _, err := c.Events(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	l, err := c.Logs(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return events, l
}

func next(t *testing.T, events <-chan agent.Event, kind agent.EventKind) agent.Event {
	t.Helper()
	select {
	case e := <-events:
		if e.Kind != kind {
			t.Fatalf("%+v instead of %s", e, kind)
		}
		return e
	case <-time.After(20 * time.Second):
		t.Fatalf("no %s event", kind)
	}
	return agent.Event{}
}

func TestSupervisorStartsAgainUntilAnExitCodeEndsIt(t *testing.T) {
	count := filepath.Join(t.TempDir(), "count")
	w := &guest.Workload{Argv: []string{"sh", "-c", `echo run; test -e ` + count + ` && exit 78; touch ` + count + `; exit 1`}, Restart: guest.RestartOnFailure, NoRestart: []int{78}}
	s := testSupervisor(t, w)
	events, _ := s.listen(t)
	done := make(chan outcome, 1)
	go func() { done <- s.run() }()
	next(t, events, agent.WorkloadStarted)
	next(t, events, agent.Ready)
	if e := next(t, events, agent.WorkloadExited); e.Code != 1 || e.Final || e.Next != 1 {
		t.Errorf("%+v", e)
	}
	if e := next(t, events, agent.WorkloadStarted); e.Restarts != 1 {
		t.Errorf("%+v", e)
	}
	next(t, events, agent.Ready)
	if e := next(t, events, agent.WorkloadExited); e.Code != 78 || !e.Final {
		t.Errorf("%+v", e)
	}
	if o := <-done; o.Code != 78 {
		t.Errorf("%+v", o)
	}
}

func TestSupervisorSaysWhyItCannotStart(t *testing.T) {
	for program, want := range map[string]outcome{"no-such-program": {Code: 127}, "/etc/passwd": {Code: 126}} {
		s := testSupervisor(t, &guest.Workload{Argv: []string{program}, Restart: guest.RestartNo})
		o := s.run()
		if o.Code != want.Code || !strings.Contains(o.Detail, program) {
			t.Errorf("%s: %+v", program, o)
		}
	}
}

// TestSupervisorStopKillsWhatEscaped stops a workload that ignores TERM and has left a process in a session of its own behind.
func TestSupervisorStopKillsWhatEscaped(t *testing.T) {
	s := testSupervisor(t, &guest.Workload{
		Argv:    []string{"sh", "-c", `trap '' TERM; (setsid sleep 1000 & ) ; echo up; while :; do sleep 0.1; done`},
		Restart: guest.RestartAlways, Stop: guest.Stop{Signal: "TERM", Timeout: 60},
	})
	events, log := s.listen(t)
	done := make(chan outcome, 1)
	go func() { done <- s.run() }()
	next(t, events, agent.WorkloadStarted)
	if p, err := log.Next(); err != nil || string(p.Data) != "up\n" {
		t.Fatalf("%q, %v", p.Data, err)
	}
	s.stop(200 * time.Millisecond)
	s.stop(time.Hour) // the first one counts
	select {
	case o := <-done:
		if o.Code != 137 {
			t.Errorf("%+v", o)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the workload doesn't end")
	}
	if some, err := s.group.populated(); err != nil || some {
		t.Errorf("processes are left: %v, %v", some, err)
	}
}

func TestSupervisorReportsThatItIsNotReady(t *testing.T) {
	s := testSupervisor(t, &guest.Workload{Argv: []string{"sleep", "1000"}, Restart: guest.RestartNo, Ready: guest.Ready{TCP: 1, Timeout: 1}})
	ready := make(chan struct{})
	s.probe = func(context.Context) error {
		select {
		case <-ready:
			return nil
		default:
			return errors.New("nobody answers")
		}
	}
	events, _ := s.listen(t)
	done := make(chan outcome, 1)
	go func() { done <- s.run() }()
	next(t, events, agent.WorkloadStarted)
	if e := next(t, events, agent.NotReady); e.Detail != "nobody answers" {
		t.Errorf("%+v", e)
	}
	close(ready)
	next(t, events, agent.Ready)
	s.stop(0)
	if o := <-done; o.Signal != int(unix.SIGTERM) {
		t.Errorf("%+v", o)
	}
}
