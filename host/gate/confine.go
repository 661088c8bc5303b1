package gate

import (
	"fmt"

	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// confine gives up what the gate does not need: it can gain no privileges by
// exec, leaves no core, can open files only below the log directory, can connect
// by TCP only to name servers and to the published ports' targets, and makes no
// system call that it has no use for. Which of Landlock's rules apply depends on
// the kernel (files from 5.13, TCP from 6.7); the uid without capabilities and
// the filter of system calls hold everywhere.
func confine(c Config) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid new privileges: %w", err)
	}
	// Not dumpable: no core file, and no other process of the uid may trace it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid core dumps: %w", err)
	}
	rules := []landlock.Rule{landlock.RWDirs(c.Logs)}
	for _, u := range c.Upstreams {
		rules = append(rules, landlock.ConnectTCP(u.Port()))
	}
	for _, p := range c.Ports {
		rules = append(rules, landlock.ConnectTCP(p.Guest))
	}
	if err := landlock.V5.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("cannot confine the gate: %w", err)
	}
	return restrictCalls()
}
