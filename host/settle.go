package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settlePoll is how often the parts of a VM that ends are looked at: the
// supervisor hears of an end in a millisecond, or as soon as the kernel has taken
// the process down.
const settlePoll = 5 * time.Millisecond

// settled is the VM's status, once it is that of parts which run. One that was
// killed a moment ago is noticed at its own pace, and whoever brings the VM up must
// not be told of a ready that is over.
func (s *Supervisor) settled(ctx context.Context) Status {
	tick := time.NewTicker(settlePoll)
	defer tick.Stop()
	for {
		s.mu.Lock()
		st, parts := s.status, s.parts
		s.mu.Unlock()
		if !st.State.up() || !slices.ContainsFunc(parts, ending) {
			return st
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return st
		}
	}
}

// up says whether the VM was ready, and has not ended since.
func (s State) up() bool { return s == Running || s == Paused }

// isUp notes that the VM is ready, and what it is made of from now on.
func (l *life) isUp() {
	parts := []int{l.instance.PID(), l.gate.cmd.Process.Pid}
	for _, d := range l.daemons {
		parts = append(parts, d.PID())
	}
	now := time.Now().UTC()
	l.mu.Lock()
	l.parts = parts
	l.mu.Unlock()
	l.update(func(st *Status) { st.State, st.Step, st.Ready, st.Since = Running, "", now, now })
}

// over notes that a VM which was up is not any more, however it ends. Who comes to
// follow from now on is not told of the ready that is over.
func (l *life) over() {
	if !l.Status().State.up() {
		return
	}
	l.journal.restart()
	l.update(func(st *Status) { st.State, st.Step = Stopping, "" })
}

// Places in /proc/PID/stat after the command's name, and what they hold
// (proc_pid_stat(5), fields 9 and 31; PF_EXITING of the kernel's sched.h).
const (
	statFlags   = 6
	statPending = 28
	flagExiting = 0x4
	killPending = 1 << (unix.SIGKILL - 1)
)

// ending says whether a child of this process has ended, or can do nothing any more
// but end: it may take the kernel long to give back a guest's memory. Of one that
// /proc hides, as in clawvm@.service those of other users, only the end is seen.
func ending(pid int) bool {
	var info unix.Siginfo
	// WNOWAIT: its end is for whoever waits for it to see.
	err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if errors.Is(err, unix.ECHILD) || err == nil && info.Signo != 0 {
		return true
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && endingStat(string(raw))
}

// endingStat reads the same from a /proc/PID/stat.
func endingStat(stat string) bool {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) <= statPending {
		return false
	}
	has := func(field int, bits uint64) bool {
		n, err := strconv.ParseUint(fields[field], 10, 64)
		return err == nil && n&bits != 0
	}
	return has(statFlags, flagExiting) || has(statPending, killPending)
}
