package agent

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"
	"unicode"
)

// shown fails for a text that a terminal would act on, or that is longer than any is let through.
func shown(t *testing.T, texts ...string) {
	t.Helper()
	for _, s := range texts {
		// A letter that can't be shown becomes one of at most as many bytes.
		if len(s) > maxText {
			t.Errorf("%d bytes of text", len(s))
		}
		for _, r := range s {
			if !unicode.IsPrint(r) {
				t.Errorf("%q holds %U", s, r)
			}
		}
	}
}

// FuzzEvents reads what a guest says of itself.
func FuzzEvents(f *testing.F) {
	f.Add([]byte(`{"kind":"ready","uptime":1.5}` + "\n" + `{"kind":"ending","reason":"poweroff"}` + "\n"))
	f.Add([]byte(`{"kind":"workload-exited","code":1,"signal":9,"next":3.5,"detail":"\u001b[2J\u009b\u202e"}`))
	f.Add([]byte(`{"kind":"not-ready","uptime":-1}`))
	f.Add([]byte("[[[[\n{}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		events := make(chan Event)
		var failure error
		go func() {
			defer close(events)
			failure = readEvents(context.Background(), bytes.NewReader(data), events)
		}()
		n := 0
		for e := range events {
			n++
			if err := e.check(); err != nil {
				t.Errorf("an event was passed on: %v", err)
			}
			shown(t, e.Detail, e.Reason)
		}
		if failure == nil && n == 0 && len(bytes.TrimSpace(data)) > 0 {
			t.Error("no event, and no error")
		}
	})
}

// FuzzLog reads a workload's output as the guest frames it.
func FuzzLog(f *testing.F) {
	f.Add(appendFrame(appendFrame(nil, frameStdout, []byte("out\n")), frameStderr, []byte("err\n")))
	f.Add(appendFrame(nil, frameLost, []byte{0, 0, 0, 0, 0, 0, 0, 9}))
	f.Add(appendFrame(nil, frameExit, []byte{0}))
	f.Add([]byte{2, 0, 1, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		text, err := io.ReadAll(&LogReader{r: bytes.NewReader(data), c: io.NopCloser(nil)})
		// A frame of lost bytes has 13 bytes and becomes a line of at most 49.
		if len(text) > 4*len(data) {
			t.Errorf("%d bytes became %d", len(data), len(text))
		}
		if err == nil && len(data) > 0 && len(data) < frameHeader {
			t.Error("half a frame is no error")
		}
	})
}

// halves is a connection that was recorded: what is read stands in it, what is written goes nowhere.
type halves struct {
	io.Reader
	written int
}

func (h *halves) Write(p []byte) (int, error) { h.written += len(p); return len(p), nil }
func (h *halves) Close() error                { return nil }

// FuzzExec reads the answer to an exec, as the command line does.
func FuzzExec(f *testing.F) {
	f.Add(appendFrame(appendFrame(nil, frameStdout, []byte("x")), frameExit, []byte{3}))
	f.Add(appendFrame(appendFrame(nil, frameCredit, []byte{0, 0, 0xff, 0xff}), frameExit, []byte{0}))
	f.Add(appendFrame(nil, frameResize, []byte{0, 1, 0, 1}))
	f.Fuzz(func(t *testing.T, data []byte) {
		var out, errs bytes.Buffer
		e := &execClient{conn: &halves{Reader: bytes.NewReader(data)}, stdio: Stdio{Out: &out, Err: &errs}, ended: make(chan struct{})}
		e.out = frameWriter{w: e.conn}
		e.change = sync.NewCond(&e.mu)
		code, err := e.receive()
		if out.Len()+errs.Len() > len(data) {
			t.Errorf("%d bytes became %d", len(data), out.Len()+errs.Len())
		}
		if code < 0 || code > 255 || err == nil && !bytes.Contains(data, appendFrame(nil, frameExit, []byte{byte(code)})) {
			t.Errorf("ended with %d, which nobody said", code)
		}
		if e.credit < 0 || e.credit > stdinCredit {
			t.Errorf("a credit of %d bytes", e.credit)
		}
	})
}

// answer is what an honest guest's multiplexer sends on a stream that the host opened: data, and with end its end.
func answer(stream uint32, text string, end bool) []byte {
	const ack, fin = 2, 4
	b := muxHeaderOf(muxWindow, ack, stream, 0)
	b = append(b, append(muxHeaderOf(muxData, 0, stream, uint32(len(text))), text...)...)
	if end {
		b = append(b, muxHeaderOf(muxWindow, fin, stream, 0)...)
	}
	return b
}

// FuzzConversation plays a guest of arbitrary bytes: through the guard, the multiplexer and HTTP, to each question that
// a host asks. Whatever comes, each question ends.
func FuzzConversation(f *testing.F) {
	hello := "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 45\r\n\r\n" + `{"protocol":1,"version":"v1","name":"x     "}` + "\n"
	events := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1e\r\n" + `{"kind":"ready","uptime":1.5}` + "\n\r\n0\r\n\r\n"
	f.Add(answer(1, hello, false))
	f.Add(append(answer(1, hello, true), answer(3, events, true)...))
	f.Add(answer(1, hello+"HTTP/1.1 204 No Content\r\n\r\n", false))
	f.Add(answer(1, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", true))
	f.Add(append(answer(1, "HTTP/1.1 100 Continue\r\n\r\n", false), muxHeaderOf(muxGoAway, 0, 0, 1)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		host, guest := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			go io.Copy(io.Discard, guest)
			if _, err := guest.Write(data); err != nil {
				return
			}
			closeQuietly(guest)
		}()
		// Each wait ends with the connection, which the guest ends: no other limit is needed.
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		c, err := Connect(ctx, host, false)
		if err == nil {
			h := c.Hello()
			shown(t, h.Version, h.Name, h.Boot, h.Kernel)
			if events, _, err := c.Events(ctx); err == nil {
				for e := range events {
					shown(t, e.Detail, e.Reason)
				}
			}
			if err := c.Ping(ctx); err != nil && len(err.Error()) > 2*maxText {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			if l, err := c.Logs(ctx); err == nil {
				if _, err := io.Copy(io.Discard, l); err == nil && len(data) == 0 {
					t.Error("a log without bytes")
				}
				closeQuietly(l)
			}
			closeQuietly(c)
		}
		<-done
		if ctx.Err() != nil {
			t.Error("a question did not end with the connection")
		}
	})
}

// FuzzHandshake plays both ends' search for each other on a port full of an earlier session's rest.
func FuzzHandshake(f *testing.F) {
	f.Add([]byte("an old session"), true)
	f.Add(syncMessage(syncAck, syncToken{}), true)
	f.Add(syncMagic[:4], false)
	f.Fuzz(func(t *testing.T, rest []byte, toHost bool) {
		if len(rest) > 16<<10 {
			return // more than a socket takes without a reader
		}
		host, guest := pair(t)
		defer closeQuietly(host)
		defer closeQuietly(guest)
		from := host
		if toHost {
			from = guest
		}
		if _, err := from.Write(rest); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		served := make(chan error, 1)
		go func() { served <- syncGuest(byteReader{guest}, guest) }()
		if err := syncHost(ctx, host); err != nil {
			t.Errorf("the host: %v", err)
			closeQuietly(host)
		}
		if err := <-served; err != nil {
			t.Errorf("the guest: %v", err)
		}
	})
}

// FuzzStdin gives a guest's end of an exec arbitrary frames of input.
func FuzzStdin(f *testing.F) {
	f.Add(append(appendFrame(nil, frameStdin, []byte("x")), appendFrame(nil, frameEOF, nil)...))
	f.Add(appendFrame(nil, frameSignal, []byte{200}))
	f.Fuzz(func(t *testing.T, data []byte) {
		in := newInput()
		// Ended, so that no frame signals anything.
		e := &session{ended: true}
		e.receive(bytes.NewReader(data), in)
		if in.held > stdinCredit || len(in.data) > stdinCredit {
			t.Errorf("%d bytes of input are held", in.held)
		}
	})
}
