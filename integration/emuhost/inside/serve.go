package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost/wire"
	"github.com/xtaci/smux"
)

// pipeDelay is how long a command's output is waited for after its end: something that it left in the
// background may hold the pipe.
const pipeDelay = 2 * time.Second

// serve runs what comes over the port until the port breaks, which is the emulated machine's end.
func serve() error {
	port, err := openPort()
	if err != nil {
		return err
	}
	if _, err := io.WriteString(port, wire.Hello); err != nil {
		return fmt.Errorf("cannot say hello: %w", err)
	}
	session, err := smux.Server(port, wire.Config())
	if err != nil {
		return err
	}
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			return fmt.Errorf("the port broke: %w", err)
		}
		go func() {
			if err := command(stream); err != nil {
				fmt.Fprintf(os.Stderr, "emuhost: %v\n", err)
			}
		}()
	}
}

// openPort finds the port by its name; udev's links may not be there yet.
func openPort() (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(b)) == wire.PortName {
			return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(name)), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("no virtio-serial port is named %s", wire.PortName)
}

// command runs one command. When the other side closes the stream early, its process group is killed.
func command(stream *smux.Stream) (err error) {
	defer func() {
		if cerr := stream.Close(); err == nil && !errors.Is(cerr, io.ErrClosedPipe) {
			err = cerr
		}
	}()
	kind, payload, err := wire.Read(stream)
	if err != nil {
		return err
	}
	var request wire.Request
	if err := json.Unmarshal(payload, &request); kind != wire.Start || err != nil || len(request.Argv) == 0 {
		return fmt.Errorf("a stream began with a frame of kind %d: %w", kind, err)
	}
	var turn sync.Mutex
	send := func(kind wire.Kind, b []byte) error {
		turn.Lock()
		defer turn.Unlock()
		return wire.Write(stream, kind, b)
	}
	exit := execute(stream, &request, send)
	b, err := json.Marshal(exit)
	if err != nil {
		return err
	}
	return send(wire.Exited, b)
}

// writer sends what is written to it as frames.
type writer struct {
	kind wire.Kind
	send func(wire.Kind, []byte) error
}

func (w writer) Write(p []byte) (int, error) {
	for sent := 0; sent < len(p); {
		n := min(len(p)-sent, 32<<10)
		if err := w.send(w.kind, p[sent:sent+n]); err != nil {
			return sent, err
		}
		sent += n
	}
	return len(p), nil
}

func execute(stream io.Reader, r *wire.Request, send func(wire.Kind, []byte) error) wire.Exit {
	cmd := exec.Command(r.Argv[0], r.Argv[1:]...)
	cmd.Dir = r.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/root"
	}
	cmd.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}, r.Env...)
	cmd.Stdout = writer{wire.Stdout, send}
	cmd.Stderr = writer{wire.Stderr, send}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = pipeDelay
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return wire.Exit{Code: 127, Error: err.Error()}
	}
	if err := cmd.Start(); err != nil {
		return wire.Exit{Code: 127, Error: err.Error()}
	}
	ended := make(chan struct{})
	go feed(stream, stdin, cmd.Process.Pid, ended)
	err = cmd.Wait()
	close(ended)
	var exit *exec.ExitError
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		return wire.Exit{Code: cmd.ProcessState.ExitCode()}
	case errors.As(err, &exit):
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return wire.Exit{Code: 128 + int(status.Signal())}
		}
		return wire.Exit{Code: exit.ExitCode()}
	}
	return wire.Exit{Code: 127, Error: err.Error()}
}

// feed hands the stream's input to the command. The stream's end before the command's means that nobody
// waits for it any more.
func feed(stream io.Reader, stdin io.WriteCloser, pid int, ended <-chan struct{}) {
	open := true
	for {
		kind, payload, err := wire.Read(stream)
		if err != nil {
			select {
			case <-ended:
			default:
				if err := syscall.Kill(-pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
					fmt.Fprintf(os.Stderr, "emuhost: cannot kill %d: %v\n", pid, err)
				}
			}
			return
		}
		if kind != wire.Stdin || !open {
			continue
		}
		if len(payload) > 0 {
			// A command that reads no further is no error; what it did not want is dropped.
			if _, err = stdin.Write(payload); err == nil {
				continue
			}
		}
		open = false
		if err := stdin.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			fmt.Fprintf(os.Stderr, "emuhost: cannot close the input of %d: %v\n", pid, err)
		}
	}
}
