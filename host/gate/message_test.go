package gate

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"
)

func TestMessagesArriveAsTheyWereSent(t *testing.T) {
	supervisor, end, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	gate, err := Open(end)
	if err != nil {
		t.Fatal(err)
	}
	want := Message{Kind: WorkloadEnded, Code: 78, Detail: "exit code 78"}
	if err := gate.Send(want); err != nil {
		t.Fatal(err)
	}
	got, err := supervisor.Receive()
	if err != nil || got != want {
		t.Errorf("received %+v, %v", got, err)
	}
	if err := gate.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := supervisor.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v, want EOF", err)
	}
}

func TestNonsenseIsAnError(t *testing.T) {
	for name, packet := range map[string]string{
		"no JSON":  "hello",
		"too long": `{"kind":"` + strings.Repeat("x", messageMax) + `"}`,
		"a list":   "[]",
	} {
		t.Run(name, func(t *testing.T) {
			supervisor, end, err := Pair()
			if err != nil {
				t.Fatal(err)
			}
			defer supervisor.Close()
			if _, err := end.WriteString(packet); err != nil {
				t.Fatal(err)
			}
			defer end.Close()
			if m, err := supervisor.Receive(); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("received %+v, %v; want an error", m, err)
			}
		})
	}
}

func TestDetailsAreBoundedAndPrintable(t *testing.T) {
	supervisor, end, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer supervisor.Close()
	defer end.Close()
	raw := `{"kind":"progress","detail":"\u001b[2Jred` + strings.Repeat("é", 600) + `"}`
	if _, err := io.WriteString(writer{end}, raw); err != nil {
		t.Fatal(err)
	}
	m, err := supervisor.Receive()
	if err != nil {
		t.Fatal(err)
	}
	if strings.ContainsRune(m.Detail, 0x1b) || len(m.Detail) > detailMax || !strings.HasPrefix(m.Detail, "?[2Jred") {
		t.Errorf("detail of %d bytes: %.20q", len(m.Detail), m.Detail)
	}
}

// writer writes in one piece, which is one packet.
type writer struct{ *os.File }

func (w writer) WriteString(s string) (int, error) { return w.Write([]byte(s)) }

func FuzzPrintable(f *testing.F) {
	for _, s := range []string{"", "plain", "\x1b[31m", "\xff\xfe", "a\u202eb", strings.Repeat("ü", 300)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		out := Printable(s, 100)
		if len(out) > 100 {
			t.Errorf("%d bytes", len(out))
		}
		for _, r := range out {
			if r < ' ' || r == 0x7f || r == 0x202e {
				t.Errorf("%q holds %U", out, r)
			}
		}
	})
}
