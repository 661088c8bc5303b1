package storage

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// Marks of the processes that the tests start from their own binary.
const (
	namespaceMark = "CLAWVM_TEST_NAMESPACE" // this process has a mount namespace of its own
	serveMark     = "CLAWVM_TEST_SERVE"     // this process serves a share and waits to be killed
)

// TestMain gives root's tests a mount namespace of their own, so that whatever
// they mount is nobody else's and goes with them.
func TestMain(m *testing.M) {
	if os.Getenv(serveMark) != "" {
		os.Exit(serveUntilKilled())
	}
	if os.Geteuid() != 0 || os.Getenv(namespaceMark) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	for fd := uintptr(3); fd < 6; fd++ { // go test's own, for fuzzing
		var st syscall.Stat_t
		if syscall.Fstat(int(fd), &st) == nil && st.Mode&syscall.S_IFMT == syscall.S_IFIFO {
			cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(fd, fmt.Sprint("fd", fd)))
		}
	}
	cmd.Env = append(os.Environ(), namespaceMark+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot run the tests in a mount namespace:", err)
		os.Exit(1)
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes files of other owners, mounts or namespaces")
	}
}

// eventually waits until something holds, for as long as a loaded machine takes.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-deadline.C:
			t.Fatalf("waited in vain until %s", what)
		case <-tick.C:
		}
	}
}

// smallFS mounts a tmpfs of the given size and returns its directory.
func smallFS(t testing.TB, size int64) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	if err := MountTmpfs(dir, size, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
