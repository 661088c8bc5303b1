package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/clawvm/clawvm/host"
)

// TestALastLineIsOfThisStart: while a workload gets ready its last line shows that it
// lives; that of an earlier start would show nothing.
func TestALastLineIsOfThisStart(t *testing.T) {
	log := filepath.Join(t.TempDir(), "workload.log")
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		write := func(line string, at time.Time) {
			if err := os.WriteFile(log, []byte("2026-01-01T00:00:00Z stdout F "+line+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(log, at, at); err != nil {
				t.Fatal(err)
			}
		}
		var out bytes.Buffer
		st := (&screen{out: &out}).follow("vm", log)
		defer st.end()
		st.step(host.Progress{Phase: "ready"})
		write("said before", began.Add(-time.Hour))
		time.Sleep(tickPlain + time.Second)
		write("said now", time.Now())
		time.Sleep(tickPlain)
		synctest.Wait()
		if got := out.String(); strings.Contains(got, "said before") || !strings.Contains(got, "said now") {
			t.Errorf("shown while it gets ready:\n%s", got)
		}
	})
}
