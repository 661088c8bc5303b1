package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// answerTime is how long a guest may take to answer: under an instruction clock it runs dozens of times slower than the host.
const answerTime = 2 * time.Minute

// Client is the host's end. Its methods can be used at the same time.
type Client struct {
	session *yamux.Session
	http    *http.Client
	hello   Hello
	done    chan struct{}
	err     error
}

// Connect makes a Client of the byte stream that a guest opened. With resync, for a virtio-serial port, it first finds the guest's
// agent on it, which may not have started yet, for as long as the context allows. The stream belongs to the Client then, and is
// closed when Connect fails. Its Close must unblock its Read, as that of a net.Conn does.
func Connect(ctx context.Context, f io.ReadWriteCloser, resync bool) (*Client, error) {
	c, err := connect(ctx, f, resync)
	if err != nil {
		closeQuietly(f)
		return nil, fmt.Errorf("cannot reach the guest's agent: %w", err)
	}
	return c, nil
}

func connect(ctx context.Context, f io.ReadWriteCloser, resync bool) (*Client, error) {
	if resync {
		// Buffered, or a guest's noise would cost a system call a byte.
		f = buffered{bufio.NewReaderSize(f, maxWrite), f}
		if err := syncHost(ctx, f); err != nil {
			return nil, err
		}
	}
	session, err := yamux.Client(&hostGuard{ReadWriteCloser: f}, muxConfig())
	if err != nil {
		return nil, err
	}
	c := &Client{session: session, done: make(chan struct{})}
	c.http = &http.Client{
		Transport: &http.Transport{
			DialContext:            func(context.Context, string, string) (net.Conn, error) { return c.open() },
			DisableCompression:     true,
			MaxConnsPerHost:        maxStreams,
			MaxIdleConnsPerHost:    4,
			IdleConnTimeout:        time.Minute,
			ResponseHeaderTimeout:  answerTime,
			MaxResponseHeaderBytes: maxHeader,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	go func() {
		defer close(c.done)
		<-session.CloseChan()
		c.err = errors.New("the connection to the guest's agent has ended")
	}()
	if err := c.getHello(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Client) open() (net.Conn, error) {
	s, err := c.session.OpenStream()
	if err != nil {
		return nil, err
	}
	return stream{s}, nil
}

// Close ends the connection, and all that runs over it.
func (c *Client) Close() error { return c.session.Close() }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection has ended; nil as long as it hasn't.
func (c *Client) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// Hello is what the guest said about itself when it was connected.
func (c *Client) Hello() Hello { return c.hello }

// host is the name in requests; there is but one at the other end.
const host = "http://guest"

// do sends a request and returns an answer of status want, whose body the caller closes.
func (c *Client) do(ctx context.Context, method, path string, body any, want int) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, host+path, r)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("the guest's agent did not answer: %w", err)
	}
	if resp.StatusCode != want {
		return nil, errors.Join(answerError(resp), resp.Body.Close())
	}
	return resp, nil
}

// answerError makes an error of an answer that isn't the one hoped for.
func answerError(resp *http.Response) error {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxText))
	if err != nil || len(bytes.TrimSpace(text)) == 0 {
		return fmt.Errorf("the guest's agent answered with status %d", resp.StatusCode)
	}
	return &AnswerError{Status: resp.StatusCode, Text: clean(string(bytes.TrimSpace(text)))}
}

// AnswerError is a refusal by the guest's agent.
type AnswerError struct {
	Status int
	Text   string // from the guest; without control characters
}

func (e *AnswerError) Error() string { return "the guest's agent: " + e.Text }

// call is do for an answer without a body.
func (c *Client) call(ctx context.Context, method, path string, body any, want int) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	resp, err := c.do(ctx, method, path, body, want)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer))
	return errors.Join(err, resp.Body.Close())
}

func (c *Client) getHello(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	resp, err := c.do(ctx, http.MethodGet, pathHello, nil, http.StatusOK)
	if err != nil {
		return err
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if err := json.Unmarshal(data, &c.hello); err != nil {
		return fmt.Errorf("the guest's agent introduced itself wrongly: %w", err)
	}
	return c.hello.check()
}

// Ping asks whether the guest's agent is still there.
func (c *Client) Ping(ctx context.Context) error {
	return c.call(ctx, http.MethodGet, pathPing, nil, http.StatusNoContent)
}

// SetClock sets the guest's clock. With an instruction clock the guest leaves it alone.
func (c *Client) SetClock(ctx context.Context, t time.Time) error {
	return c.call(ctx, http.MethodPost, pathClock, clockRequest{t}, http.StatusNoContent)
}

// Shutdown asks the guest to stop its workload, within grace, and to power off; it returns when the guest has understood. A grace
// of 0 is the declared one.
func (c *Client) Shutdown(ctx context.Context, grace time.Duration) error {
	return c.call(ctx, http.MethodPost, pathShutdown, shutdownRequest{grace.Seconds()}, http.StatusAccepted)
}

// Events returns the guest's present state as events, and then each event as it comes. The channel is closed when the context or
// the connection ends, or the guest breaks the protocol; the function, to be called after that, says which of it.
func (c *Client) Events(ctx context.Context) (<-chan Event, func() error, error) {
	resp, err := c.do(ctx, http.MethodGet, pathEvents, nil, http.StatusOK)
	if err != nil {
		return nil, nil, err
	}
	events := make(chan Event)
	var failure error
	go func() {
		defer close(events)
		failure = readEvents(ctx, resp.Body, events)
		closeQuietly(resp.Body)
	}()
	return events, func() error { return failure }, nil
}

func readEvents(ctx context.Context, r io.Reader, events chan<- Event) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 1<<10), maxLine)
	for lines.Scan() {
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("the guest's agent broke the protocol: %w", err)
		}
		if err := e.check(); err != nil {
			return fmt.Errorf("the guest's agent broke the protocol: %w", err)
		}
		select {
		case events <- e:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return fmt.Errorf("the guest's agent broke the protocol: an event of more than %d bytes", maxLine)
	}
	return lines.Err()
}

// Logs follows what the workload writes, from the oldest that the guest keeps. The caller closes it.
func (c *Client) Logs(ctx context.Context) (*LogReader, error) {
	resp, err := c.do(ctx, http.MethodGet, pathLog, nil, http.StatusOK)
	if err != nil {
		return nil, err
	}
	return &LogReader{r: bufio.NewReaderSize(resp.Body, 4<<10), c: resp.Body}, nil
}

// LogReader reads a workload's output: piece by piece with Next, or as one text with Read.
type LogReader struct {
	r    io.Reader
	c    io.Closer
	buf  []byte
	rest []byte
	once sync.Once
	err  error
}

// LogPiece is a part of what a workload wrote.
type LogPiece struct {
	Stream Stream
	Data   []byte // valid until the next call
	Lost   uint64 // bytes that the guest no longer had; then there are no Data
}

// Next waits for the next piece. io.EOF is the end.
func (l *LogReader) Next() (LogPiece, error) {
	if l.buf == nil {
		l.buf = make([]byte, maxFrame)
	}
	f, err := readFrame(l.r, l.buf)
	if err != nil {
		return LogPiece{}, err
	}
	switch f.kind {
	case frameStdout, frameStderr:
		return LogPiece{Stream: Stream(f.kind), Data: f.payload}, nil
	case frameLost:
		return LogPiece{Lost: binary.BigEndian.Uint64(f.payload)}, nil
	}
	return LogPiece{}, fmt.Errorf("the guest's agent broke the protocol: a frame of kind %d in the log", f.kind)
}

// Read reads both outputs as they were written, with a line where something is missing.
func (l *LogReader) Read(p []byte) (int, error) {
	for len(l.rest) == 0 {
		piece, err := l.Next()
		if err != nil {
			return 0, err
		}
		if l.rest = piece.Data; piece.Lost > 0 {
			l.rest = fmt.Appendf(nil, "\n[%d bytes are missing here]\n", piece.Lost)
		}
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

// Close ends the reading; a Next that waits returns.
func (l *LogReader) Close() error {
	l.once.Do(func() { l.err = l.c.Close() })
	return l.err
}
