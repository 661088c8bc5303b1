package boot

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
	"golang.org/x/sys/unix"
)

// Real-time signals that systemd's tools send to PID 1, counted from SIGRTMIN as C libraries do.
const (
	sigHalt     = syscall.Signal(34 + 3)
	sigPowerOff = syscall.Signal(34 + 4)
	sigReboot   = syscall.Signal(34 + 5)
)

// endSignals are the signals by which the usual commands ask PID 1 to end the system. busybox: reboot sends TERM, poweroff USR2, halt
// USR1. The kernel sends INT for Ctrl-Alt-Del, power supplies' programs PWR. A guest that halted would only keep its memory, so it
// powers off.
var endSignals = map[os.Signal]string{
	syscall.SIGTERM: agent.ReasonReboot,
	syscall.SIGINT:  agent.ReasonReboot,
	sigReboot:       agent.ReasonReboot,
	syscall.SIGUSR1: agent.ReasonPowerOff,
	syscall.SIGUSR2: agent.ReasonPowerOff,
	syscall.SIGPWR:  agent.ReasonPowerOff,
	sigHalt:         agent.ReasonPowerOff,
	sigPowerOff:     agent.ReasonPowerOff,
}

// watchSignals calls end for each of the signals.
func watchSignals(end func(reason string)) error {
	c := make(chan os.Signal, 4)
	for s := range endSignals {
		signal.Notify(c, s)
	}
	go func() {
		for s := range c {
			end(endSignals[s])
		}
	}()
	// Without this the kernel reboots at Ctrl-Alt-Del by itself.
	return unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
}

// An input event of a 64-bit kernel: a time of 16 bytes, type, code and value.
const (
	inputEventSize = 24
	eventKey       = 1
	keyPower       = 116
)

// buttonTime is how long the power button's device may take to appear after its driver was loaded.
const buttonTime = 10 * time.Second

// watchPowerButton calls pressed for each press of the machine's power button. A machine without one is left alone.
func watchPowerButton(pressed func()) {
	var paths []string
	err := waitFor(buttonTime, func() error {
		names, err := filepath.Glob("/sys/class/input/event*/device/name")
		if err != nil {
			return err
		}
		for _, n := range names {
			name, err := os.ReadFile(n)
			if err == nil && strings.TrimSpace(string(name)) == "Power Button" {
				paths = append(paths, "/dev/input/"+filepath.Base(filepath.Dir(filepath.Dir(n))))
			}
		}
		if len(paths) == 0 {
			return errors.New("there is no power button")
		}
		return nil
	})
	if err != nil {
		return
	}
	for _, p := range paths {
		go func() {
			f, err := os.Open(p)
			if err == nil {
				err = errors.Join(readButton(f, pressed), f.Close())
			}
			if err != nil {
				warn("cannot watch the power button: %v", err)
			}
		}()
	}
}

func readButton(r io.Reader, pressed func()) error {
	var e [inputEventSize]byte
	for {
		if _, err := io.ReadFull(r, e[:]); err != nil {
			return err
		}
		kind, code := binary.NativeEndian.Uint16(e[16:]), binary.NativeEndian.Uint16(e[18:])
		if value := binary.NativeEndian.Uint32(e[20:]); kind == eventKey && code == keyPower && value == 1 {
			pressed()
		}
	}
}

// Times of the way down.
const (
	drainTime   = 2 * time.Second // for the rest of the workload's log
	deliverTime = 5 * time.Second // for the last event: the host may just be connecting
	leaveTime   = 2 * time.Second // for processes that aren't the workload's, from TERM to KILL
)

// finish tells the host, ends all processes, saves the disks and ends the machine. It returns only when that failed.
func (g *guestInit) finish(e ending) int {
	ctx, cancel := context.WithTimeout(context.Background(), drainTime)
	g.log.Close()
	g.log.Drain(ctx)
	cancel()
	g.board.Post(agent.Event{Kind: agent.Ending, Uptime: uptime(), Reason: e.reason, Code: e.code, Detail: e.detail})
	ctx, cancel = context.WithTimeout(context.Background(), deliverTime)
	defer cancel()
	if g.server != nil && !g.board.Delivered(ctx) {
		warn("the host was not told of the end: %s", e.reason)
	}
	g.endProcesses()
	for _, err := range g.saveDisks() {
		warn("%v", err)
	}
	unix.Sync()
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if e.reason == agent.ReasonReboot {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	if err := unix.Reboot(how); err != nil {
		warn("cannot end the machine: %v", err)
	}
	return 1
}

// endProcesses ends every process but this one, and the kernel's.
func (g *guestInit) endProcesses() {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := syscall.Kill(-1, sig); err != nil {
			warn("cannot end the processes: %v", err)
		}
		err := waitFor(leaveTime, func() error {
			if g.children.some() {
				return errors.New("some processes do not end")
			}
			return nil
		})
		if err == nil {
			return
		}
	}
	warn("some processes do not end")
}

// saveDisks makes the volumes and the overlay's disk read-only and unmounts the volumes, so that nothing of them is left to recover.
func (g *guestInit) saveDisks() (failed []error) {
	if g.box != nil {
		if err := g.box.close(); err != nil { // its namespace holds the mounts, too
			failed = append(failed, err)
		}
	}
	for i := len(g.mounted) - 1; i >= 0; i-- {
		m := g.mounted[i]
		// The workload's namespace has the file system mounted, too, and the kernel takes a namespace down some time after its
		// last process: until then an unmount here ends this mount alone. Made read-only, the file system itself is finished.
		if m.Kind == guest.MountVolume && !m.ReadOnly {
			if err := waitFor(leaveTime, func() error { return unix.Mount("", m.Target, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") }); err != nil {
				failed = append(failed, &os.PathError{Op: "remount", Path: m.Target, Err: err})
			}
		}
		if err := unix.Unmount(m.Target, 0); err != nil && m.Kind == guest.MountVolume {
			failed = append(failed, &os.PathError{Op: "unmount", Path: m.Target, Err: err})
		}
	}
	if g.upper != nil {
		for _, path := range []string{"/", selfFile(g.upper)} {
			if err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				failed = append(failed, &os.PathError{Op: "remount", Path: path, Err: err})
			}
		}
	}
	return failed
}
