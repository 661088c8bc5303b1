package emuhost

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestHost(t *testing.T) {
	began := time.Now()
	h := Start(t, Options{})
	t.Logf("up after %s", time.Since(began).Round(time.Millisecond))
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()

	t.Run("systemd and KVM are there", func(t *testing.T) {
		if got := h.Must(t, "cat", "/proc/1/comm"); strings.TrimSpace(got) != "systemd" {
			t.Errorf("init is %q", got)
		}
		h.Must(t, "udevadm", "wait", "--timeout=60", "/dev/kvm")
		h.Must(t, "grep", "-qw", "svm", "/proc/cpuinfo")
	})
	t.Run("streams and exit codes", func(t *testing.T) {
		stdout, stderr, code, err := h.Script(ctx, "echo out; echo err >&2; exit 3")
		if err != nil || code != 3 || stdout != "out\n" || stderr != "err\n" {
			t.Errorf("got %q, %q, %d, %v", stdout, stderr, code, err)
		}
		if _, _, code, err := h.Script(ctx, "kill -9 $$"); err != nil || code != 137 {
			t.Errorf("a killed command: %d, %v", code, err)
		}
		if _, _, _, err := h.Run(ctx, "/no/such/program"); err == nil || !strings.Contains(err.Error(), "no such file") {
			t.Errorf("a missing program: %v", err)
		}
	})
	t.Run("megabytes pass unharmed both ways", func(t *testing.T) {
		in := bytes.Repeat([]byte("0123456789abcde\n"), 256<<10)
		var out bytes.Buffer
		began := time.Now()
		code, err := h.Exec(ctx, Command{Argv: []string{"cat"}, Stdin: bytes.NewReader(in), Stdout: &out})
		if err != nil || code != 0 || !bytes.Equal(in, out.Bytes()) {
			t.Errorf("code %d, %v, %d bytes of %d", code, err, out.Len(), len(in))
		}
		t.Logf("%d MiB there and back in %s", len(in)>>20, time.Since(began).Round(time.Millisecond))
	})
	t.Run("files and directories are copied in", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "sub/run.sh"), []byte("#!/bin/sh\necho ran\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("sub/run.sh", filepath.Join(dir, "link")); err != nil {
			t.Fatal(err)
		}
		if err := h.CopyIn(ctx, dir, "/opt/here"); err != nil {
			t.Fatal(err)
		}
		if got := h.Must(t, "/opt/here/link"); got != "ran\n" {
			t.Errorf("got %q", got)
		}
		if err := h.CopyIn(ctx, filepath.Join(dir, "sub/run.sh"), "/opt/one/run"); err != nil {
			t.Fatal(err)
		}
		if got := h.Must(t, "/opt/one/run"); got != "ran\n" {
			t.Errorf("got %q", got)
		}
		if err := h.CopyIn(ctx, filepath.Join(dir, "nothing"), "/opt/x"); err == nil {
			t.Error("a missing file was copied")
		}
	})
	t.Run("a command ends with its context", func(t *testing.T) {
		short, cancel := context.WithCancel(ctx)
		seen := writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })
		if _, err := h.Exec(short, Command{Argv: []string{"sh", "-c", "echo; exec sleep 1234"}, Stdout: seen}); err == nil {
			t.Error("no error")
		}
		h.Must(t, "sh", "-c", "for i in $(seq 100); do pgrep -x sleep -a | grep -q 1234 || exit 0; sleep 0.1; done; exit 1")
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestPowerFailure fails the power of a server that has synced a file, overwritten another without a sync, beyond its own
// page cache, and written a third that no disk has heard of.
func TestPowerFailure(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	h := Start(t, Options{Disk: disk, Loss: rand.New(rand.NewPCG(1, 2))})
	h.Must(t, "sh", "-ec", `
		echo kept >/root/file
		head -c 4M /dev/zero >/root/overwritten
		sync
		head -c 4M /dev/zero | tr '\0' x | dd of=/root/overwritten bs=1M iflag=fullblock oflag=direct conv=notrunc 2>/dev/null
		echo lost >/root/other`)
	cached, lost, err := h.PowerOff()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d pages are lost", lost, cached)
	again := Start(t, Options{Disk: disk})
	if got := again.Must(t, "cat", "/root/file"); got != "kept\n" {
		t.Errorf("what was synced is %q", got)
	}
	const pages = 4 << 20 / cachePage
	if cached < pages || lost < pages/4 || lost > cached*3/4 {
		t.Errorf("%d of %d pages are lost, of at least %d", lost, cached, pages)
	}
	written := strings.Count(again.Must(t, "cat", "/root/overwritten"), strings.Repeat("x", cachePage))
	if written < pages/4 || written > pages*3/4 {
		t.Errorf("%d of %d pages were written, want about a half", written, pages)
	}
	again.Must(t, "sh", "-c", "! test -s /root/other")
}

func TestKeySaysWhatIsInTheRoot(t *testing.T) {
	month := time.Date(2026, 11, 30, 0, 0, 0, 0, time.UTC)
	a, b := key([]string{"a", "b"}, month), key([]string{"a", "c"}, month)
	if a == b {
		t.Error("other packages, same key")
	}
	if a == key([]string{"a", "b"}, month.AddDate(0, 0, 1)) {
		t.Error("other month, same key")
	}
	if !strings.HasSuffix(a, "-2026-11") {
		t.Error(a)
	}
}

func TestSweepLeavesWhatIsUsed(t *testing.T) {
	cache := t.TempDir()
	old := time.Now().Add(-kept - time.Hour)
	for _, name := range []string{"emuhost-a-2026-11.making-1", "emuhost-b-2026-11.making-2", "emuhost-new", "emuhost-old"} {
		path := filepath.Join(cache, name, rootDisk)
		if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if name == "emuhost-old" {
			if err := os.Chtimes(path, old, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(cache, "emuhost-a-2026-11.lock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := sweep(cache, "emuhost-a-2026-11"); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(cache, "*"))
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, path := range left {
		names = append(names, filepath.Base(path))
	}
	// The other base's half may be in the making, under a lock of its own.
	if got := strings.Join(names, " "); got != "emuhost-a-2026-11.lock emuhost-b-2026-11.making-2 emuhost-new" {
		t.Errorf("left: %s", got)
	}
}
