// Package boot is the guest's init: it sets the guest up as its boot document says, runs the workload and the agent, and ends the
// guest.
package boot

import (
	"fmt"
	"os"
	"runtime/debug"
)

// Main is the init's main function: PID 1's, or that of a process which the init started to become a program. It returns an exit
// code; as PID 1 it returns only when the guest could not be ended.
func Main() int {
	if len(os.Args) == 1 && os.Args[0] == stageName {
		return runStage()
	}
	if len(os.Args) == 2 && os.Args[0] == copyName {
		return runCopy(os.Args[1])
	}
	if os.Getpid() != 1 {
		fmt.Fprintf(os.Stderr, "clawvm-init %s is the first process of a clawvm guest; it does nothing else\n", version())
		return 2
	}
	return runInit()
}

// warn says on the console what went wrong without being the end.
func warn(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "clawvm-init: "+format+"\n", args...)
}

// version is what the build says about itself.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}
