package host

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// privateMounts is the environment variable that names the mount namespace of who
// started this process: one that is in another has its own already.
const privateMounts = "CLAWVM_MOUNTS_OF"

// EnterMountNamespace makes sure that the process is in a mount namespace of its
// own. [Launch] starts a supervisor in one; otherwise the program is started anew
// in it, under the same pid. What the supervisor mounts there (secrets, read-only
// views of shares) is out of the sight of other processes and vanishes with the
// VM's last process, whatever kills them. What the host mounts and unmounts still
// arrives (slave propagation), so that a VM keeps no host file system busy.
//
// It returns only in the new namespace, or with an error.
func EnterMountNamespace() error {
	here, err := mountNamespace()
	if err != nil {
		return err
	}
	if from := os.Getenv(privateMounts); from != "" && from != here {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return fmt.Errorf("cannot keep mounts to this process: %w", err)
		}
		return os.Unsetenv(privateMounts)
	}
	// unshare(2) works on the calling thread alone; exec(2) makes that thread
	// the whole process and ends the others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("cannot make a mount namespace: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find the program's own file: %w", err)
	}
	// Not by appending: of two values the first would count.
	if err := os.Setenv(privateMounts, here); err != nil {
		return err
	}
	err = unix.Exec(self, os.Args, append(os.Environ(), noHugePages))
	return fmt.Errorf("cannot start %s in its own mount namespace: %w", self, err)
}

// mountNamespace names the mount namespace that the process is in.
func mountNamespace() (string, error) {
	ns, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return "", fmt.Errorf("cannot tell which mount namespace this is: %w", err)
	}
	return ns, nil
}
