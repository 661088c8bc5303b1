package host

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// holder is what TestEndsAreAwaited runs itself as: a process with a guest's memory
// and a locked disk.
const holder = "CLAWVM_TEST_HOLDER"

func init() {
	path := os.Getenv(holder)
	if path == "" {
		return
	}
	const memory = 256 << 20
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		os.Exit(1)
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		os.Exit(1)
	}
	m, err := unix.Mmap(-1, 0, memory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE)
	if err != nil {
		os.Exit(1)
	}
	os.Stdout.WriteString("held\n")
	os.Stdin.Read(m[:1])
	os.Exit(0)
}

// TestEndsAreAwaited kills a process whose memory takes the kernel longer to give
// back than it takes to look at /proc: it is not gone before its lock is.
func TestEndsAreAwaited(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: the process has another uid")
	}
	const uid = 2999999998
	dir := t.TempDir()
	for d := dir; d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	disk, program := filepath.Join(dir, "disk"), filepath.Join(dir, "holder")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(disk, uid, uid); err != nil {
		t.Fatal(err)
	}
	// The test's own file may lie where the uid can't go.
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(program, self, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		kill func(pid int) error // and what up does then
	}{
		{"by somebody else", func(pid int) error {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				return err
			}
			return awaitEnds(uid)
		}},
		{"by its mark", func(int) error { _, err := killMarked("clawvm:0:holder"); return err }},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(program)
			cmd.Env = []string{holder + "=" + disk, markVariable + "=clawvm:0:holder"}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || strings.TrimSpace(line) != "held" {
				t.Fatalf("%q, %v", line, err)
			}
			if err := awaitEnds(uid); err != nil {
				t.Fatalf("one that lives is waited for: %v", err)
			}
			if err := c.kill(cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			if held, err := locked(disk); err != nil || held {
				t.Errorf("the disk is locked still: %t, %v", held, err)
			}
		})
	}
}

func TestZombieStat(t *testing.T) {
	const head, tail = "123 (a) Z) ", " 0 1 0 0 4 0 0 0 0 0 0 0 0 0 17 0 0 0\n"
	for fields, want := range map[string]bool{
		"Z 1 123 123 0 -1 4194564 90 0 0 0 0 0 0 0 20 0 1": true,
		"Z 1 123 123 0 -1 4194564 90 0 0 0 0 0 0 0 20 0 3": false, // a leader whose threads still end
		"R 1 123 123 0 -1 4194564 90 0 0 0 0 0 0 0 20 0 1": false,
		"S 1": true, // no such file any more
	} {
		if got := zombieStat(head + fields + map[bool]string{true: tail}[fields != "S 1"]); got != want {
			t.Errorf("%s: %t, want %t", fields, got, want)
		}
	}
}
