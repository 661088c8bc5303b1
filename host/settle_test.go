package host

import (
	"context"
	"io"
	"log"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

func TestEnding(t *testing.T) {
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if ending(pid) {
		t.Error("a process that runs is said to end")
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if ending(pid) {
		t.Error("a process that is stopped is said to end")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// Whatever the kernel has done of it by now.
	if !ending(pid) {
		t.Error("a process that was killed is said to run")
	}
	if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if !ending(pid) {
		t.Error("a zombie is said to run")
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it ended by itself")
	}
	if !ending(pid) {
		t.Error("one whose end was seen is said to run")
	}
}

func TestEndingStat(t *testing.T) {
	// The fields 3 to 31 of a shell that runs, of one that was killed while it was
	// stopped, and of one whose memory is being given back.
	const head, tail = "123 (a) R b) ", " 0 0 0 17 0 0 0\n"
	for _, c := range []struct {
		fields string
		want   bool
	}{
		{"S 1 123 123 0 -1 4194560 90 0 0 0 0 0 0 0 20 0 1 0 1 2 3 4 5 6 7 8 9 0", false},
		{"T 1 123 123 0 -1 4194560 90 0 0 0 0 0 0 0 20 0 1 0 1 2 3 4 5 6 7 8 9 256", true},
		{"R 1 123 123 0 -1 4194564 90 0 0 0 0 0 0 0 20 0 1 0 1 0 0 4 0 0 0 0 0 0", true},
		{"S 1", false},
	} {
		if got := endingStat(head + c.fields + tail); got != c.want {
			t.Errorf("%s: %t, want %t", c.fields, got, c.want)
		}
	}
}

// TestSettled: who asks for a sure status waits while a part of the VM has died and
// the supervisor has not seen it, and no longer.
func TestSettled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Supervisor{name: "x", journal: newJournal(), log: log.New(io.Discard, "", 0), status: Status{State: Running}}
		l := &life{Supervisor: s}
		gone := 1 << 30 // no process has this number
		began := time.Now()
		if st := s.settled(t.Context()); st.State != Running || time.Since(began) != 0 {
			t.Errorf("with nothing to wait for: %s after %s", st.State, time.Since(began))
		}
		s.parts = []int{os.Getpid(), gone}
		s.journal.add(Progress{State: VMReady})
		answer := make(chan Status)
		go func() { answer <- s.settled(t.Context()) }()
		time.Sleep(time.Second)
		select {
		case st := <-answer:
			t.Fatalf("told %s, and a part of the VM is gone", st.State)
		default:
		}
		l.over()
		if st := <-answer; st.State != Stopping {
			t.Errorf("told %s, want %s", st.State, Stopping)
		}
		if events, _, _ := s.journal.from(0); len(events) != 0 {
			t.Errorf("who comes to follow is told of %v", events)
		}
		s.status.State = Running
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		if s.settled(ctx); time.Since(began) != time.Second {
			t.Errorf("waited for %s, longer than who asks", time.Since(began))
		}
	})
}
