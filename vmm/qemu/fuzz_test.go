package qemu

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"testing"
	"time"
	"unicode"
)

// FuzzQMP plays a QEMU that a guest took over: it greets, and says what it likes. Each question ends, at the latest
// with the connection.
func FuzzQMP(f *testing.F) {
	f.Add([]byte(`{"return": {}, "id": 1}` + "\n" + `{"return": {"running": true}, "id": 2}` + "\n"))
	f.Add([]byte(`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}` + "\n" + `{"return": {}, "id": 1}` + "\n"))
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "\u001b[2J"}, "id": 1}` + "\n"))
	f.Add([]byte(`{"return": {}, "id": 1}` + "\n" + `{"event": "", "data": [], "id": 2, "return": null}` + "\n{}\n[]\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer theirs.Close()
			if _, err := io.WriteString(theirs, greeting); err != nil {
				return
			}
			// An answer comes after its question, where there is one.
			asked := bufio.NewScanner(theirs)
			for line := range bytes.Lines(said) {
				if err := theirs.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
					return
				}
				asked.Scan()
				if _, err := theirs.Write(line); err != nil {
					return
				}
			}
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		q, err := openQMP(ctx, ours, func(qmpEvent) {})
		if err == nil {
			for range 3 {
				if _, err := q.do(ctx, "query-status"); err != nil {
					plain(t, err.Error())
					break
				}
			}
			if err := q.close(); err != nil {
				t.Error(err)
			}
		} else {
			plain(t, err.Error())
		}
		<-done
		if ctx.Err() != nil {
			t.Error("a question did not end with the connection")
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
