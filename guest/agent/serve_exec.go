package agent

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// maxSessions bounds the programs that run for hosts at the same time; a host has not more streams.
const maxSessions = maxStreams

// waitDelay is how long, after a program's end, its output may be silent until it counts as complete: a process that it left
// behind may hold the pipe open for ever.
const waitDelay = 500 * time.Millisecond

// maxRest bounds what is still read after a program's end, in bytes: more than this a pipe doesn't hold, so it comes from a
// process left behind.
const maxRest = 1 << 20

func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != execUpgrade {
		http.Error(w, "cannot run the command: the request isn't an upgrade to "+execUpgrade, http.StatusUpgradeRequired)
		return
	}
	var req ExecRequest
	if !decode(w, r, maxRequest, &req) {
		return
	}
	if err := req.check(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	runner := s.runner()
	if runner == nil {
		http.Error(w, "cannot run the command: the guest is still being set up", http.StatusServiceUnavailable)
		return
	}
	if !s.enter() {
		http.Error(w, fmt.Sprintf("cannot run the command: %d are running, and no more are allowed", maxSessions), http.StatusServiceUnavailable)
		return
	}
	defer s.leave()
	cmd, err := runner.Command(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	e := &session{cmd: cmd, runner: runner}
	if err := e.start(req); err != nil {
		http.Error(w, "cannot run the command: "+err.Error(), http.StatusInternalServerError)
		return
	}
	conn, rw, err := upgrade(w)
	if err != nil {
		e.abandon()
		return
	}
	e.serve(conn, rw.Reader)
}

func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running >= maxSessions {
		return false
	}
	s.running++
	return true
}

func (s *Server) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running--
}

func upgrade(w http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+execUpgrade+"\r\n\r\n"); err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return conn, rw, nil
}

// session is one program and the connection that it runs for.
type session struct {
	cmd    *Command
	runner Runner

	terminal *os.File // the master, with a TTY
	stdin    *os.File // where input goes: the terminal or a pipe
	outputs  []*output

	mu    sync.Mutex
	ended bool // the program was waited for
}

func (e *session) start(req ExecRequest) (err error) {
	childEnds := e.cmd.Files
	defer func() {
		for _, f := range childEnds {
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			e.closeFiles()
		}
	}()
	attr := &syscall.SysProcAttr{}
	if e.cmd.SysProcAttr != nil {
		attr = e.cmd.SysProcAttr
	}
	attr.Setsid = true
	e.cmd.SysProcAttr = attr
	if req.TTY {
		master, slave, err := openTerminal()
		if err != nil {
			return err
		}
		childEnds = append(childEnds, slave)
		e.terminal, e.stdin = master, master
		e.outputs = []*output{{kind: frameStdout, file: master}}
		if err := slave.Chown(e.cmd.UID, e.cmd.GID); err != nil {
			return fmt.Errorf("cannot give the terminal to its user: %w", err)
		}
		if req.Rows > 0 && req.Cols > 0 {
			if err := setSize(master, req.Rows, req.Cols); err != nil {
				return err
			}
		}
		attr.Setctty, attr.Ctty = true, 0
		e.cmd.Stdin, e.cmd.Stdout, e.cmd.Stderr = slave, slave, slave
		return e.runner.Start(e.cmd.Cmd)
	}
	inR, inW, err := os.Pipe()
	if err != nil {
		return err
	}
	childEnds = append(childEnds, inR)
	e.stdin = inW
	for _, kind := range []frameKind{frameStdout, frameStderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		childEnds = append(childEnds, w)
		e.outputs = append(e.outputs, &output{kind: kind, file: r})
		if kind == frameStdout {
			e.cmd.Stdout = w
		} else {
			e.cmd.Stderr = w
		}
	}
	e.cmd.Stdin = inR
	return e.runner.Start(e.cmd.Cmd)
}

// closeFiles closes the host's ends of the program's streams; closing one twice does no harm.
func (e *session) closeFiles() {
	if e.stdin != nil {
		closeQuietly(e.stdin)
	}
	for _, o := range e.outputs {
		closeQuietly(o.file)
	}
}

// serve runs the conversation until the program has ended and all of its output is sent, or the connection has gone.
func (e *session) serve(conn net.Conn, r io.Reader) {
	out := &frameWriter{w: conn}
	in := newInput()
	var sending, rest sync.WaitGroup
	for _, o := range e.outputs {
		sending.Go(func() { o.send(out) })
	}
	rest.Go(func() { e.feed(in, out) })
	rest.Go(func() {
		e.receive(r, in)
		in.close()
		e.hangUp()
	})
	code := exitCode(e.runner.Wait(e.cmd.Cmd))
	e.mu.Lock()
	e.ended = true
	e.mu.Unlock()
	for _, o := range e.outputs {
		o.end()
	}
	sending.Wait()
	// The other end closes when it has the exit code; one that doesn't is cut off.
	if out.write(frameExit, []byte{byte(code)}) != nil || conn.SetReadDeadline(time.Now().Add(waitDelay)) != nil {
		closeQuietly(conn)
	}
	in.close()
	e.closeFiles() // wakes a feed that is stuck in a pipe which a process left behind holds
	rest.Wait()
	closeQuietly(conn)
}

// exitCode is the exit code as a shell says it.
func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return exit.ExitCode()
	}
	return 255
}

// receive reads the other end's frames until it closes or breaks the protocol.
func (e *session) receive(r io.Reader, in *input) {
	buf := make([]byte, maxFrame)
	for {
		f, err := readFrame(r, buf)
		if err != nil {
			return
		}
		switch f.kind {
		case frameStdin:
			if !in.put(f.payload) {
				return
			}
		case frameEOF:
			in.finish()
		case frameResize:
			if e.terminal == nil {
				continue
			}
			if setSize(e.terminal, binary.BigEndian.Uint16(f.payload), binary.BigEndian.Uint16(f.payload[2:])) != nil {
				return
			}
		case frameSignal:
			e.signal(syscall.Signal(f.payload[0]))
		default:
			return
		}
	}
}

// feed gives the program its input, and the sender credit for what was taken.
func (e *session) feed(in *input, out *frameWriter) {
	broken := false
	for {
		data, err := in.take()
		if err == io.EOF {
			e.endInput()
		}
		if err != nil {
			return
		}
		if !broken {
			// A program that closed its input, or has ended, doesn't want the rest: it is thrown away.
			_, err := e.stdin.Write(data)
			broken = err != nil
		}
		in.taken(len(data))
		if out.write(frameCredit, binary.BigEndian.AppendUint32(nil, uint32(len(data)))) != nil {
			return
		}
	}
}

// endInput closes the program's input: a pipe for good; a terminal is sent its end-of-file character.
func (e *session) endInput() {
	if e.terminal != nil {
		if _, err := e.terminal.Write([]byte{4}); err != nil {
			return
		}
		return
	}
	closeQuietly(e.stdin)
}

// signal signals the program and what it started in its process group.
func (e *session) signal(sig syscall.Signal) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended || sig < 1 || sig > 64 {
		return
	}
	if err := syscall.Kill(-e.cmd.Process.Pid, sig); err != nil {
		return // it has just ended
	}
}

// hangUpGrace is how long a program whose host has gone may take to end.
const hangUpGrace = 5 * time.Second

// hangUp is what closing a terminal's window does. A program that doesn't mind is killed: nobody could reach it any more. What it
// started in process groups of its own (nohup in a shell, a daemon) goes on.
func (e *session) hangUp() {
	e.signal(syscall.SIGHUP)
	if e.terminal != nil {
		closeQuietly(e.terminal)
	}
	time.AfterFunc(hangUpGrace, func() { e.signal(syscall.SIGKILL) })
}

// abandon waits for a program that lost its connection before it was served.
func (e *session) abandon() {
	e.hangUp()
	e.closeFiles()
	if err := e.runner.Wait(e.cmd.Cmd); err != nil {
		return // nobody is there to be told
	}
}
