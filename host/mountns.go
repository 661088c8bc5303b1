package host

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// privateMounts is the environment variable that says that the process is in its
// own mount namespace already.
const privateMounts = "CLAWVM_PRIVATE_MOUNTS"

// EnterMountNamespace puts the process into a mount namespace of its own and
// starts the program anew in it, under the same pid. What the supervisor mounts
// there (secrets, read-only views of shares) is out of the sight of other
// processes and vanishes with the VM's last process, whatever kills them. What
// the host mounts and unmounts still arrives (slave propagation), so that a VM
// keeps no host file system busy.
//
// It returns only in the new namespace, or with an error.
func EnterMountNamespace() error {
	if os.Getenv(privateMounts) == "1" {
		return os.Unsetenv(privateMounts)
	}
	// unshare(2) works on the calling thread alone; exec(2) makes that thread
	// the whole process and ends the others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("cannot make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cannot keep mounts to this process: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find the program's own file: %w", err)
	}
	err = unix.Exec(self, os.Args, append(os.Environ(), privateMounts+"=1"))
	return fmt.Errorf("cannot start %s in its own mount namespace: %w", self, err)
}
