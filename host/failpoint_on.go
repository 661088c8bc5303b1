//go:build failpoints

package host

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// The environment of a program that is built to fail.
const (
	// failpointVariable says what happens where: "fail before lease", "kill after
	// undo of the port", "run before sockets". "tell" writes each point, when it is
	// passed, to standard error.
	failpointVariable = "CLAWVM_FAILPOINT"
	// failpointCommand is the shell command that "run" runs.
	failpointCommand = "CLAWVM_FAILPOINT_COMMAND"
)

// errMadeToFail is the error of a failpoint.
var errMadeToFail = errors.New("made to fail")

func failpoint(when, what string) error {
	point := when + " " + what
	action, at, _ := strings.Cut(os.Getenv(failpointVariable), " ")
	switch {
	case action == "tell":
		fmt.Fprintf(os.Stderr, "failpoint: %s\n", point)
	case at != point:
	case action == "fail":
		return errMadeToFail
	case action == "kill":
		return syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case action == "run":
		return exec.Command("sh", "-c", os.Getenv(failpointCommand)).Run()
	}
	return nil
}
