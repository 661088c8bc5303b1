package gate

import (
	"fmt"

	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// confine gives up what the gate does not need: it can gain no privileges by
// exec, leaves no core, and can open files only below the log directory. Which
// of Landlock's rules apply depends on the kernel (none before 5.13); the uid
// without capabilities is what holds everywhere.
func confine(logs string) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid new privileges: %w", err)
	}
	// Not dumpable: no core file, and no other process of the uid may trace it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid core dumps: %w", err)
	}
	if err := landlock.V5.BestEffort().RestrictPaths(landlock.RWDirs(logs)); err != nil {
		return fmt.Errorf("cannot confine the gate to its log directory: %w", err)
	}
	return nil
}
