package world

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// The environment of these tests.
const (
	// envInside says that the process is in namespaces of its own already.
	envInside = "CLAWVM_TEST_INSIDE"
	// envBin is the directory with the built clawvm and clawvm-init; without it
	// the tests build them.
	envBin = "CLAWVM_TEST_BIN"
	// envVMM is the VMM that the table runs under: what a declaration may say.
	envVMM = "CLAWVM_TEST_VMM"
	// envKernels is a directory with kernels/ in it to boot guests with.
	envKernels = "CLAWVM_TEST_KERNELS"
)

// Main runs the tests in network, mount and pid namespaces of their own: whatever
// they bring up is out of the machine's sight, and nothing of it outlives them.
// It is what a TestMain calls, and does not return.
func Main(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(envInside) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envInside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	err := cmd.Run()
	if exit, ok := err.(*exec.ExitError); ok {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot run the tests in namespaces of their own:", err)
		os.Exit(1)
	}
}
