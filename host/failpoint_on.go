//go:build failpoints

package host

import (
	"errors"
	"os"
	"syscall"
)

// failpointVariable says what fails where: "fail before lease", "fail after undo
// of the port", "kill after rules".
const failpointVariable = "CLAWVM_FAILPOINT"

// errMadeToFail is the error of a failpoint.
var errMadeToFail = errors.New("made to fail by " + failpointVariable)

func failpoint(when, what string) error {
	switch os.Getenv(failpointVariable) {
	case "fail " + when + " " + what:
		return errMadeToFail
	case "kill " + when + " " + what:
		return syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	return nil
}
