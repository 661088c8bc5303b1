package gate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// confineVariable makes the test program a process that confines itself to the
// directory that it names and then says what it may still do.
const confineVariable = "CLAWVM_TEST_CONFINE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(confineVariable); dir != "" {
		os.Exit(confined(dir))
	}
	code := m.Run()
	if builtProgram != "" {
		os.RemoveAll(filepath.Dir(builtProgram))
	}
	os.Exit(code)
}

func confined(logs string) int {
	open, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	target, err := netip.ParseAddrPort(open.Addr().String())
	if err != nil {
		fmt.Println(err)
		return 1
	}
	closed, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if err := confine(Config{Logs: logs, Ports: []Forward{{Guest: target.Port()}}}); err != nil {
		fmt.Println(err)
		return 1
	}
	say := func(what string, err error) {
		verdict := "yes"
		if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
			verdict = "no"
		} else if err != nil {
			verdict = err.Error()
		}
		fmt.Printf("%s: %s\n", what, verdict)
	}
	_, err = os.ReadFile("/etc/hostname")
	say("read elsewhere", err)
	say("write logs", os.WriteFile(filepath.Join(logs, "x"), []byte("x"), 0o600))
	say("run a program", exec.Command("/proc/self/exe").Run())
	say("trace a process", unix.PtraceAttach(os.Getppid()))
	say("make a namespace", unix.Unshare(unix.CLONE_NEWUSER))
	_, err = unix.MemfdCreate("x", 0)
	say("make a file in memory", err)
	dial := func(to net.Listener) error {
		c, err := net.Dial("tcp4", to.Addr().String())
		if err == nil {
			err = c.Close()
		}
		return err
	}
	say("connect to a published port", dial(open))
	say("connect elsewhere", dial(closed))
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	fmt.Printf("dumpable: %d %v\n", dumpable, err)
	return 0
}

func TestGateIsConfined(t *testing.T) {
	// landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION)
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 || abi < 4 {
		t.Skipf("this kernel has no Landlock for TCP (ABI %d, %v), which came with 6.7", int(abi), errno)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), confineVariable+"="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		"read elsewhere: no", "write logs: yes", "run a program: no", "trace a process: no",
		"make a namespace: no", "make a file in memory: no",
		"connect to a published port: yes", "connect elsewhere: no", "dumpable: 0 <nil>",
	} {
		if !strings.Contains(string(out), want+"\n") {
			t.Errorf("wants %q:\n%s", want, out)
		}
	}
}
