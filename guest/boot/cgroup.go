package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// cgroupRoot is where the guest's cgroup v2 hierarchy is mounted.
const cgroupRoot = "/sys/fs/cgroup"

// cgroup is a control group, so that all that a program started can be ended: a process can leave its session and its parent, but
// not its cgroup, whose files only root outside of the sandbox can write.
type cgroup struct{ path string }

// newCgroup makes the control group if it isn't there.
func newCgroup(name string) (*cgroup, error) {
	g := &cgroup{filepath.Join(cgroupRoot, name)}
	if err := os.Mkdir(g.path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("cannot make a control group: %w", err)
	}
	return g, nil
}

// place makes cmd start in the group. The caller closes the returned file when cmd is started, or isn't to be.
func (g *cgroup) place(cmd *exec.Cmd) (*os.File, error) {
	dir, err := os.Open(g.path)
	if err != nil {
		return nil, fmt.Errorf("cannot open the control group: %w", err)
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	return dir, nil
}

// kill kills all processes of the group, also those that are being forked.
func (g *cgroup) kill() error {
	if err := os.WriteFile(filepath.Join(g.path, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("cannot kill the processes of %s: %w", g.path, err)
	}
	return nil
}

// populated says whether a process is in the group.
func (g *cgroup) populated() (bool, error) {
	data, err := os.ReadFile(filepath.Join(g.path, "cgroup.events"))
	if err != nil {
		return false, err
	}
	return strings.Contains(string(data), "populated 1"), nil
}

// emptyTime is how long killed processes may take to be gone: one can be in the middle of a write.
const emptyTime = 5 * time.Second

// empty kills all processes of the group and waits until they are gone.
func (g *cgroup) empty() error {
	for deadline := time.Now().Add(emptyTime); ; time.Sleep(5 * time.Millisecond) {
		some, err := g.populated()
		if err != nil || !some {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes of %s do not end", g.path)
		}
		if err := g.kill(); err != nil {
			return err
		}
	}
}
