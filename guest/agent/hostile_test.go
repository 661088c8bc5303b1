package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

// lyingGuest answers each path with a handler of the test's; hello is honest unless the test says otherwise.
func lyingGuest(t *testing.T, handlers map[string]http.HandlerFunc) *Client {
	t.Helper()
	c, err := dialLyingGuest(t, handlers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeQuietly(c) })
	return c
}

func dialLyingGuest(t *testing.T, handlers map[string]http.HandlerFunc) (*Client, error) {
	t.Helper()
	host, guest := pair(t)
	session, err := yamux.Server(guest, muxConfig())
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	honest := newTestServer().Handler()
	if handlers[pathHello] == nil {
		mux.Handle(pathHello, honest)
	}
	for p, h := range handlers {
		mux.HandleFunc(p, h)
	}
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(streams{session}); err == nil {
			t.Error("Serve ended without saying why")
		}
	}()
	t.Cleanup(func() {
		closeQuietly(srv)
		closeQuietly(session)
		<-done
	})
	return Connect(deadline(t, 10*time.Second), host, false)
}

func text(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if _, err := io.WriteString(w, s); err != nil {
			return
		}
	}
}

func TestHostileHello(t *testing.T) {
	for name, c := range map[string]struct{ answer, want string }{
		"no JSON":         {"hello", "introduced itself wrongly"},
		"other version":   {`{"protocol":99}`, "speaks version 99"},
		"wrong type":      {`{"protocol":"1"}`, "introduced itself wrongly"},
		"without an end":  {`{"protocol":1,"name":"` + strings.Repeat("x", 1<<20), "introduced itself wrongly"},
		"not even a word": {"", "introduced itself wrongly"},
	} {
		_, err := dialLyingGuest(t, map[string]http.HandlerFunc{pathHello: text(c.answer)})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHostileEvents(t *testing.T) {
	for name, c := range map[string]struct{ answer, want string }{
		"long line":       {strings.Repeat("x", 1<<20), "more than"},
		"unknown kind":    {`{"kind":"sing"}` + "\n", "unknown event"},
		"unknown reason":  {`{"kind":"ending","reason":"\u001b[2J"}` + "\n", "unknown reason"},
		"negative code":   {`{"kind":"ready","code":-1}` + "\n", "impossible"},
		"huge pause":      {`{"kind":"workload-exited","next":1e300}` + "\n", "impossible"},
		"number overflow": {`{"kind":"ready","code":99999999999999999999}` + "\n", "broke the protocol"},
		"nested":          {strings.Repeat("[", 10000) + "\n", "broke the protocol"},
	} {
		cl := lyingGuest(t, map[string]http.HandlerFunc{pathEvents: text(c.answer)})
		events, failure, err := cl.Events(deadline(t, 10*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		for e := range events {
			t.Errorf("%s: an event came of it: %+v", name, e)
		}
		if err := failure(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHostileLog(t *testing.T) {
	huge := binary.BigEndian.AppendUint32([]byte{byte(frameStdout)}, 1<<31)
	for name, data := range map[string]string{"huge frame": string(huge), "unknown frame": "\x77\x00\x00\x00\x00", "exit in a log": string(appendFrame(nil, frameExit, []byte{0}))} {
		l, err := lyingGuest(t, map[string]http.HandlerFunc{pathLog: text(data)}).Logs(deadline(t, 10*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Next(); err == nil || err == io.EOF {
			t.Errorf("%s: %v", name, err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestHostileAnswers(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://169.254.169.254/", http.StatusFound)
		},
		"terminal codes": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "\x1b[2J\x07boo", http.StatusTeapot) },
		"huge header":    func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) },
		"endless error": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusTeapot)
			for {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		},
	} {
		err := lyingGuest(t, map[string]http.HandlerFunc{pathPing: h}).Ping(deadline(t, 10*time.Second))
		if err == nil || strings.ContainsAny(err.Error(), "\x1b\x07") || len(err.Error()) > 2*maxText {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// upgraded answers an exec with raw bytes on the upgraded connection.
func upgraded(data []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := upgrade(w)
		if err != nil {
			return
		}
		if _, err := conn.Write(data); err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			return
		}
		closeQuietly(conn)
	}
}

func TestHostileExec(t *testing.T) {
	credit := appendFrame(nil, frameCredit, []byte{0xFF, 0xFF, 0xFF, 0xFF})
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"too much credit":  {upgraded(credit), "too much credit"},
		"credit for none":  {upgraded(appendFrame(nil, frameCredit, []byte{0, 0, 0, 1})), "too much credit"},
		"input to a host":  {upgraded(appendFrame(nil, frameStdin, []byte("x"))), "broke the protocol"},
		"huge frame":       {upgraded([]byte{byte(frameStdout), 0xFF, 0xFF, 0xFF, 0xFF}), "a frame of"},
		"long exit":        {upgraded([]byte{byte(frameExit), 0, 0, 0, 4, 0, 0, 0, 0}), "instead of"},
		"another protocol": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }, "status 200"},
		"header for the command line": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Set-Cookie", "a=b")
			http.Error(w, "no", http.StatusForbidden)
		}, "agent: no"},
	} {
		dial := gate(t, lyingGuest(t, map[string]http.HandlerFunc{pathExec: c.handler}))
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		r, w := io.Pipe() // input that never comes
		_, err := Exec(ctx, dial, sh("true"), Stdio{In: r, Signals: make(chan os.Signal)})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		closeQuietly(w)
	}
}

func TestTheProxyPassesOnExecAlone(t *testing.T) {
	c := connected(t, newTestServer(), false)
	dial := gate(t, c)
	for _, r := range []string{"GET /v1/hello", "POST /v1/shutdown", "POST /v1/exec", "POST /v1/exec/../shutdown", "CONNECT guest:80"} {
		conn, err := dial(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", r); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode < 300 {
			t.Errorf("%s: %s", r, resp.Status)
		}
		closeQuietly(resp.Body)
		closeQuietly(conn)
	}
}

// muxHeaderOf makes a header of the multiplexer's.
func muxHeaderOf(kind byte, flags uint16, stream, length uint32) []byte {
	h := append([]byte{0, kind}, 0, 0)
	binary.BigEndian.PutUint16(h[2:], flags)
	h = binary.BigEndian.AppendUint32(h, stream)
	return binary.BigEndian.AppendUint32(h, length)
}

func TestHostileMultiplexer(t *testing.T) {
	for name, data := range map[string][]byte{
		"ping":            muxHeaderOf(2, 1, 0, 7),
		"opens a stream":  muxHeaderOf(muxWindow, muxSYN, 2, 0),
		"opens an odd":    muxHeaderOf(muxData, muxSYN, 77, 0),
		"huge data":       muxHeaderOf(muxData, 0, 1, 1<<31),
		"another version": {9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"unknown type":    muxHeaderOf(9, 0, 1, 0),
		"even stream":     muxHeaderOf(muxData, 0, 4, 0),
	} {
		host, guest := pair(t)
		if _, err := guest.Write(data); err != nil {
			t.Fatal(err)
		}
		if _, err := Connect(deadline(t, 10*time.Second), host, false); err == nil {
			t.Errorf("%s: connected", name)
		}
		if got := guardError(bytes.NewReader(data)); got == nil || got == io.EOF || !strings.Contains(got.Error(), "broke the protocol") {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func guardError(r io.Reader) error {
	_, err := io.Copy(io.Discard, struct{ io.Reader }{&hostGuard{ReadWriteCloser: readOnly{r}}})
	return err
}

type readOnly struct{ io.Reader }

func (readOnly) Write(p []byte) (int, error) { return len(p), nil }
func (readOnly) Close() error                { return nil }

// TestAFloodOfSmallPiecesIsBounded sends single bytes into a stream that nobody reads, for as long as they are taken.
func TestAFloodOfSmallPiecesIsBounded(t *testing.T) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	stop := make(chan struct{})
	dial := gate(t, lyingGuest(t, map[string]http.HandlerFunc{pathExec: func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := upgrade(w)
		if err != nil {
			return
		}
		defer close(stop)
		one := appendFrame(nil, frameStdout, []byte{'.'})
		end := time.Now().Add(2 * time.Second)
		if conn.SetWriteDeadline(end) != nil {
			return
		}
		for time.Now().Before(end) {
			if _, err := conn.Write(one); err != nil {
				return
			}
		}
	}}))
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() {
		_, err := Exec(ctx, dial, sh("true"), Stdio{Out: blocked{ctx, make(chan struct{}, 1)}, Signals: make(chan os.Signal)})
		result <- err
	}()
	<-stop
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
		t.Errorf("the heap grew by %d bytes", grown)
	}
	cancel()
	if err := <-result; err == nil {
		t.Error("a cancelled command ended well")
	}
}

func TestANoisyGuestIsGivenUp(t *testing.T) {
	if _, _, err := nextSync(byteReader{io.LimitReader(zeroes{}, 1<<20)}, 1000); err == nil || !strings.Contains(err.Error(), "no handshake") {
		t.Errorf("%v", err)
	}
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestServerRefusesWhatAHostDoesNotSend(t *testing.T) {
	for name, data := range map[string][]byte{
		"more than its credit": bytes.Repeat(appendFrame(nil, frameStdin, make([]byte, maxFrame)), 16), // a pipe takes some of it
		"output":               appendFrame(nil, frameStdout, []byte("x")),
		"input behind its end": append(appendFrame(nil, frameEOF, nil), appendFrame(nil, frameStdin, []byte("x"))...),
	} {
		c := connected(t, newTestServer(), false)
		conn, err := openExec(deadline(t, 10*time.Second), gate(t, c), &ExecRequest{Argv: []string{"sleep", "60"}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(data); err != nil {
			t.Fatal(err)
		}
		// The command is hung up: its exit code comes, 128+1.
		buf := make([]byte, maxFrame)
		for {
			f, err := readFrame(conn, buf)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				break
			}
			if f.kind == frameExit {
				if f.payload[0] != 129 {
					t.Errorf("%s: ended with %d", name, f.payload[0])
				}
				break
			}
		}
		closeQuietly(conn)
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add(appendFrame(nil, frameStdout, []byte("x")))
	f.Add(appendFrame(nil, frameResize, []byte{0, 1, 0, 2}))
	f.Add([]byte{1, 0xFF, 0xFF, 0xFF, 0xFF})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		var again []byte
		buf := make([]byte, maxFrame)
		for {
			f, err := readFrame(r, buf)
			if err != nil {
				break
			}
			again = appendFrame(again, f.kind, f.payload)
		}
		if !bytes.HasPrefix(data, again) {
			t.Error("what was read isn't what was sent")
		}
	})
}

func FuzzNextSync(f *testing.F) {
	f.Add(syncMessage(syncAck, syncToken{1, 2, 3}))
	f.Add(append([]byte("\xfe\xfeclaw"), syncMessage(syncGo, syncToken{})...))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		for {
			kind, token, err := nextSync(r, 0)
			if err != nil {
				return
			}
			if !bytes.Contains(data, syncMessage(kind, token)) {
				t.Error("a message that wasn't sent")
			}
		}
	})
}

func FuzzHostGuard(f *testing.F) {
	f.Add(muxHeaderOf(muxData, 0, 1, 0))
	f.Add(append(muxHeaderOf(muxData, 0, 1, 3), "abc"...))
	f.Add(muxHeaderOf(2, 1, 0, 0))
	f.Fuzz(func(t *testing.T, data []byte) {
		var out bytes.Buffer
		_, err := io.Copy(&out, struct{ io.Reader }{&hostGuard{ReadWriteCloser: readOnly{bytes.NewReader(data)}}})
		if !bytes.HasPrefix(data, out.Bytes()) {
			t.Error("what passed isn't what came")
		}
		if err == nil && len(data)-out.Len() >= muxHeader {
			t.Errorf("%d of %d bytes passed, and no error", out.Len(), len(data))
		}
	})
}

var _ net.Conn = stream{}
