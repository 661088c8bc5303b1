package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/term"
)

// run runs a command through client, gate and server.
func run(t *testing.T, req ExecRequest, stdio Stdio) (int, error) {
	t.Helper()
	if stdio.Signals == nil {
		stdio.Signals = make(chan os.Signal)
	}
	return Exec(deadline(t, 30*time.Second), gate(t, connected(t, newTestServer(), true)), req, stdio)
}

func sh(script string) ExecRequest { return ExecRequest{Argv: []string{"sh", "-c", script}} }

func TestExecExitCodes(t *testing.T) {
	for script, want := range map[string]int{"true": 0, "exit 7": 7, "exit 255": 255, "kill -TERM $$": 143, "kill -KILL $$": 137} {
		code, err := run(t, sh(script), Stdio{})
		if err != nil || code != want {
			t.Errorf("%s: %d, %v", script, code, err)
		}
	}
}

func TestExecKeepsTheOutputsApart(t *testing.T) {
	var out, errOut bytes.Buffer
	code, err := run(t, ExecRequest{Argv: []string{"sh", "-c", "cat; echo $V >&2; pwd"}, Env: map[string]string{"V": "value"}, Cwd: "/usr"},
		Stdio{In: strings.NewReader("input\n"), Out: &out, Err: &errOut})
	if err != nil || code != 0 || out.String() != "input\n/usr\n" || errOut.String() != "value\n" {
		t.Errorf("%d, %v, %q, %q", code, err, out.String(), errOut.String())
	}
}

func TestExecRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		req  ExecRequest
		want string
	}{
		"not there": {ExecRequest{Argv: []string{"/no/such/program"}}, "no such file"},
		"empty":     {ExecRequest{}, "argv is empty"},
		"directory": {ExecRequest{Argv: []string{"true"}, Cwd: "relative"}, "absolute"},
	} {
		if _, err := run(t, c.req, Stdio{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExecBeforeTheGuestIsSetUp(t *testing.T) {
	s := newTestServer()
	s.Runner = nil
	_, err := Exec(deadline(t, 10*time.Second), gate(t, connected(t, s, false)), sh("true"), Stdio{Signals: make(chan os.Signal)})
	var answer *AnswerError
	if !errors.As(err, &answer) || answer.Status != 503 {
		t.Errorf("%v", err)
	}
}

// TestExecTenMegabytes sends ten megabytes through cat and back, by pipes, and out of a terminal.
func TestExecTenMegabytes(t *testing.T) {
	data := make([]byte, 10<<20)
	seed := rand.NewChaCha8([32]byte{1})
	if _, err := seed.Read(data); err != nil {
		t.Fatal(err)
	}
	out := sha256.New()
	code, err := run(t, ExecRequest{Argv: []string{"cat"}}, Stdio{In: bytes.NewReader(data), Out: out})
	if want := sha256.Sum256(data); err != nil || code != 0 || !bytes.Equal(out.Sum(nil), want[:]) {
		t.Errorf("pipes: %d, %v, or the content differs", code, err)
	}
	var count countWriter
	code, err = run(t, ExecRequest{Argv: []string{"sh", "-c", "stty -opost; head -c 10485760 /dev/zero"}, TTY: true}, Stdio{Out: &count})
	if err != nil || code != 0 || count.n != 10<<20 {
		t.Errorf("terminal: %d, %v, %d bytes", code, err, count.n)
	}
}

type countWriter struct{ n int }

func (c *countWriter) Write(p []byte) (int, error) {
	c.n += len(p)
	return len(p), nil
}

func TestExecWithATerminal(t *testing.T) {
	var out bytes.Buffer
	code, err := run(t, ExecRequest{Argv: []string{"sh", "-c", "tty; stty size; exit 3"}, TTY: true, Rows: 33, Cols: 99}, Stdio{Out: &out})
	if err != nil || code != 3 || !strings.Contains(out.String(), "/dev/pts/") || !strings.Contains(out.String(), "33 99") {
		t.Errorf("%d, %v, %q", code, err, out.String())
	}
}

// TestExecFollowsTheWindow has a real terminal at this end, resizes it, and types ^C.
func TestExecFollowsTheWindow(t *testing.T) {
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeQuietly(master); closeQuietly(slave) })
	if err := pty.Setsize(master, &pty.Winsize{Rows: 11, Cols: 22}); err != nil {
		t.Fatal(err)
	}
	var out syncBuffer
	signals := make(chan os.Signal, 1)
	result := make(chan int, 1)
	go func() {
		code, err := run(t, sh2tty(`trap 'stty size' WINCH; trap 'echo int; exit 9' INT; stty size; echo up; while :; do sleep 0.05; done`),
			Stdio{In: slave, Out: &out, Terminal: slave, Signals: signals})
		if err != nil {
			t.Error(err)
		}
		result <- code
	}()
	eventually(t, "started", func() bool { return strings.Contains(out.String(), "11 22") && strings.Contains(out.String(), "up") })
	if err := pty.Setsize(master, &pty.Winsize{Rows: 44, Cols: 55}); err != nil {
		t.Fatal(err)
	}
	signals <- syscall.SIGWINCH
	eventually(t, "the new size", func() bool { return strings.Contains(out.String(), "44 55") })
	if _, err := master.Write([]byte{3}); err != nil {
		t.Fatal(err)
	}
	if code := <-result; code != 9 {
		t.Errorf("ended with %d: %q", code, out.String())
	}
}

func sh2tty(script string) ExecRequest {
	r := sh(script)
	r.TTY = true
	return r
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestExecSignalsArePassedOn even behind input that the command doesn't read.
func TestExecSignalsArePassedOn(t *testing.T) {
	var out syncBuffer
	signals := make(chan os.Signal, 1)
	result := make(chan int, 1)
	go func() {
		code, err := run(t, sh(`trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done`), Stdio{In: endless{}, Out: &out, Signals: signals})
		if err != nil {
			t.Error(err)
		}
		result <- code
	}()
	eventually(t, "started", func() bool { return out.String() == "up\n" })
	signals <- syscall.SIGTERM
	if code := <-result; code != 5 {
		t.Errorf("ended with %d", code)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestExecEndsAlthoughAChildHoldsThePipe leaves a process behind that keeps the output open.
func TestExecEndsAlthoughAChildHoldsThePipe(t *testing.T) {
	for _, tty := range []bool{false, true} {
		var out syncBuffer
		req := sh("sleep 60 & echo $!; echo done")
		if tty {
			req = sh("trap '' HUP; sleep 60 & echo $!; echo done")
		}
		req.TTY = tty
		begun := time.Now()
		code, err := run(t, req, Stdio{Out: &out})
		if err != nil || code != 0 || !strings.Contains(out.String(), "done") {
			t.Errorf("tty %v: %d, %v, %q", tty, code, err, out.String())
		}
		if took := time.Since(begun); took > 20*time.Second {
			t.Errorf("tty %v: took %v", tty, took)
		}
		killPID(t, out.String())
	}
}

func killPID(t *testing.T, text string) {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(strings.SplitN(text, "\n", 2)[0]))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Error(err)
	}
}

// TestExecASlowReaderLosesNothing although the command has long ended.
func TestExecASlowReaderLosesNothing(t *testing.T) {
	r, w := io.Pipe()
	result := make(chan error, 1)
	go func() {
		_, err := run(t, sh("head -c 700000 /dev/zero"), Stdio{Out: w})
		result <- errors.Join(err, w.Close())
	}()
	var count int
	buf := make([]byte, 64<<10)
	for i := 0; ; i++ {
		if i == 1 { // longer than a silent pipe is waited for
			<-time.After(2 * waitDelay)
		}
		n, err := r.Read(buf)
		count += n
		if err != nil {
			break
		}
	}
	if err := <-result; err != nil || count != 700000 {
		t.Errorf("%d bytes, %v", count, err)
	}
}

// TestExecAStalledReaderStopsOnlyItself stalls more streams than share their windows with others.
func TestExecAStalledReaderStopsOnlyItself(t *testing.T) {
	c := connected(t, newTestServer(), false)
	dial := gate(t, c)
	ctx, cancel := context.WithCancel(context.Background())
	var stalled sync.WaitGroup
	for range 8 {
		first := make(chan struct{}, 1)
		stalled.Go(func() {
			_, err := Exec(ctx, dial, sh("cat /dev/zero"), Stdio{Out: blocked{ctx, first}, Signals: make(chan os.Signal)})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("a stalled command: %v", err)
			}
		})
		<-first
	}
	for range 3 {
		var out bytes.Buffer
		code, err := Exec(deadline(t, 10*time.Second), dial, sh("head -c 1000000 /dev/zero"), Stdio{Out: &out, Signals: make(chan os.Signal)})
		if err != nil || code != 0 || out.Len() != 1000000 {
			t.Errorf("%d, %v, %d bytes", code, err, out.Len())
		}
	}
	cancel()
	stalled.Wait()
}

// blocked is a writer that takes nothing until its context ends.
type blocked struct {
	ctx   context.Context
	first chan<- struct{}
}

func (b blocked) Write([]byte) (int, error) {
	select {
	case b.first <- struct{}{}:
	default:
	}
	<-b.ctx.Done()
	return 0, b.ctx.Err()
}

// TestExecHangsUp ends the connection and looks that the command, on a terminal or not, got SIGHUP.
func TestExecHangsUp(t *testing.T) {
	for _, tty := range []bool{false, true} {
		mark := t.TempDir() + "/hup"
		var out syncBuffer
		ctx, cancel := context.WithCancel(context.Background())
		req := sh("trap 'echo yes >" + mark + "; exit 0' HUP; echo up; while :; do sleep 0.05; done")
		req.TTY = tty
		result := make(chan error, 1)
		go func() {
			_, err := Exec(ctx, gate(t, connected(t, newTestServer(), false)), req, Stdio{Out: &out, Signals: make(chan os.Signal)})
			result <- err
		}()
		eventually(t, "started", func() bool { return strings.Contains(out.String(), "up") })
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Errorf("tty %v: %v", tty, err)
		}
		eventually(t, "hung up", func() bool {
			data, err := os.ReadFile(mark)
			return err == nil && string(data) == "yes\n"
		})
	}
}

// TestExecAProgramThatIgnoresTheHangUp is killed after a while.
func TestExecAProgramThatIgnoresTheHangUp(t *testing.T) {
	for _, tty := range []bool{false, true} {
		t.Run(fmt.Sprint("tty ", tty), func(t *testing.T) {
			t.Parallel()
			var out syncBuffer
			ctx, cancel := context.WithCancel(context.Background())
			req := sh("trap '' HUP; echo $$ up; while :; do sleep 0.05; done")
			req.TTY = tty
			result := make(chan error, 1)
			go func() {
				_, err := Exec(ctx, gate(t, connected(t, newTestServer(), false)), req, Stdio{Out: &out, Signals: make(chan os.Signal)})
				result <- err
			}()
			eventually(t, "started", func() bool { return strings.Contains(out.String(), "up") })
			cancel()
			if err := <-result; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			pid, err := strconv.Atoi(strings.Fields(out.String())[0])
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "killed", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
		})
	}
}

// TestExecWithoutInputLeavesTheTerminalAlone has a terminal that nobody types on: it stays as it is, and the program has no end of
// input.
func TestExecWithoutInputLeavesTheTerminalAlone(t *testing.T) {
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeQuietly(master); closeQuietly(slave) })
	before, err := term.GetState(int(slave.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	var out syncBuffer
	signals := make(chan os.Signal, 1)
	result := make(chan int, 1)
	go func() {
		code, err := run(t, sh2tty(`trap 'exit 4' INT; echo up; cat; echo end of input; while :; do sleep 0.05; done`), Stdio{Out: &out, Terminal: slave, Signals: signals})
		if err != nil {
			t.Error(err)
		}
		result <- code
	}()
	eventually(t, "started", func() bool { return strings.Contains(out.String(), "up") })
	if now, err := term.GetState(int(slave.Fd())); err != nil || *now != *before {
		t.Errorf("the terminal's state was changed, %v", err)
	}
	signals <- syscall.SIGINT
	if code := <-result; code != 4 || strings.Contains(out.String(), "end of input") {
		t.Errorf("ended with %d: %q", code, out.String())
	}
}

func TestExecSessionsAreBounded(t *testing.T) {
	s := newTestServer()
	s.running = maxSessions
	_, err := Exec(deadline(t, 10*time.Second), gate(t, connected(t, s, false)), sh("true"), Stdio{Signals: make(chan os.Signal)})
	if err == nil || !strings.Contains(err.Error(), "no more are allowed") {
		t.Errorf("%v", err)
	}
}
