package kernel

import "strings"

// CmdlineOptions is what a guest kernel's command line depends on.
type CmdlineOptions struct {
	Console  string // the console's device; "" is hvc0, the virtio console
	Emulated bool   // no hardware virtualisation: the guest's processors are translated
	Debug    bool   // all kernel messages on the console
}

// Cmdline is the guest kernel's command line.
//
// It takes speed where nothing is lost by it, and keeps the kernel's hardening where hardware runs the guest:
// mitigations are off only under emulation, where the processor's faults that they are against cannot be reached,
// yet each system call would pay for them. What the distribution switches on (memory cleared on allocation, its
// security modules) stays on: left out alone, none of it was measurable at the start.
func Cmdline(o CmdlineOptions) string {
	console := o.Console
	if console == "" {
		console = "hvc0"
	}
	args := []string{
		"console=" + console,
		// A panic ends the machine at once, by the one way to reset that every VMM has: a triple fault.
		"panic=-1", "reboot=t",
		// Entries that 64-bit programs of this century don't use, and that a sandbox must otherwise guard one by one.
		"ia32_emulation=0", "vsyscall=none",
		// The network card is eth0 for an image's own init too.
		"net.ifnames=0",
		// Mounts, modules and namespaces wait for RCU; in a machine of this size its quick form disturbs nobody.
		"rcupdate.rcu_expedited=1",
		// The self tests of the crypto code are the one of these that shows in the start by itself, when emulated.
		"cryptomgr.notests",
		// Keyboard controller and, below, serial ports: there are none, and looking for them waits for timeouts.
		"i8042.noaux", "i8042.nokbd",
	}
	if !strings.HasPrefix(console, "ttyS") {
		args = append(args, "8250.nr_uarts=0")
	}
	if o.Emulated {
		args = append(args, "mitigations=off",
			// The time stamp counter and the timer interrupt are the emulator's: checking them against each other only finds the
			// host's load.
			"no_timer_check", "tsc=reliable")
	}
	if o.Debug {
		args = append(args, "ignore_loglevel")
	} else {
		args = append(args, "quiet")
	}
	return strings.Join(args, " ")
}
