package host

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cgroup is a directory of the cgroup v2 tree. What is done to it is a file
// written or read. The libraries for it (containerd/cgroups, opencontainers/cgroups)
// turn controllers on all the way from the root down, which is the service
// manager's to do above what it delegates, and bring eBPF along for devices.
type cgroup string

// cgroupMount is where cgroup v2 is mounted where nothing else is (systemd's
// unified hierarchy, and every distribution's since 2022).
const cgroupMount cgroup = "/sys/fs/cgroup"

// sub is a cgroup below.
func (g cgroup) sub(name string) cgroup { return cgroup(filepath.Join(string(g), name)) }

// parent is the cgroup above.
func (g cgroup) parent() cgroup { return cgroup(filepath.Dir(string(g))) }

// name is the last part of its path.
func (g cgroup) name() string { return filepath.Base(string(g)) }

// path is the cgroup as /proc/PID/cgroup names it.
func (g cgroup) path() string {
	return "/" + strings.Trim(strings.TrimPrefix(string(g), string(cgroupMount)), "/")
}

// make makes the cgroup, which may be there.
func (g cgroup) make() error {
	if err := os.Mkdir(string(g), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// write writes a value to one of the cgroup's files. The kernel takes or refuses
// it as a whole.
func (g cgroup) write(file, value string) error {
	f, err := os.OpenFile(filepath.Join(string(g), file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cannot write %q: %w", value, err)
	}
	return nil
}

func (g cgroup) read(file string) (string, error) {
	b, err := os.ReadFile(filepath.Join(string(g), file))
	return strings.TrimSpace(string(b)), err
}

// has says whether the cgroup has a file, which is whether its controller is on
// and the kernel knows of it.
func (g cgroup) has(file string) bool {
	_, err := os.Stat(filepath.Join(string(g), file))
	return err == nil
}

// count reads a file of one number; max, which stands for no limit, is -1.
func (g cgroup) count(file string) (int64, error) {
	text, err := g.read(file)
	if err != nil {
		return 0, err
	}
	if text == "max" {
		return -1, nil
	}
	return strconv.ParseInt(text, 10, 64)
}

// counts reads a file of names and numbers, such as memory.events.
func (g cgroup) counts(file string) (map[string]int64, error) {
	text, err := g.read(file)
	if err != nil {
		return nil, err
	}
	return parseCounts(text), nil
}

// parseCounts reads lines of a name and a number (the kernel's "flat keyed"
// files); other lines are left out.
func parseCounts(text string) map[string]int64 {
	all := map[string]int64{}
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		if name, number, ok := strings.Cut(s.Text(), " "); ok {
			if n, err := strconv.ParseInt(number, 10, 64); err == nil {
				all[name] = n
			}
		}
	}
	return all
}

// join moves a process into the cgroup, with all of its threads.
func (g cgroup) join(pid int) error { return g.write("cgroup.procs", strconv.Itoa(pid)) }

// processes are those in the cgroup itself, by the numbers of this process's
// namespace.
func (g cgroup) processes() ([]int, error) {
	text, err := g.read("cgroup.procs")
	if err != nil {
		return nil, err
	}
	var pids []int
	for line := range strings.FieldsSeq(text) {
		pid, err := strconv.Atoi(line)
		if err != nil {
			return nil, fmt.Errorf("%s names a process %q", g, line)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// controllers are those that the cgroup has.
func (g cgroup) controllers() ([]string, error) {
	text, err := g.read("cgroup.controllers")
	return strings.Fields(text), err
}

// enable turns controllers on for the cgroups below.
func (g cgroup) enable(controllers []string) error {
	text, err := g.read("cgroup.subtree_control")
	if err != nil {
		return err
	}
	have := strings.Fields(text)
	var turn []string
	for _, c := range controllers {
		if !slices.Contains(have, c) {
			turn = append(turn, "+"+c)
		}
	}
	if len(turn) == 0 {
		return nil
	}
	return g.write("cgroup.subtree_control", strings.Join(turn, " "))
}

// delegated says whether the service manager has handed the cgroup over, which it
// marks so (systemd, "Control Group APIs and Delegation").
func (g cgroup) delegated() bool {
	value := make([]byte, 8)
	for _, attribute := range []string{"trusted.delegate", "user.delegate"} {
		if n, err := unix.Getxattr(string(g), attribute, value); err == nil && string(value[:n]) == "1" {
			return true
		}
	}
	return false
}

const (
	cgroupWait = 10 * time.Second     // a killed process in uninterruptible sleep needs this at most
	cgroupPoll = 5 * time.Millisecond // between tries to remove one
)

// remove kills what is in the cgroup and below, and removes all of it. One that
// isn't there is no error.
func (g cgroup) remove() error {
	if _, err := os.Stat(string(g)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := g.write("cgroup.kill", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot end what is in the cgroup %s: %w", g.path(), err)
	}
	for deadline := time.Now().Add(cgroupWait); ; {
		err := g.removeEmpty()
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			if err != nil {
				return fmt.Errorf("cannot remove the cgroup %s: %w", g.path(), Bare(err))
			}
			return nil
		}
		time.Sleep(cgroupPoll)
	}
}

// removeEmpty removes the cgroup and those below; EBUSY where there are processes.
func (g cgroup) removeEmpty() error {
	entries, err := os.ReadDir(string(g))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := g.sub(e.Name()).removeEmpty(); err != nil {
				return err
			}
		}
	}
	if err := syscall.Rmdir(string(g)); err != nil && err != syscall.ENOENT {
		return &fs.PathError{Op: "rmdir", Path: string(g), Err: err}
	}
	return nil
}

// cgroupOf is the cgroup v2 that a process is in.
func cgroupOf(pid int) (cgroup, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	path, ok := parseCgroup(b)
	if !ok {
		return "", fmt.Errorf("process %d is in no cgroup v2", pid)
	}
	return cgroupMount.sub(path), nil
}

// parseCgroup finds the cgroup v2's path in a /proc/PID/cgroup (cgroups(7)).
func parseCgroup(b []byte) (string, bool) {
	for line := range bytes.Lines(b) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "0::"); ok {
			return path, strings.HasPrefix(path, "/")
		}
	}
	return "", false
}

// mounted says whether cgroup v2 is where it is looked for.
func (g cgroup) mounted() bool {
	var st unix.Statfs_t
	return unix.Statfs(string(g), &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}
