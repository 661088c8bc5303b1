package host

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// testCgroup makes a cgroup of cgroup v2, with the leaves of a VM's, until the test's
// end. Controllers are not needed for that.
func testCgroup(t *testing.T) cgroup {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: cgroups are root's")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var at string
	for line := range strings.Lines(string(mounts)) {
		about, what, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(about); strings.HasPrefix(what, "cgroup2 ") && at == "" {
			at = fields[4]
		}
	}
	if at == "" {
		t.Skip("cgroup v2 is not mounted")
	}
	g := cgroup(at).sub(fmt.Sprintf("clawvm-test-%d", os.Getpid()))
	if err := g.make(); err != nil {
		t.Skipf("cgroup v2 is not this test's to change: %v", err)
	}
	t.Cleanup(func() {
		if err := g.remove(); err != nil {
			t.Error(err)
		}
	})
	for _, leaf := range []string{supervisorLeaf, vmLeaf} {
		if err := g.sub(leaf).make(); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

// TestProcessesAreHeldInTheirCgroup: whether a process can be born in its cgroup or
// has to be moved there, it and its own children are in it, and nobody else is.
func TestProcessesAreHeldInTheirCgroup(t *testing.T) {
	g := testCgroup(t)
	vm := g.sub(vmLeaf)
	if !bornInCgroup() {
		t.Skip("this process may not call clone3(2)")
	}
	was := bornInCgroup
	t.Cleanup(func() { bornInCgroup = was })
	// Of another process group, as all children of a supervisor are of one each.
	bystander := exec.Command("sleep", "1000")
	bystander.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := g.sub(supervisorLeaf).hold(bystander, bystander.Start); err != nil {
		t.Fatal(err)
	}
	defer bystander.Wait()
	defer bystander.Process.Kill()
	for _, born := range []bool{true, false} {
		t.Run(fmt.Sprintf("born there: %t", born), func(t *testing.T) {
			bornInCgroup = func() bool { return born }
			cmd := exec.Command("sh", "-c", "sleep 1000 & echo $!; wait")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var child int
			err = vm.hold(cmd, func() error {
				if !born { // as its parent, the supervisor, is
					dir, err := os.Open(string(g.sub(supervisorLeaf)))
					if err != nil {
						return err
					}
					defer dir.Close()
					cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
				}
				if err := cmd.Start(); err != nil {
					return err
				}
				line, err := bufio.NewReader(out).ReadString('\n')
				if err != nil {
					return err
				}
				child, err = strconv.Atoi(strings.TrimSpace(line))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			got, err := vm.processes()
			if err != nil {
				t.Fatal(err)
			}
			want := []int{cmd.Process.Pid, child}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("the cgroup holds %v, want %v", got, want)
			}
			if beside, err := g.sub(supervisorLeaf).processes(); err != nil || !slices.Equal(beside, []int{bystander.Process.Pid}) {
				t.Errorf("beside it there are %v (%v), want %d", beside, err, bystander.Process.Pid)
			}
			if err := unix.Kill(-cmd.Process.Pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := ignoreExit(cmd.Wait()); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("where it can't be held, it doesn't run", func(t *testing.T) {
		bornInCgroup = func() bool { return false }
		cmd := exec.Command("sleep", "1000")
		if err := g.sub("missing").hold(cmd, cmd.Start); err == nil {
			t.Error("held in a cgroup that isn't there")
		}
		if cmd.ProcessState == nil || cmd.ProcessState.Exited() {
			t.Errorf("the process is %v", cmd.ProcessState)
		}
	})
}
