package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/host"
)

func TestParseWhen(t *testing.T) {
	now := time.Date(2026, 11, 22, 15, 50, 6, 0, time.FixedZone("CET", 3600))
	for text, want := range map[string]string{
		"10m": "2026-11-22T14:40:06Z", "1h30m": "2026-11-22T13:20:06Z", "3d": "2026-11-19T14:50:06Z", "0s": "2026-11-22T14:50:06Z",
		"15:04": "2026-11-22T14:04:00Z", "15:04:05": "2026-11-22T14:04:05Z", "2026-11-21": "2026-11-20T23:00:00Z",
		"2026-11-21 10:00": "2026-11-21T09:00:00Z", "2026-11-21T10:00:05": "2026-11-21T09:00:05Z", "2026-11-21T10:00:00Z": "2026-11-21T10:00:00Z",
		"@0": "1970-01-01T00:00:00Z",
	} {
		if got, err := parseWhen(text, now); err != nil || got.UTC().Format(time.RFC3339) != want {
			t.Errorf("%s: %v, %v; want %s", text, got.UTC(), err, want)
		}
	}
	for _, text := range []string{"", "-5m", "yesterday", "5", "25:00", "@x", "99999d", "2026-13-01"} {
		if got, err := parseWhen(text, now); err == nil {
			t.Errorf("%q is read as %v", text, got)
		}
	}
}

// logDir makes logs as a gate leaves them: two rotated files and one in use.
func logDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"workload-2026-11-22T10-00-00.000.log": "an older gate's line\n2026-11-22T09:00:00.000000Z stdout F one\n",
		"workload-2026-11-22T12-00-00.000.log": "2026-11-22T11:00:00.000000Z stderr F two\n2026-11-22T11:30:00.000000Z stdout P a pro\n",
		"workload.log":                         "2026-11-22T12:30:00.000000Z stdout F mpt\n2026-11-22T13:00:00.000000Z stdout F esc \x1b[2J\n2026-11-22T13:10:00.000000Z stdout P end",
		"other.log":                            "2026-11-22T12:45:00.000000Z stdout F of another\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestLogsArePrinted(t *testing.T) {
	dir := logDir(t)
	at := func(text string) time.Time {
		when, err := time.Parse(time.RFC3339, text)
		if err != nil {
			t.Fatal(err)
		}
		return when
	}
	for name, c := range map[string]struct {
		p     logPrinter
		n     int
		names []string
		want  string
	}{
		"all":        {logPrinter{}, -1, []string{"workload"}, "an older gate's line\none\ntwo\na prompt\nesc \x1b[2J\n"},
		"two":        {logPrinter{}, 2, []string{"workload"}, "a prompt\nesc \x1b[2J\n"},
		"none":       {logPrinter{}, 0, []string{"workload"}, ""},
		"more":       {logPrinter{}, 1000, []string{"workload"}, "an older gate's line\none\ntwo\na prompt\nesc \x1b[2J\n"},
		"since":      {logPrinter{since: at("2026-11-22T12:59:00Z")}, -1, []string{"workload"}, "esc \x1b[2J\n"},
		"until":      {logPrinter{until: at("2026-11-22T11:00:00Z")}, 2, []string{"workload"}, "one\ntwo\n"},
		"times":      {logPrinter{stamps: true}, 1, []string{"workload"}, "2026-11-22T13:00:00.000000Z esc \x1b[2J\n"},
		"json":       {logPrinter{json: true}, 1, []string{"other"}, `{"time":"2026-11-22T12:45:00Z","vm":"other","stream":"stdout","text":"of another"}` + "\n"},
		"two VMs":    {logPrinter{vms: true}, 2, []string{"workload", "other"}, "workload | a prompt\nother | of another\nworkload | esc \x1b[2J\n"},
		"not there":  {logPrinter{}, -1, []string{"nothing"}, ""},
		"not a file": {logPrinter{}, -1, []string{"link"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			c.p.out = bufio.NewWriter(&out)
			c.p.text = c.p.out
			if err := os.Symlink("/etc/passwd", dir+"/link.log"); err != nil && !os.IsExist(err) {
				t.Fatal(err)
			}
			var sources []*logSource
			for _, n := range c.names {
				sources = append(sources, &logSource{n, host.ReadLog(filepath.Join(dir, n+".log"))})
			}
			err := c.p.print(t.Context(), sources, c.n, false)
			if (err != nil) != (name == "not a file") {
				t.Fatal(err)
			}
			if err := c.p.close(); err != nil {
				t.Fatal(err)
			}
			if out.String() != c.want {
				t.Errorf("got\n%q\nwant\n%q", out.String(), c.want)
			}
			for _, s := range sources {
				if err := s.log.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestALogIsFollowedOverItsRotation reads on while a log is rotated twice between
// two looks, and a line is written in two pieces.
func TestALogIsFollowedOverItsRotation(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "workload.log")
	s := &logSource{"vm", host.ReadLog(path)}
	defer s.log.Close()
	var got []string
	look := func() {
		t.Helper()
		if err := s.each(func(_ string, l host.LogLine) error { got = append(got, string(l.Text)); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	write := func(text string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprint(f, text); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	rotate := func(stamp string) {
		t.Helper()
		if err := os.Rename(path, filepath.Join(dir, "workload-"+stamp+".log")); err != nil {
			t.Fatal(err)
		}
	}
	look()
	write("one\ntw")
	look()
	write("o\n")
	look()
	write("three\n")
	rotate("2026-11-22T10-00-00.000")
	look()
	write("four\n")
	rotate("2026-11-22T11-00-00.000")
	write("five\n")
	rotate("2026-11-22T12-00-00.000")
	write("six\n")
	look()
	if want := "one two three four five six"; strings.Join(got, " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
