package agent

import (
	"context"
	"errors"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"
)

// plainRunner runs programs as this process would: no sandbox.
type plainRunner struct{}

func (plainRunner) Command(r ExecRequest) (*Command, error) {
	cmd := exec.Command(r.Argv[0], r.Argv[1:]...)
	if cmd.Err != nil {
		return nil, cmd.Err
	}
	cmd.Dir, cmd.Env = r.Cwd, os.Environ()
	for k, v := range r.Env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return &Command{Cmd: cmd, UID: os.Getuid(), GID: os.Getgid()}, nil
}
func (plainRunner) Start(cmd *exec.Cmd) error { return cmd.Start() }
func (plainRunner) Wait(cmd *exec.Cmd) error  { return cmd.Wait() }

// pair returns the two ends of a socketpair, as QEMU's port and a vsock are: buffered, and closed by either end.
func pair(t *testing.T) (host, guest net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conn, err := net.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		ends[i] = conn
		t.Cleanup(func() { closeQuietly(conn) })
	}
	return ends[0], ends[1]
}

// testServer is a guest's end without a guest.
type testServer struct {
	Server
	mu    sync.Mutex
	clock time.Time
	grace []time.Duration
}

func newTestServer() *testServer {
	s := &testServer{}
	s.Server = Server{
		Hello: Hello{Version: "v1", Name: "demo", Boot: "b", Kernel: "6.1"}, Board: NewBoard(), Log: NewLog(), Runner: plainRunner{},
		Clock: func(at time.Time) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.clock = at
			return nil
		},
		Shutdown: func(g time.Duration) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.grace = append(s.grace, g)
		},
	}
	return s
}

// serve serves conn until the test ends.
func (s *testServer) serve(t *testing.T, conn net.Conn, resync bool) {
	t.Helper()
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(done)
		err := s.ServeConn(ctx, conn, resync)
		if err == nil {
			t.Error("ServeConn ended without saying why")
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
}

// connected returns a client of the server.
func connected(t *testing.T, s *testServer, resync bool) *Client {
	t.Helper()
	host, guest := pair(t)
	s.serve(t, guest, resync)
	c, err := Connect(deadline(t, 10*time.Second), host, resync)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeQuietly(c) })
	return c
}

func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// gate returns a dial function to a gate that proxies for the client.
func gate(t *testing.T, c *Client) func(context.Context) (net.Conn, error) {
	t.Helper()
	srv := httptest.NewServer(c.Proxy())
	t.Cleanup(srv.Close)
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", srv.Listener.Addr().String())
	}
}

// eventually polls until f is true.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(10 * time.Second); !f(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}
