package cloudhypervisor

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/clawvm/clawvm/vmm"
)

// ending is all that is known of how a process ended.
type ending struct {
	panicked   string // the guest's panic, as the event's property says it; "" for none
	rebooting  bool   // the guest asked for a reset, and we killed the process for it
	poweredOff bool   // the guest turned itself off, and the process that was left over was ended
	broken     error  // the events could not be understood, and we killed the process for it
	asked      bool   // Stop or Kill were called before any of these

	code   int
	signal syscall.Signal
	stderr string // the end of it
}

// of takes the exit code or signal out of a process's state.
func (e *ending) of(state *os.ProcessState) {
	e.code = state.ExitCode()
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		e.signal = status.Signal()
	}
}

// vmmFault are words on standard error of a process that broke; it can end with code 0 all the same, since a thread
// that panics asks the others for an orderly end.
var vmmFault = []string{"panicked at", "seccomp violation", "chain of errors"}

// exit says how it ended. What the guest did comes before what was asked of the VMM, and both before the exit code, which is 0 for
// a guest's poweroff, SIGTERM and a thread's panic alike.
func (e *ending) exit() vmm.Exit {
	x := vmm.Exit{Code: e.code, Signal: e.signal}
	fault := false
	for _, words := range vmmFault {
		fault = fault || strings.Contains(e.stderr, words)
	}
	switch {
	// The process was only killed for what the guest did, so that its signal says nothing.
	case e.panicked != "":
		return vmm.Exit{Reason: vmm.ExitPanicked, Detail: "the guest's kernel panicked (" + vmm.Plain(e.panicked) + ")"}
	case e.rebooting:
		return vmm.Exit{Reason: vmm.ExitRebooted, Detail: "the guest asked for a reset"}
	case e.poweredOff:
		return vmm.Exit{Reason: vmm.ExitPoweredOff, Detail: "the guest turned itself off"}
	case e.asked:
		x.Reason = vmm.ExitKilled
	case e.broken != nil:
		x.Reason, x.Detail = vmm.ExitFailed, e.broken.Error()
	case e.signal == syscall.SIGSYS:
		x.Reason, x.Detail = vmm.ExitFailed, "cloud-hypervisor made a system call that its own filter forbids"
	case fault, e.code > 0, e.signal != 0 && !outside(e.signal):
		x.Reason, x.Detail = vmm.ExitFailed, "cloud-hypervisor broke"
	case e.signal != 0:
		x.Reason, x.Detail = vmm.ExitKilled, fmt.Sprintf("somebody sent cloud-hypervisor the signal %s, or the host ran out of memory", e.signal)
	default:
		// A guest's poweroff leaves the process running (--no-shutdown), so code 0 is SIGTERM or SIGINT.
		x.Reason, x.Detail = vmm.ExitKilled, "somebody asked cloud-hypervisor to end"
	}
	if x.Reason == vmm.ExitFailed && e.stderr != "" {
		x.Detail += "; it said: " + e.stderr
	}
	return x
}

// outside tells signals that somebody sends from those that a process brings upon itself.
func outside(s syscall.Signal) bool {
	switch s {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT:
		return true
	}
	return false
}
