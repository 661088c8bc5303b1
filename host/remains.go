package host

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/network"
)

// statThreads is the place of the number of threads in /proc/PID/stat after the
// command's name (proc_pid_stat(5), field 20).
const statThreads = 17

// awaitEnds waits for the processes of these uids that can do nothing any more but
// end. The kernel takes a process's memory first, and with it the environment that
// carries the mark; then its files, with the locks on a VM's disks and the ports
// that it listened on. With a guest's memory to give back, on a busy host, that takes a
// while, in which nothing says any more whose process it is but its uid.
func awaitEnds(uids ...int) error {
	deadline := time.Now().Add(killWait)
	for {
		pids, err := endingOf(uids)
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v were killed and are still there after %s", pids, killWait)
		}
		time.Sleep(killPoll)
	}
}

// endingOf lists the processes of these uids that end. A zombie has ended: it
// holds nothing.
func endingOf(uids []int) ([]int, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, pid := range all {
		d := fmt.Sprintf("/proc/%d", pid)
		info, err := os.Stat(d)
		if err != nil {
			continue // gone
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || !slices.Contains(uids, int(st.Uid)) {
			continue
		}
		raw, err := os.ReadFile(d + "/stat")
		if exhausted(err) {
			return nil, fmt.Errorf("cannot look for processes: %w", err)
		}
		if err == nil && endingStat(string(raw)) && !zombieStat(string(raw)) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// zombieStat says whether a /proc/PID/stat is that of a process of which nothing is
// left but how it ended. One whose other threads still end has all its files.
func zombieStat(stat string) bool {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) <= statThreads {
		return true
	}
	threads, err := strconv.Atoi(fields[statThreads])
	return strings.Contains("ZX", fields[0]) && (err != nil || threads <= 1)
}

// users are the uids of the VM's earlier life, by the address that it holds.
func (l *life) users() ([]int, error) {
	leases := network.Leases{Dir: l.layout.Leases(), Subnet: l.hostConfig.Address}
	held, ok, err := leases.Lookup(l.name)
	if err != nil || !ok {
		return nil, err
	}
	ids := idsOf(l.hostConfig.UIDBase, leases.Index(held))
	return []int{ids.vmm, ids.gate}, nil
}

// awaitEnd waits until a process that was killed has ended, its files closed.
func awaitEnd(pidfd int, deadline time.Time) error {
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n > 0 {
			return err
		}
	}
}
