package host

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/clawvm/clawvm/host/gate"
)

// FuzzReadLog reads logs that a gate which was taken over may have written: what is
// read is bounded, and all that is in the file but the stamps.
func FuzzReadLog(f *testing.F) {
	for _, seed := range []string{
		"", "\n\n", "no stamp", "2026-11-22T15:50:06.010000Z stdout F the text\n2026-11-22T15:50:06.010000Z stderr P begins",
		"2026-11-22T15:50:06.010000Z stdout F\n", "2026-11-22T15:50:06.010000Z stdin F x\n", "9999-99-99T99:99:99.999999Z stdout F x\n",
		"2026/11/22 15:50:06 guest: ready\n", "\x00\xff\x1b[2J\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "workload.log")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		r := ReadLog(path)
		defer r.Close()
		var again []byte
		for {
			line, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if bytes.IndexByte(line.Text, '\n') >= 0 || len(line.Text) > 2*logLineMax {
				t.Fatalf("a line of %d bytes: %q", len(line.Text), line.Text)
			}
			if line.Stream != "" {
				tag := gate.TagFull
				if line.Partial {
					tag = gate.TagPartial
				}
				again = fmt.Appendf(again, "%s %s %s ", line.Time.UTC().Format(gate.StampFormat), line.Stream, tag)
			}
			again = append(append(again, line.Text...), '\n')
		}
		// A line without an end is not there yet.
		if want := text[:bytes.LastIndexByte(text, '\n')+1]; len(text) < logLineMax && !bytes.Equal(again, want) {
			t.Fatalf("read %q of %q", again, want)
		}
		if _, err := Tail(path, 5); err != nil {
			t.Fatal(err)
		}
	})
}
