// Package emuhost boots a whole Debian 13 server under emulation for tests: systemd, a kernel of its own and a working
// /dev/kvm, on a machine that may have no hardware virtualisation. QEMU emulates AMD's SVM, so that KVM
// guests run inside. There is no network; what a test needs it copies in, and runs there as root.
//
// The server's root is made once a month by mmdebstrap and kept below CLAWVM_TEST_CACHE (/var/cache/clawvm-test). QEMU comes
// out of that root too, with its libraries, since older ones (7.2, Debian 12's) crash new kernels under
// emulation; nothing is installed on the machine.
package emuhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// ErrUnavailable is what Prepare's error is when this machine cannot make an emulated host: the test skips with it.
var ErrUnavailable = errors.New("no emulated host here")

// BootLimit bounds the time from QEMU's start until the host answers. Alone it takes 15 s on two cores; what else runs there
// can make it several times that.
const BootLimit = 4 * time.Minute

// prepareLimit bounds the making of the root: a minute, and the download.
const prepareLimit = 15 * time.Minute

// Options describe the emulated server. The zero value is a server with a CPU and 3 GiB.
type Options struct {
	Packages []string // Debian packages over DefaultPackages; each other set is a root of its own in the cache
	VCPUs    int      // 0: 1; see oneCPU
	MemoryMB int      // 0: 3072

	// Disk keeps what the server writes: a path, made as a copy of the root if it isn't there. Boot it again
	// after Close or Kill, and it is as after a reboot or a power failure. "": everything is forgotten.
	Disk string

	// Loss gives the disk a volatile write cache, as real ones have, and draws what Kill loses of it: about half of the pages
	// that the server has not flushed, whichever was written first. nil: Kill loses what the server had not given
	// to its disk yet, and no more. It takes a Disk.
	Loss *rand.Rand

	// Slow makes a second of the server's clock so many of the machine's, for what has time limits that an
	// emulated processor doesn't keep. It takes one CPU and Debian's libfaketime on the machine. 0: the machine's time.
	Slow int

	Console io.Writer // gets the server's serial console; nil: only its end is kept, for messages
}

// DefaultPackages are what every root holds beside the essential ones: what clawvm may use on a server.
var DefaultPackages = []string{
	"ca-certificates", "curl", "dbus", "e2fsprogs", "iproute2", "iptables", "kmod", "linux-image-cloud-amd64",
	"mmdebstrap", "nftables", "procps", "qemu-system-x86", "systemd", "systemd-sysv", "udev", "uidmap",
	"util-linux", "virtiofsd", "zstd",
}

// Start boots a server for one test and shuts it down after it. It skips the test where there can be none, and
// shows the end of the console when the test fails.
func Start(t testing.TB, o Options) *Host {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), prepareLimit)
	defer cancel()
	base, err := Prepare(ctx, o.Packages)
	if errors.Is(err, ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	h, err := base.Boot(ctx, o)
	if errors.Is(err, ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the emulated host's console:\n%s", h.ConsoleTail())
		}
		if err := h.Close(); err != nil {
			t.Errorf("cannot end the emulated host: %v", err)
		}
	})
	return h
}

// Must is Run for a test: it fails the test when the command cannot be run or ends with another code than 0, and
// returns its standard output.
func (h *Host) Must(t testing.TB, argv ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	stdout, stderr, code, err := h.Run(ctx, argv...)
	if err != nil || code != 0 {
		t.Fatalf("in the emulated host: %q: code %d, %v\n%s%s", argv, code, err, stdout, stderr)
	}
	return stdout
}

// commandLimit bounds Must's commands.
const commandLimit = 2 * time.Minute

// oneCPU is what a server has unless more are asked for. With two, which QEMU emulates in threads of their own, one of 36
// guests inside hung for good before it said anything, on a machine that did nothing else; with one, none of 84, and their
// starts take a tenth longer.
const oneCPU = 1

func (o *Options) fill() error {
	if o.VCPUs == 0 {
		o.VCPUs = oneCPU
	}
	if o.MemoryMB == 0 {
		o.MemoryMB = 3072
	}
	if o.Slow != 0 {
		if _, err := os.Stat(slowClock); err != nil {
			return fmt.Errorf("%w: Debian's package libfaketime, which makes the server's clock slow, is not installed: %w", ErrUnavailable, err)
		}
		o.VCPUs = 1 // see slowClock
	}
	if o.Loss != nil && o.Disk == "" {
		return errors.New("cannot lose power on a disk that is not kept: name a Disk")
	}
	if o.Slow < 0 || o.VCPUs < 0 || o.MemoryMB < 512 {
		return fmt.Errorf("cannot emulate a host with %d CPUs and %d MiB, %d times slower", o.VCPUs, o.MemoryMB, o.Slow)
	}
	return nil
}
