package cloudhypervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
)

// FuzzEvents reads the event monitor of a VMM that may be a guest's by now.
func FuzzEvents(f *testing.F) {
	const boot = `{"timestamp":{"secs":0,"nanos":1},"source":"vm","event":"booted","properties":null}`
	f.Add([]byte(boot + "\n\n" + `{"source":"guest","event":"panic","properties":{"k":"v"}}`))
	f.Add([]byte(boot[:40] + boot))
	f.Add([]byte(strings.Repeat("{", 300)))
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		err := readEvents(bytes.NewReader(data), func(e event) {
			n++
			if e.Source == "" || e.Event == "" {
				t.Errorf("%q is no event", e)
			}
		})
		if n > len(data)/len(`{"source":"a","event":"b"}`) {
			t.Errorf("%d events in %d bytes", n, len(data))
		}
		if err != nil && len(data) <= maxEvent {
			t.Errorf("%d bytes: %v", len(data), err)
		}
		// What comes in pieces is read as what comes at once.
		again := 0
		if err := readEvents(oneByOne{bytes.NewReader(data)}, func(event) { again++ }); len(data) < 4096 && (err != nil || again != n) {
			t.Errorf("%d events at once, %d byte by byte, %v", n, again, err)
		}
	})
}

type oneByOne struct{ r io.Reader }

func (o oneByOne) Read(p []byte) (int, error) { return o.r.Read(p[:min(len(p), 1)]) }

// FuzzAnswer gives the client an answer of arbitrary bytes.
func FuzzAnswer(f *testing.F) {
	for _, body := range []string{`{"version":"53.0.0"}`, `["a","b\u001b[2J"]`, `{"error":"x"}`, "", "\x1b]0;x\x07"} {
		for _, status := range []string{"200 OK", "204 No Content", "500 Internal Server Error"} {
			f.Add(fmt.Appendf(nil, "HTTP/1.1 %s\r\nServer: Cloud Hypervisor API\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body))
		}
	}
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n{\"version\":\"v53.0\\u001b[2J\"}"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n"))
	f.Fuzz(func(t *testing.T, answer []byte) {
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				if _, err := c.Read(make([]byte, 4096)); err == nil {
					if _, err := c.Write(answer); err != nil {
						t.Log(err) // it is read no further, which is allowed
					}
				}
				c.Close()
			}
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if _, err := newClient(socket).info(ctx); err != nil {
			plain(t, err.Error())
		}
		if p, err := newClient(socket).ping(ctx); err != nil {
			plain(t, err.Error())
		} else if v, err := checkVersion(p.Version); err == nil {
			plain(t, v)
		}
		if ctx.Err() != nil {
			t.Error("an answer that ended was waited for")
		}
	})
}

// FuzzRefusal reads the body of a refusal.
func FuzzRefusal(f *testing.F) {
	for _, body := range []string{`["a","b"]`, `{"error":"x"}`, "text", "[1]", "\x1b[2J", `["\u009b"]`} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		text := (&APIError{Call: "vm.boot", Status: 500, Chain: errorChain(body)}).Error()
		plain(t, text)
		if len(text) > 4*len(body)+200 {
			t.Errorf("%d bytes became %d", len(body), len(text))
		}
		if _, err := json.Marshal(text); err != nil {
			t.Error(err)
		}
	})
}

// plain fails for a text that would drive a terminal.
func plain(t *testing.T, s string) {
	t.Helper()
	for _, r := range s {
		if unicode.IsControl(r) && r != '\n' {
			t.Fatalf("%q holds %U", s, r)
		}
	}
}
