package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/clawvm/clawvm/vmm"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}` + "\r\n"

// double plays QEMU: it greets, answers qmp_capabilities, and each further command by answer.
func double(t *testing.T, conn net.Conn, answer func(command string, id int) string) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer conn.Close()
		if _, err := io.WriteString(conn, greeting); err != nil {
			return
		}
		for lines := bufio.NewScanner(conn); lines.Scan(); {
			var c struct {
				Execute string
				ID      int
			}
			if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
				t.Error(err)
				return
			}
			say := fmt.Sprintf(`{"return": {}, "id": %d}`+"\r\n", c.ID)
			if c.Execute != "qmp_capabilities" {
				say = answer(c.Execute, c.ID)
			}
			if _, err := io.WriteString(conn, say); err != nil || say == "" {
				return
			}
		}
	}()
	t.Cleanup(func() { <-done })
}

func open(t *testing.T, event func(qmpEvent), answer func(string, int) string) *qmp {
	t.Helper()
	ours, theirs := net.Pipe()
	double(t, theirs, answer)
	q, err := openQMP(context.Background(), ours, event)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := q.close(); err != nil {
			t.Error(err)
		}
	})
	return q
}

func TestQMP(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	t.Run("answers, errors and events", func(t *testing.T) {
		var mu sync.Mutex
		var events []qmpEvent
		q := open(t, func(e qmpEvent) { mu.Lock(); events = append(events, e); mu.Unlock() }, func(command string, id int) string {
			if command == "fail" {
				return fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "no such thing"}, "id": %d}`+"\n", id)
			}
			return `{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}, "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n" +
				`{"event": "ODD", "data": [1, 2]}` + "\n" +
				`{"return": {"old": true}, "id": 0}` + "\n" +
				fmt.Sprintf(`{"return": {"running": true}, "id": %d}`+"\n", id)
		})
		got, err := q.do(ctx, "query-status")
		if err != nil || string(got) != `{"running": true}` {
			t.Errorf("%s, %v", got, err)
		}
		mu.Lock()
		if len(events) != 1 || events[0].Name != "SHUTDOWN" || events[0].Data.Reason != "guest-reset" || !events[0].Data.Guest {
			t.Errorf("events %+v", events)
		}
		mu.Unlock()
		var refusal *qmpError
		if _, err := q.do(ctx, "fail"); !errors.As(err, &refusal) || err.Error() != "cannot run QMP fail: no such thing" {
			t.Errorf("%v", err)
		}
	})
	t.Run("silence", func(t *testing.T) {
		silent := make(chan struct{})
		first := 0
		q := open(t, func(qmpEvent) {}, func(command string, id int) string {
			if command == "slow" {
				first = id
				<-silent
				return "{}\n" // no answer to anything
			}
			// The answer to the first comes late, before that to the second.
			return fmt.Sprintf(`{"return": {"late": true}, "id": %d}`+"\n"+`{"return": {}, "id": %d}`+"\n", first, id)
		})
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		if _, err := q.do(short, "slow"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		close(silent)
		if got, err := q.do(ctx, "next"); err != nil || string(got) != "{}" {
			t.Errorf("%s, %v", got, err)
		}
	})
	for name, answer := range map[string]string{
		"end":         "",
		"garbage":     "what?\n",
		"endless":     `{"event": "` + strings.Repeat("x", maxLine) + `"}` + "\n",
		"wrong types": `{"event": 7}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			q := open(t, func(qmpEvent) {}, func(string, int) string { return answer })
			if _, err := q.do(ctx, "quit"); err == nil {
				t.Error("no error")
			} else if name == "end" && !errors.Is(err, errQMPClosed) {
				t.Errorf("%v", err)
			} else if name == "endless" && !errors.Is(err, bufio.ErrTooLong) {
				t.Errorf("%v", err)
			}
		})
	}
	for name, said := range map[string]string{"no greeting": "", "another greeting": "220 smtp ready\n", "no QMP": "{}\n"} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			go func() {
				if _, err := io.WriteString(theirs, said); err != nil {
					t.Error(err)
				}
				if err := theirs.Close(); err != nil {
					t.Error(err)
				}
			}()
			if _, err := openQMP(ctx, ours, func(qmpEvent) {}); err == nil {
				t.Error("no error")
			}
		})
	}
	t.Run("nobody greets", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		if _, err := openQMP(short, ours, func(qmpEvent) {}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}

func TestExit(t *testing.T) {
	signaled := func(s syscall.Signal) syscall.WaitStatus { return syscall.WaitStatus(s) }
	exited := func(code int) syscall.WaitStatus { return syscall.WaitStatus(code << 8) }
	for _, c := range []struct {
		name   string
		ending ending
		want   vmm.ExitReason
		text   string
	}{
		{"power-off", ending{reason: reasonPowerOff, status: exited(0)}, vmm.ExitPoweredOff, "powered off"},
		{"reset", ending{reason: reasonReset, status: exited(0)}, vmm.ExitRebooted, "rebooted"},
		{"panic", ending{panicked: true, reason: reasonPanic, status: exited(0)}, vmm.ExitPanicked, "panicked: the guest's kernel panicked"},
		{"panic, then killed", ending{panicked: true, asked: true, status: signaled(9)}, vmm.ExitPanicked, "panicked by signal 9 (killed): the guest's kernel panicked"},
		{"power-off while it was stopped", ending{reason: reasonPowerOff, asked: true, status: signaled(9)}, vmm.ExitPoweredOff, "powered off by signal 9 (killed)"},
		{"quit", ending{reason: reasonQuit, asked: true, status: exited(0)}, vmm.ExitKilled, "killed"},
		{"kill", ending{asked: true, status: signaled(9)}, vmm.ExitKilled, "killed by signal 9 (killed)"},
		{"killed by another", ending{status: signaled(9)}, vmm.ExitKilled, "killed by signal 9 (killed)"},
		{"told to end", ending{reason: reasonSignal, status: exited(0), said: "terminating on signal 15"}, vmm.ExitKilled, "killed: terminating on signal 15"},
		{"crash", ending{status: signaled(11)}, vmm.ExitFailed, "failed by signal 11 (segmentation fault): QEMU said nothing"},
		{"sandbox", ending{status: signaled(31), said: "last words"}, vmm.ExitFailed, "failed by signal 31 (bad system call): last words"},
		{"error", ending{status: exited(1), said: "out of it"}, vmm.ExitFailed, "failed with exit code 1: out of it"},
		{"unknown shutdown", ending{reason: "host-error", status: exited(0)}, vmm.ExitFailed, `failed: QEMU shut down for "host-error"`},
		{"nothing", ending{status: exited(0)}, vmm.ExitFailed, "failed: QEMU said nothing"},
	} {
		if got := c.ending.exit(); got.Reason != c.want || got.String() != c.text {
			t.Errorf("%s: %v, %q", c.name, got.Reason, got)
		}
	}
}
