package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/term"
)

// Stdio is what a command in a guest is connected to.
type Stdio struct {
	In       io.Reader // nil: no input
	Out, Err io.Writer // nil: thrown away. With a TTY all output goes to Out
	Terminal *os.File  // with a TTY the terminal that gives the window's size and, with In, is set to raw mode; nil: none

	// Signals are passed on to the command. nil: INT, TERM, HUP, QUIT, USR1 and USR2 of this process. With a terminal in raw mode, on
	// which the keys are the command's, INT, TERM, HUP and QUIT end Exec instead: they can only come from outside.
	Signals <-chan os.Signal
}

// Exec runs a command in a guest, over a connection to its gate, and returns its exit code: 128+n when signal n ended it, 127 when it
// wasn't found, 126 when it could not be executed. When the context ends, or a signal ends Exec (then the code is 128+n), the
// connection is closed and the command gets SIGHUP, and soon after SIGKILL.
func Exec(ctx context.Context, dial func(context.Context) (net.Conn, error), req ExecRequest, stdio Stdio) (code int, err error) {
	if err := req.check(); err != nil {
		return 0, err
	}
	if req.TTY && stdio.Terminal != nil {
		if cols, rows, err := term.GetSize(int(stdio.Terminal.Fd())); err == nil && rows > 0 && cols > 0 && rows < 1<<16 && cols < 1<<16 {
			req.Rows, req.Cols = uint16(rows), uint16(cols)
		}
	}
	conn, err := openExec(ctx, dial, &req)
	if err != nil {
		return 0, err
	}
	e := &execClient{conn: conn, out: frameWriter{w: conn}, stdio: stdio, tty: req.TTY, credit: stdinCredit, ended: make(chan struct{})}
	e.change = sync.NewCond(&e.mu)
	defer func() { err = errors.Join(err, e.restore()) }()
	if err := e.prepare(); err != nil {
		return 0, errors.Join(err, conn.Close())
	}
	defer context.AfterFunc(ctx, func() { closeQuietly(conn) })()
	stop := e.passSignals()
	go e.sendInput()
	code, err = e.receive()
	close(e.ended)
	stop()
	e.end()
	closeQuietly(conn)
	if sig := e.endedBy(); sig != 0 {
		return 128 + int(sig), nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return 0, fmt.Errorf("lost the command: %w", err)
	}
	return code, nil
}

// openExec sends the request and returns the upgraded connection.
func openExec(ctx context.Context, dial func(context.Context) (net.Conn, error), req *ExecRequest) (io.ReadWriteCloser, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		DisableKeepAlives:      true,
		DisableCompression:     true,
		ResponseHeaderTimeout:  answerTime,
		MaxResponseHeaderBytes: maxHeader,
	}
	// The upgraded connection outlives the request's context, which therefore only covers the way to it.
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, host+pathExec, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	hr.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {execUpgrade}, "Content-Type": {"application/json"}}
	resp, err := transport.RoundTrip(hr)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the guest: %w", err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, errors.Join(answerError(resp), resp.Body.Close())
	}
	conn, ok := resp.Body.(io.ReadWriteCloser)
	if !ok || resp.Header.Get("Upgrade") != execUpgrade {
		return nil, errors.Join(errors.New("cannot run the command: the guest's agent answered with another protocol"), resp.Body.Close())
	}
	return conn, nil
}

// execClient is the command line's end of an exec connection.
type execClient struct {
	conn  io.ReadWriteCloser
	out   frameWriter
	stdio Stdio
	tty   bool
	ended chan struct{}

	mu      sync.Mutex
	change  *sync.Cond
	credit  int            // bytes of input that may be sent; -1: no more at all
	saved   *term.State    // how the terminal was; nil: it is so
	endedAs syscall.Signal // what ended Exec, 0: nothing
}

func (e *execClient) prepare() (err error) {
	// Without input nobody would read the keys, and ^C must go on to end this program.
	if e.tty && e.stdio.In != nil && e.stdio.Terminal != nil && term.IsTerminal(int(e.stdio.Terminal.Fd())) {
		if e.saved, err = term.MakeRaw(int(e.stdio.Terminal.Fd())); err != nil {
			return fmt.Errorf("cannot prepare the terminal: %w", err)
		}
	}
	return nil
}

func (e *execClient) restore() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.saved == nil {
		return nil
	}
	saved := e.saved
	e.saved = nil
	if err := term.Restore(int(e.stdio.Terminal.Fd()), saved); err != nil {
		return fmt.Errorf("cannot restore the terminal, `reset` does: %w", err)
	}
	return nil
}

// resume sets the terminal to raw mode again, which a shell that stopped this program has taken from it.
func (e *execClient) resume() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.saved == nil {
		return
	}
	if _, err := term.MakeRaw(int(e.stdio.Terminal.Fd())); err != nil {
		return // it is gone, which reading from it reports
	}
}

// quit ends Exec because of a signal.
func (e *execClient) quit(sig syscall.Signal) {
	e.mu.Lock()
	e.endedAs = sig
	e.mu.Unlock()
	closeQuietly(e.conn)
}

func (e *execClient) endedBy() syscall.Signal {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.endedAs
}

// passSignals passes on signals, and changes of the window's size, until the returned function is called.
func (e *execClient) passSignals() (stop func()) {
	own := make(chan os.Signal, 16)
	signals := e.stdio.Signals
	onTerminal := e.tty && e.stdio.Terminal != nil
	if onTerminal {
		signal.Notify(own, syscall.SIGWINCH, syscall.SIGCONT)
	}
	if signals == nil {
		signal.Notify(own, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	}
	go func() {
		for {
			select {
			case <-e.ended:
				return
			case s := <-own:
				e.ownSignal(s, onTerminal && e.stdio.In != nil)
			case s := <-signals:
				e.passSignal(s)
			}
		}
	}()
	return func() { signal.Stop(own) }
}

// ownSignal does what a signal to this process asks for; raw: the keys are the command's.
func (e *execClient) ownSignal(s os.Signal, raw bool) {
	switch s {
	case syscall.SIGCONT:
		e.resume()
		e.passSignal(syscall.SIGWINCH)
		return
	case syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT:
		if raw {
			e.quit(s.(syscall.Signal))
			return
		}
	}
	e.passSignal(s)
}

func (e *execClient) passSignal(s os.Signal) {
	sig, ok := s.(syscall.Signal)
	if !ok {
		return
	}
	var err error
	if sig == syscall.SIGWINCH && e.stdio.Terminal != nil {
		var cols, rows int
		if cols, rows, err = term.GetSize(int(e.stdio.Terminal.Fd())); err == nil {
			err = e.out.write(frameResize, binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, uint16(rows)), uint16(cols)))
		}
	} else {
		err = e.out.write(frameSignal, []byte{byte(sig)})
	}
	if err != nil {
		return // the connection has ended, which receive reports
	}
}

// sendInput sends what can be read, as far as there is credit for it.
func (e *execClient) sendInput() {
	if e.stdio.In != nil {
		buf := make([]byte, maxFrame)
		for {
			n, err := e.stdio.In.Read(buf)
			for rest := buf[:n]; len(rest) > 0; {
				m := e.take(len(rest))
				if m == 0 || e.out.write(frameStdin, rest[:m]) != nil {
					return
				}
				rest = rest[m:]
			}
			if err != nil {
				break
			}
		}
	}
	if e.stdio.In == nil && e.tty {
		return // a terminal that nobody types on has no end
	}
	if e.out.write(frameEOF, nil) != nil {
		return
	}
}

// take waits for credit and takes up to n bytes of it; 0 means that the command has ended.
func (e *execClient) take(n int) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.credit == 0 {
		e.change.Wait()
	}
	if e.credit < 0 {
		return 0
	}
	n = min(n, e.credit)
	e.credit -= n
	return n
}

func (e *execClient) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.credit = -1
	e.change.Signal()
}

// receive passes on the command's output until it has ended.
func (e *execClient) receive() (code int, err error) {
	buf := make([]byte, maxFrame)
	for {
		f, err := readFrame(e.conn, buf)
		if err == io.EOF {
			err = errors.New("the connection to the guest has ended")
		}
		if err != nil {
			return 0, err
		}
		var w io.Writer
		switch f.kind {
		case frameStdout:
			w = e.stdio.Out
		case frameStderr:
			w = e.stdio.Err
		case frameCredit:
			if err := e.give(binary.BigEndian.Uint32(f.payload)); err != nil {
				return 0, err
			}
		case frameExit:
			return int(f.payload[0]), nil
		default:
			return 0, fmt.Errorf("the guest's agent broke the protocol: a frame of kind %d", f.kind)
		}
		if w != nil && len(f.payload) > 0 {
			if _, err := w.Write(f.payload); err != nil {
				return 0, fmt.Errorf("cannot write the command's output: %w", err)
			}
		}
	}
}

func (e *execClient) give(n uint32) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if n > stdinCredit || e.credit+int(n) > stdinCredit {
		return errors.New("the guest's agent broke the protocol: too much credit")
	}
	e.credit += int(n)
	e.change.Signal()
	return nil
}
