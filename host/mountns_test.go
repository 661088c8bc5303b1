package host

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// mountTest makes the test its own child, with the directory to mount on.
const mountTest = "CLAWVM_TEST_MOUNT"

// TestEnterMountNamespace looks, for each way to start a supervisor, that what it
// mounts stays its own.
func TestEnterMountNamespace(t *testing.T) {
	if dir := os.Getenv(mountTest); dir != "" {
		enterAndMount(dir)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("not root: mounting needs it")
	}
	here, err := mountNamespace()
	if err != nil {
		t.Fatal(err)
	}
	for name, start := range map[string]struct {
		env   string
		flags uintptr
	}{
		"by a unit":              {},
		"by Launch":              {privateMounts + "=" + here, syscall.CLONE_NEWNS},
		"with a variable's lie":  {privateMounts + "=" + here, 0},
		"in another one already": {"", syscall.CLONE_NEWNS},
	} {
		t.Run(name, func(t *testing.T) {
			dir := sharedDir(t)
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(self, "-test.run", "^TestEnterMountNamespace$")
			cmd.Env = append(os.Environ(), mountTest+"="+dir, start.env)
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: start.flags}
			out, err := cmd.CombinedOutput()
			said, _, _ := strings.Cut(string(out), "\n")
			if err != nil || !strings.HasPrefix(said, "in mnt:[") {
				t.Fatalf("%v: %s", err, out)
			}
			if said == "in "+here {
				t.Errorf("it stayed in the namespace %s", here)
			}
			if _, err := os.Stat(filepath.Join(dir, "mine")); !os.IsNotExist(err) {
				t.Errorf("its mount is seen outside (%v)", err)
			}
		})
	}
}

// sharedDir is a directory below a mount that passes on what is mounted in it, as
// systemd makes all of the host's.
func sharedDir(t *testing.T) string {
	t.Helper()
	top := t.TempDir()
	if err := unix.Mount("tmpfs", top, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(top, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", top, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(top, "dir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func enterAndMount(dir string) {
	err := EnterMountNamespace()
	if err == nil {
		err = unix.Mount("tmpfs", dir, "tmpfs", 0, "")
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "mine"), nil, 0o600)
	}
	var here string
	if err == nil {
		here, err = mountNamespace()
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("in", here)
}
