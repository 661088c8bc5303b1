package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/clawvm/clawvm/host"
)

func TestPrintTop(t *testing.T) {
	var b strings.Builder
	err := printTop(&b, []host.Usage{
		{Name: "web", State: host.Running, CPU: 149.96, Memory: 300 << 20, MemoryMax: 2 << 30, Received: 1536, Sent: 12, Read: 5 << 20, Written: 1 << 40, Disk: 70 << 20, Tasks: 31},
		{Name: "a-longer-name", State: host.Starting},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := `
NAME           STATE     CPU     MEMORY  OF      IN      OUT  READ    WRITTEN  DISK   TASKS
web            ready     150.0%  300MiB  2.0GiB  1.5KiB  12B  5.0MiB  1.0TiB   70MiB  31
a-longer-name  starting  0.0%    0B      0B      0B      0B   0B      0B       0B     0
`
	if diff := cmp.Diff(want[1:], b.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got, want := overwrite("a\nb\n"), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J"; got != want {
		t.Errorf("overwrite makes %q, want %q", got, want)
	}
}
