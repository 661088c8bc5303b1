package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestPercent(t *testing.T) {
	began := time.Now()
	before := cpuSample{1, began, 10 * time.Second}
	for _, c := range []struct {
		what string
		now  cpuSample
		want float64
	}{
		{"a processor and a half", cpuSample{1, began.Add(2 * time.Second), 13 * time.Second}, 150},
		{"idle", cpuSample{1, began.Add(2 * time.Second), 10 * time.Second}, 0},
		{"another supervisor", cpuSample{2, began.Add(2 * time.Second), 13 * time.Second}, 0},
		{"the next life", cpuSample{1, began.Add(2 * time.Second), time.Second}, 0},
		{"no time", cpuSample{1, began, 13 * time.Second}, 0},
	} {
		if got := percent(before, c.now); got != c.want {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
}

func TestFamily(t *testing.T) {
	all := map[int]process{1: {}, 10: {parent: 1}, 11: {parent: 10}, 12: {parent: 10}, 13: {parent: 12}, 20: {parent: 1}}
	got := family(all, 10)
	slices.Sort(got)
	if !slices.Equal(got, []int{10, 11, 12, 13}) {
		t.Errorf("the family is %v", got)
	}
	if got := family(all, 99); got != nil {
		t.Errorf("the family of nobody is %v", got)
	}
}

// TestProcessTable finds a child of this process, and its memory.
func TestProcessTable(t *testing.T) {
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	all, err := processTable()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(family(all, os.Getpid()), cmd.Process.Pid) {
		t.Errorf("process %d is not of this one's family", cmd.Process.Pid)
	}
	p := all[cmd.Process.Pid]
	if m, err := p.ProcSMapsRollup(); err != nil || m.Pss == 0 || p.tasks != 1 {
		t.Errorf("it has %d bytes, %d tasks, %v", m.Pss, p.tasks, err)
	}
}

func TestDiskSpace(t *testing.T) {
	p := Paths{State: t.TempDir()}
	if got, err := diskSpace(p); got != 0 || err != nil {
		t.Errorf("without disks: %d, %v", got, err)
	}
	if err := os.Mkdir(filepath.Dir(p.VolumeDisk("a")), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{p.OverlayDisk(), p.VolumeDisk("a"), p.VolumeDisk("b")} {
		if err := os.WriteFile(file, make([]byte, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, 1<<30); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := diskSpace(p); err != nil || got < 3*8192 || got > 1<<20 {
		t.Errorf("three disks with 8 KiB each take %d bytes, %v", got, err)
	}
}
