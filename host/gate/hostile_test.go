package gate

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

// What a gate may take whatever its guest does. Measured: 3.5 MiB at rest, 10 at most.
const (
	gateMemory = 20 << 20                           // bytes of RssAnon
	logDisk    = (logSize << 20) * (1 + logBackups) // of one log, once the writer of the log (lumberjack) has removed the oldest
	logMost    = 4 * logDisk                        // and at any moment: it removes them beside writing on
	aWhile     = 60 * time.Second                   // for what takes a second
	floodSize  = 256 << 20                          // bytes of a flood by the agent's channel
	consoleMax = 128 << 20                          // bytes of a flood by the console; 1 GiB took 55 s and made no larger log
)

// testGate is a gate in a process of its own, and the test is its supervisor, its
// VMM and its guest.
type testGate struct {
	pid        int
	supervisor *Conn
	guest      net.Conn // the other end of the agent's channel
	console    *os.File
	exec       string // the socket for the command line
	logs       string

	stop  chan struct{}
	most  atomic.Int64 // bytes of RssAnon
	ended chan error
}

// program builds clawvm as it is shipped, once: the test's own program may be
// linked with the C library, or with the race detector, whose threads need system
// calls that a gate is refused.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "gate")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+"/clawvm", "github.com/clawvm/clawvm/cmd/clawvm")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("cannot build clawvm: %w\n%s", err, out), os.RemoveAll(dir))
	}
	builtProgram = dir + "/clawvm"
	return builtProgram, nil
})

var builtProgram string // what TestMain removes

func startTestGate(t *testing.T) *testGate {
	t.Helper()
	binary, err := program()
	if err != nil {
		t.Fatal(err)
	}
	g := &testGate{logs: t.TempDir(), stop: make(chan struct{}), ended: make(chan error, 1)}
	var control *os.File
	if g.supervisor, control, err = Pair(); err != nil {
		t.Fatal(err)
	}
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	port, ours := os.NewFile(uintptr(fds[0]), "port"), os.NewFile(uintptr(fds[1]), "guest")
	if g.guest, err = net.FileConn(ours); err != nil {
		t.Fatal(err)
	}
	// A gate that doesn't take what it should fails the test instead of stopping it.
	if err := g.guest.SetDeadline(time.Now().Add(2 * aWhile)); err != nil {
		t.Fatal(err)
	}
	consoleEnd, console, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	g.console = console
	// Not below the test's own directory, whose name may be longer than a socket's.
	dir, err := os.MkdirTemp("", "gate")
	if err != nil {
		t.Fatal(err)
	}
	g.exec = filepath.Join(dir, "exec")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: g.exec, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(Config{VM: "hostile", Logs: g.logs, Files: []string{FileAgent, FileConsole, FileExec}})
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "config")
	if err := os.WriteFile(config, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	configFile, err := os.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "gate")
	cmd.Env = append(os.Environ(), "GODEBUG=disablethp=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{control, configFile, port, consoleEnd, listener}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g.pid = cmd.Process.Pid
	for _, f := range append(cmd.ExtraFiles, ours) {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	go func() { g.ended <- cmd.Wait() }()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-g.stop:
				return
			case <-tick.C:
				g.most.Store(max(g.most.Load(), rssAnon(g.pid)))
			}
		}
	}()
	t.Cleanup(func() {
		close(g.stop)
		<-watched
		// The VMM ends before its gate.
		g.guest.Close() // the test may have closed it
		if err := g.console.Close(); err != nil {
			t.Error(err)
		}
		// A supervisor listens until it hangs up; a gate that can't tell it of its
		// guest's end would end by that.
		go func() {
			for {
				if _, err := g.supervisor.Receive(); err != nil {
					return
				}
			}
		}()
		if err := g.supervisor.conn.CloseWrite(); err != nil {
			t.Error(err)
		}
		select {
		case err := <-g.ended:
			if err != nil {
				t.Errorf("the gate ended with %v", err)
			}
		case <-time.After(aWhile):
			t.Error("the gate does not end with its supervisor")
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			<-g.ended
		}
		if err := g.supervisor.Close(); err != nil {
			t.Error(err)
		}
		if err := errors.Join(l.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
		if most := g.most.Load(); most > gateMemory {
			t.Errorf("the gate took %d MiB, at most %d are allowed", most>>20, gateMemory>>20)
		}
		t.Logf("the gate took at most %.1f MiB", float64(g.most.Load())/(1<<20))
	})
	return g
}

// rssAnon is a process's own memory in bytes.
func rssAnon(pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "RssAnon:" {
			if n, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				return n << 10
			}
		}
	}
	return 0
}

// hear waits for a message of a kind, and returns the messages until then.
func (g *testGate) hear(t *testing.T, want Kind) (m Message, before int) {
	t.Helper()
	type heard struct {
		m   Message
		err error
	}
	limit := time.NewTimer(aWhile)
	defer limit.Stop()
	for {
		next := make(chan heard, 1)
		go func() {
			m, err := g.supervisor.Receive()
			next <- heard{m, err}
		}()
		select {
		case h := <-next:
			if h.err != nil {
				t.Fatalf("the gate's connection: %v", h.err)
			}
			if h.m.Kind == want {
				return h.m, before
			}
			before++
		case <-limit.C:
			t.Fatalf("the gate never says %q", want)
		}
	}
}

// disk is how many bytes the logs take now.
func (g *testGate) disk(t *testing.T, log string) (size int64) {
	t.Helper()
	files, err := os.ReadDir(g.logs)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err == nil && strings.HasPrefix(f.Name(), log) {
			size += info.Size()
		}
	}
	return size
}

// settle waits until a log has its size.
func (g *testGate) settle(t *testing.T, log string) {
	t.Helper()
	deadline := time.Now().Add(aWhile)
	for tick := time.NewTicker(20 * time.Millisecond); g.disk(t, log) > logDisk; <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("the log takes %d MiB, and should take %d", g.disk(t, log)>>20, logDisk>>20)
		}
	}
}

// lie answers as a guest's agent does, but for some paths.
func (g *testGate) lie(t *testing.T, paths map[string]http.HandlerFunc) *yamux.Session {
	t.Helper()
	greet(t, g.guest)
	c := yamux.DefaultConfig()
	c.EnableKeepAlive, c.LogOutput = false, io.Discard
	session, err := yamux.Server(g.guest, c)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch h := paths[r.URL.Path]; {
		case h != nil:
			h(w, r)
		case r.URL.Path == "/v1/hello":
			fmt.Fprint(w, `{"protocol":1,"version":"v","name":"hostile"}`)
		case r.URL.Path == "/v1/clock":
			w.WriteHeader(http.StatusNoContent)
		default: // events and log: open, and silent
			if http.NewResponseController(w).Flush() == nil {
				<-r.Context().Done()
			}
		}
	})}
	served := make(chan struct{})
	go func() { defer close(served); srv.Serve(session) }()
	t.Cleanup(func() { srv.Close(); session.Close(); <-served })
	return session
}

// greet does the guest's half of the handshake (guest/agent/resync.go).
func greet(t *testing.T, c net.Conn) {
	t.Helper()
	magic := []byte("\xfeclawvm\x01")
	var seen []byte
	answered := false
	// Byte by byte, so that nothing of the multiplexer's is read.
	for one := make([]byte, 1); ; {
		if _, err := c.Read(one); err != nil {
			t.Fatal(err)
		}
		seen = append(seen, one[0])
		at := bytes.LastIndex(seen, magic)
		if at < 0 || len(seen) < at+len(magic)+17 {
			continue
		}
		message := seen[at : at+len(magic)+17]
		switch {
		case message[len(magic)] == 'G':
			return
		case !answered:
			answered = true
			ack := bytes.Clone(message)
			ack[len(magic)] = 'A'
			if _, err := c.Write(ack); err != nil {
				t.Fatal(err)
			}
		}
		seen = seen[:0]
	}
}

func frame(kind byte, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(payload))), payload...)
}

// TestHostileAgent gives a gate agents that lie, each in its own way. The gate
// lives, its memory stays bounded, and it tells its supervisor.
func TestHostileAgent(t *testing.T) {
	if testing.Short() {
		t.Skip("moves gigabytes")
	}
	t.Run("noise without an end", func(t *testing.T) {
		g := startTestGate(t)
		go io.Copy(io.Discard, g.guest)
		noise := bytes.Repeat([]byte("no handshake in this "), 1<<10)
		for sent := 0; sent < floodSize; sent += len(noise) {
			if _, err := g.guest.Write(noise); err != nil {
				break // it was given up, as it should be
			}
		}
		if m, _ := g.hear(t, Lost); !strings.Contains(m.Detail, "no handshake") {
			t.Errorf("lost for %q", m.Detail)
		}
	})
	t.Run("closes early", func(t *testing.T) {
		g := startTestGate(t)
		if err := g.guest.Close(); err != nil {
			t.Fatal(err)
		}
		g.hear(t, Lost)
	})
	t.Run("closes after its hello", func(t *testing.T) {
		g := startTestGate(t)
		session := g.lie(t, nil)
		g.hear(t, Connected)
		if err := session.Close(); err != nil {
			t.Fatal(err)
		}
		g.hear(t, Lost)
	})
	for name, header := range map[string][]byte{
		"huge length":          {0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff},
		"a stream of its own":  {0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0},
		"a stream that is not": {0, 0, 0, 0, 0, 0, 3, 0xe7, 0, 0, 0, 0},
		"a ping":               {0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7},
	} {
		t.Run(name, func(t *testing.T) {
			g := startTestGate(t)
			greet(t, g.guest)
			go io.Copy(io.Discard, g.guest)
			for range 1 << 20 {
				if _, err := g.guest.Write(header); err != nil {
					break
				}
			}
			g.guest.Close() // a stream that is not is no breach: data for a stream that was closed may be under way
			g.hear(t, Lost)
		})
	}
	t.Run("thousands of streams", func(t *testing.T) {
		g := startTestGate(t)
		greet(t, g.guest)
		go io.Copy(io.Discard, g.guest)
		for id := uint32(2); id < 20000; id += 2 {
			h := binary.BigEndian.AppendUint32([]byte{0, 1, 0, 1}, id)
			if _, err := g.guest.Write(append(h, 0, 0, 0, 0)); err != nil {
				break
			}
		}
		g.hear(t, Lost)
	})
	t.Run("ready twice", func(t *testing.T) {
		g := startTestGate(t)
		g.lie(t, map[string]http.HandlerFunc{"/v1/events": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, strings.Repeat(`{"kind":"ready"}`+"\n", 2)+`{"kind":"sing"}`+"\n")
		}})
		g.hear(t, Ready)
		g.hear(t, Ready)
		if m, _ := g.hear(t, Lost); !strings.Contains(m.Detail, "unknown event") {
			t.Errorf("lost for %q", m.Detail)
		}
	})
	t.Run("a flood of events", func(t *testing.T) {
		const number = 100_000
		g := startTestGate(t)
		g.lie(t, map[string]http.HandlerFunc{"/v1/events": func(w http.ResponseWriter, r *http.Request) {
			line := `{"kind":"not-ready","detail":"` + strings.Repeat("x", 1000) + `"}` + "\n"
			for range number {
				if _, err := io.WriteString(w, line); err != nil {
					return
				}
			}
			fmt.Fprint(w, `{"kind":"ready"}`+"\n")
		}})
		if _, before := g.hear(t, Ready); before != number+1 {
			t.Errorf("%d messages arrived before the last one, not %d", before, number+1)
		}
	})
	t.Run("a flood of log", func(t *testing.T) {
		g := startTestGate(t)
		done := make(chan struct{})
		var most int64
		g.lie(t, map[string]http.HandlerFunc{"/v1/log": func(w http.ResponseWriter, r *http.Request) {
			defer close(done)
			line := frame(2, bytes.Repeat([]byte("flood\x1b[2J\n"), 3000))
			for sent := 0; sent < floodSize; sent += len(line) {
				if _, err := w.Write(line); err != nil {
					t.Errorf("after %d bytes: %v", sent, err)
					return
				}
				most = max(most, g.disk(t, "workload"))
			}
		}})
		<-done
		if most > logMost || most < logSize<<20 {
			t.Errorf("the log took %d MiB, want at most %d", most>>20, logMost>>20)
		}
		g.settle(t, "workload")
		t.Logf("%d MiB became a log of at most %d MiB", floodSize>>20, most>>20)
	})
	t.Run("an exec that never ends its output", func(t *testing.T) {
		g := startTestGate(t)
		var sent atomic.Int64
		g.lie(t, map[string]http.HandlerFunc{"/v1/exec": func(w http.ResponseWriter, r *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: clawvm-exec/1\r\n\r\n")
			for out := frame(2, make([]byte, 32<<10)); ; {
				n, err := conn.Write(out)
				if sent.Add(int64(n)); err != nil {
					return
				}
			}
		}})
		g.hear(t, Connected)
		// Eight command lines that don't read, and one that does.
		var slow sync.WaitGroup
		for range 8 {
			c := g.askExec(t)
			slow.Go(func() { <-g.stop; c.Close() })
		}
		c := g.askExec(t)
		defer c.Close()
		if n, err := io.CopyN(io.Discard, c, floodSize); err != nil {
			t.Errorf("%d bytes of output arrived: %v", n, err)
		}
	})
	t.Run("never reads", func(t *testing.T) {
		g := startTestGate(t)
		g.lie(t, map[string]http.HandlerFunc{"/v1/exec": func(w http.ResponseWriter, r *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: clawvm-exec/1\r\n\r\n")
			<-g.stop
			conn.Close()
		}})
		g.hear(t, Connected)
		// A command line that sends without a thought gets stuck; the gate holds what a
		// window of the multiplexer holds, and the others go on.
		c := g.askExec(t)
		defer c.Close()
		if err := c.SetWriteDeadline(time.Now().Add(2 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, err := io.CopyN(c, zeros{}, floodSize)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%d bytes went to a guest that reads none: %v", n, err)
		}
		t.Logf("%d KiB were taken", n>>10)
		other := g.askExec(t)
		other.Close()
	})
	t.Run("a flood of the console", func(t *testing.T) {
		g := startTestGate(t)
		line := bytes.Repeat([]byte("console \x1b]0;owned\x07\x1b[2J\x9b31m\r\n"), 2000)
		began := time.Now()
		var most int64
		for sent := 0; sent < consoleMax; sent += len(line) {
			if _, err := g.console.Write(line); err != nil {
				t.Fatalf("after %d bytes: %v", sent, err)
			}
			if sent%(1<<20) < len(line) {
				most = max(most, g.disk(t, "console"))
			}
		}
		if most > logMost || most < logSize<<20 {
			t.Errorf("the log took %d MiB, want at most %d", most>>20, logMost>>20)
		}
		g.settle(t, "console")
		t.Logf("%d MiB in %s became a log of at most %d MiB", consoleMax>>20, time.Since(began).Round(time.Millisecond), most>>20)
	})
	t.Run("a console whose log can't be written", func(t *testing.T) {
		g := startTestGate(t)
		g.lie(t, nil)
		g.hear(t, Connected)
		if err := os.RemoveAll(g.logs); err != nil {
			t.Fatal(err)
		}
		if err := g.console.SetWriteDeadline(time.Now().Add(aWhile)); err != nil && !errors.Is(err, os.ErrNoDeadline) {
			t.Fatal(err)
		}
		if n, err := io.CopyN(g.console, zeros{}, 64<<20); err != nil {
			t.Errorf("the guest would stop after %d bytes: %v", n, err)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// askExec is a command line whose request was accepted.
func (g *testGate) askExec(t *testing.T) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", g.exec)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(aWhile)); err != nil {
		t.Fatal(err)
	}
	const body = `{"argv":["x"]}`
	if _, err := fmt.Fprintf(c, "POST /v1/exec HTTP/1.1\r\nHost: guest\r\nConnection: Upgrade\r\nUpgrade: clawvm-exec/1\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(c, 16), nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("exec: %+v, %v", resp, err)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	return c
}
