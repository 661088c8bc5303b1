package qemu

import (
	"cmp"
	"fmt"
	"syscall"

	"github.com/clawvm/clawvm/vmm"
)

// Reasons of QMP's event SHUTDOWN (qapi/run-state.json).
const (
	reasonPowerOff = "guest-shutdown"
	reasonReset    = "guest-reset"
	reasonPanic    = "guest-panic"
	reasonQuit     = "host-qmp-quit"
	reasonSignal   = "host-signal"
)

// ending is what is known when QEMU has ended.
type ending struct {
	panicked bool   // QEMU said so
	reason   string // of its last SHUTDOWN, "" for none
	asked    bool   // by Stop or Kill
	status   syscall.WaitStatus
	said     string // the end of its standard error
}

// exit classifies an ending. QEMU's exit code alone says nothing: it is 0 for a guest's power-off, reset and
// panic alike.
func (e ending) exit() vmm.Exit {
	x := vmm.Exit{Code: -1}
	if e.status.Exited() {
		x.Code = e.status.ExitStatus()
	}
	if e.status.Signaled() {
		x.Signal = e.status.Signal()
	}
	switch {
	case e.panicked || e.reason == reasonPanic:
		x.Reason, x.Detail = vmm.ExitPanicked, "the guest's kernel panicked"
	case e.reason == reasonPowerOff:
		x.Reason = vmm.ExitPoweredOff
	case e.reason == reasonReset:
		x.Reason = vmm.ExitRebooted
	case e.asked, e.reason == reasonQuit:
		x.Reason = vmm.ExitKilled
	case e.reason == reasonSignal:
		x.Reason, x.Detail = vmm.ExitKilled, cmp.Or(e.said, "by a signal")
	case endsBySomebody(x.Signal):
		x.Reason, x.Detail = vmm.ExitKilled, e.said
	default:
		x.Reason, x.Detail = vmm.ExitFailed, e.said
		if x.Detail == "" {
			x.Detail = "QEMU said nothing"
			if e.reason != "" {
				x.Detail = fmt.Sprintf("QEMU shut down for %q", e.reason)
			}
		}
	}
	return x
}

// endsBySomebody says whether a signal is one that people, supervisors and the kernel when memory runs out end
// processes by; others are a program's own fault.
func endsBySomebody(s syscall.Signal) bool {
	switch s {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT:
		return true
	}
	return false
}
