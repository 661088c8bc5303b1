package gate

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"unicode"

	"github.com/clawvm/clawvm/guest/agent"
)

// printable fails for a text that is too long, or that a terminal would act on.
func printable(t *testing.T, s string) {
	t.Helper()
	if len(s) > detailMax {
		t.Errorf("%d bytes of text", len(s))
	}
	for _, r := range s {
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			t.Errorf("%q holds %U", s, r)
		}
	}
}

// FuzzReceive gives the supervisor's end one packet of a gate that was taken over.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(`{"kind":"ready"}`))
	f.Add([]byte(`{"kind":"workload-ended","code":-1,"again":true,"detail":"\u001b[2J\u009b\u061c"}`))
	f.Add([]byte(`{"kind":"` + strings.Repeat("x", messageMax)))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) > 8*messageMax {
			return // a packet that large says no more than one that is too large
		}
		supervisor, end, err := Pair()
		if err != nil {
			t.Fatal(err)
		}
		defer supervisor.Close()
		defer end.Close()
		if _, err := end.Write(packet); err != nil {
			t.Fatal(err)
		}
		if len(packet) == 0 {
			end.Close() // nothing was sent: the end is what arrives
		}
		m, err := supervisor.Receive()
		if err == nil {
			printable(t, m.Detail)
		}
		if len(packet) > messageMax && (err == nil || errors.Is(err, io.EOF)) {
			t.Errorf("a packet of %d bytes: %v", len(packet), err)
		}
	})
}

// FuzzTranslate passes on whatever an agent may say: the supervisor must be able to read it.
func FuzzTranslate(f *testing.F) {
	f.Add(`{"kind":"workload-exited","code":3,"detail":"<<<>>>&&&"}`)
	f.Add(`{"kind":"ending","reason":"reboot"}`)
	f.Add(`{"kind":"not-ready","detail":"` + strings.Repeat(`\u2028<`, 400) + `"}`)
	f.Fuzz(func(t *testing.T, text string) {
		var e agent.Event
		if json.Unmarshal([]byte(text), &e) != nil {
			return
		}
		m, ok := translate(e)
		if !ok {
			return
		}
		supervisor, end, err := Pair()
		if err != nil {
			t.Fatal(err)
		}
		defer supervisor.Close()
		gate, err := Open(end)
		if err != nil {
			t.Fatal(err)
		}
		defer gate.Close()
		if err := gate.Send(m); err != nil {
			t.Fatal(err)
		}
		got, err := supervisor.Receive()
		if err != nil || got.Kind != m.Kind || got.Code != m.Code {
			t.Errorf("%+v arrives as %+v, %v", m, got, err)
		}
		printable(t, got.Detail)
	})
}
