package cloudhypervisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/clawvm/clawvm/vmm"
)

// The tests here boot real machines. They run in the emulated host, where integration/emuhost's TestCloudHypervisor starts them
// with these files beside them: vmlinux, initramfs (with integration/emuhost/guest as init), cmdline.
const insideVariable = "CLAWVM_INSIDE"

const (
	insideUID = 2000000010
	insideTAP = "clawtest0"
	insideMAC = "02:63:0a:63:00:02"
	bootWait  = 90 * time.Second // a guest in an emulated host is up after 7 s; several at once, and busy, take longer
)

func insideDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv(insideVariable)
	if dir == "" {
		t.Skip("runs in the emulated host; integration/emuhost's TestCloudHypervisor starts it there")
	}
	return dir
}

// rig is a machine with all that it can have, and the host's side of it.
type rig struct {
	*vmm.Machine
	console *output
}

// output collects what is written to a pipe.
type output struct {
	mu   sync.Mutex
	text strings.Builder
	done chan struct{}
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

// newOutput gives the write end of a pipe whose content is collected.
func newOutput(t *testing.T) (*output, *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	o := &output{done: make(chan struct{})}
	go func() {
		defer close(o.done)
		io.Copy(o, r)
		r.Close()
	}()
	t.Cleanup(func() { w.Close() })
	return o, w
}

func command(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v: %s", argv, err, out)
	}
}

func newRig(t *testing.T) *rig {
	t.Helper()
	files := insideDir(t)
	kvm, err := user.LookupGroup("kvm")
	if err != nil {
		t.Fatal(err)
	}
	gid, err := strconv.Atoi(kvm.Gid)
	if err != nil {
		t.Fatal(err)
	}
	cmdline, err := os.ReadFile(filepath.Join(files, "cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/run", "ch-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left in the machine's directory: %v, %v", left, err)
		}
		os.RemoveAll(dir)
	})
	for _, err := range []error{os.Chown(dir, 0, insideUID), os.Chmod(dir, 0o710)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	mac, err := net.ParseMAC(insideMAC)
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	makeDisk(t, disk, insideUID)
	openParents(t, disk)
	r := &rig{Machine: &vmm.Machine{
		Name: "test", VCPUs: 1, Memory: 256 << 20,
		Kernel: filepath.Join(files, "vmlinux"), Initramfs: filepath.Join(files, "initramfs"), Cmdline: string(cmdline),
		Disks: []vmm.Disk{{ID: "first", Path: disk}},
		MAC:   mac, Dir: dir, UID: insideUID, GID: insideUID, Groups: []int{gid},
	}}
	r.console, r.Console = newOutput(t)
	log, w := newOutput(t)
	r.Log = w
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s\nlog:\n%s", r.console, log)
		}
	})
	return r
}

func makeDisk(t *testing.T, path string, uid int) {
	t.Helper()
	if err := os.WriteFile(path, []byte("before\x00\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{os.Truncate(path, 1<<20), os.Chown(path, uid, uid)} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// openParents lets the VMM's uid reach a file below the test's directories.
func openParents(t *testing.T, path string) {
	t.Helper()
	for dir := filepath.Dir(path); dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// tap makes the TAP, with a greeter on the host's end.
func (r *rig) tap(t *testing.T, uid int) {
	t.Helper()
	command(t, "ip", "tuntap", "add", insideTAP, "mode", "tap", "user", strconv.Itoa(uid), "vnet_hdr")
	t.Cleanup(func() { command(t, "ip", "link", "del", insideTAP) })
	command(t, "ip", "addr", "add", "10.99.0.1/24", "dev", insideTAP)
	command(t, "ip", "link", "set", insideTAP, "up")
	r.TAP = insideTAP
	l, err := net.Listen("tcp", "10.99.0.1:7777")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "greetings")
			c.Close()
		}
	}()
}

// share starts a virtiofsd.
func (r *rig) share(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("shared"), 0o644); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(r.Dir, "share.sock")
	l, err := listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(socket, insideUID, insideUID); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/libexec/virtiofsd", "--fd=3", "--shared-dir", dir, "--readonly", "--cache=always")
	cmd.ExtraFiles = []*os.File{l}
	cmd.Stderr = r.Log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	r.Shares = []vmm.Share{{Tag: "share", Socket: socket}}
}

// running is a machine that runs, and its agent's connection.
type running struct {
	vmm.Instance
	rig   *rig
	agent net.Conn
	facts []string
}

// start boots the machine and waits for its agent.
func (r *rig) start(t *testing.T) *running {
	t.Helper()
	v := New("")
	channel, err := v.OpenChannel(r.Machine)
	if err != nil {
		t.Fatal(err)
	}
	r.Agent = channel
	l, err := net.FileListener(channel.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := channel.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootWait)
	defer cancel()
	began := time.Now()
	i, err := v.Start(ctx, r.Machine)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("Start took %s", time.Since(began).Round(time.Millisecond))
	u := &running{Instance: i, rig: r}
	t.Cleanup(func() {
		if err := i.Kill(); err != nil {
			t.Error(err)
		}
		i.Wait()
		if err := i.Close(); err != nil {
			t.Error(err)
		}
	})
	l.(*net.UnixListener).SetDeadline(time.Now().Add(bootWait))
	if u.agent, err = l.Accept(); err != nil {
		t.Fatalf("the guest does not call: %v", err)
	}
	t.Cleanup(func() { u.agent.Close() })
	u.agent.SetDeadline(time.Now().Add(bootWait))
	lines := bufio.NewScanner(u.agent)
	for lines.Scan() && lines.Text() != "what now" {
		u.facts = append(u.facts, lines.Text())
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	t.Logf("the guest runs after %s", time.Since(began).Round(time.Millisecond))
	return u
}

func (u *running) tell(t *testing.T, what string) {
	t.Helper()
	if _, err := fmt.Fprintln(u.agent, what); err != nil {
		t.Fatal(err)
	}
}

// ends waits for the machine's end and compares it, and the events of its life.
func (u *running) ends(t *testing.T, want vmm.ExitReason, kinds ...vmm.EventKind) vmm.Exit {
	t.Helper()
	ended := make(chan vmm.Exit, 1)
	go func() { ended <- u.Wait() }()
	select {
	case exit := <-ended:
		t.Logf("exit: %s", exit)
		if exit.Reason != want {
			t.Errorf("the machine has %s; want %s", exit, want)
		}
		got := []vmm.EventKind{}
		for e := range u.Events() {
			got = append(got, e.Kind)
		}
		if fmt.Sprint(got) != fmt.Sprint(kinds) {
			t.Errorf("events %v; want %v", got, kinds)
		}
		return exit
	case <-time.After(bootWait):
		t.Fatal("the machine does not end")
	}
	return vmm.Exit{}
}

func TestInsideLife(t *testing.T) {
	r := newRig(t)
	r.tap(t, insideUID)
	r.share(t)
	second := filepath.Join(filepath.Dir(r.Disks[0].Path), "second")
	makeDisk(t, second, insideUID)
	r.Disks = append(r.Disks, vmm.Disk{ID: "second", Path: second, ReadOnly: true})
	u := r.start(t)
	want := []string{
		`disk first begins with "before", writable true `,
		`disk second begins with "before", writable false `,
		`network: ` + insideMAC + ` greetings`,
		`share: shared`,
		`nested: false`,
	}
	if strings.Join(u.facts, "\n") != strings.Join(want, "\n") {
		t.Errorf("the guest says\n%s\nwant\n%s", strings.Join(u.facts, "\n"), strings.Join(want, "\n"))
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", u.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		fmt.Sprintf("Uid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\n", insideUID), fmt.Sprintf("Groups:\t%d \n", r.Groups[0]),
		"CapEff:\t0000000000000000\n",
	} {
		if !strings.Contains(string(status), line) {
			t.Errorf("the process's status has no %q:\n%s", line, status)
		}
	}
	if !threadsFiltered(t, u.PID()) {
		t.Error("no thread has a seccomp filter")
	}
	if !landlocked() {
		t.Error("no Landlock here")
	}
	u.tell(t, "poweroff")
	u.ends(t, vmm.ExitPoweredOff, vmm.Booted, vmm.PoweredOff)
	if got := r.console.String(); !strings.Contains(got, "guest: told to poweroff") {
		t.Errorf("the console has %q", got)
	}
	if b, err := os.ReadFile(r.Disks[0].Path); err != nil || !strings.HasPrefix(string(b), "written") {
		t.Errorf("the disk begins with %.8q, %v", b, err)
	}
	t.Cleanup(func() { os.Remove(filepath.Join(r.Dir, "share.sock")) })
}

func threadsFiltered(t *testing.T, pid int) bool {
	t.Helper()
	all, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), "Seccomp:\t2\n") {
			return true
		}
	}
	return false
}

func TestInsideReboot(t *testing.T) {
	u := newRig(t).start(t)
	u.tell(t, "reboot")
	u.ends(t, vmm.ExitRebooted, vmm.Booted, vmm.Rebooting)
	if n := strings.Count(u.rig.console.String(), "guest: begins"); n != 1 {
		t.Errorf("the guest began %d times", n)
	}
}

func TestInsidePanic(t *testing.T) {
	u := newRig(t).start(t)
	u.tell(t, "panic")
	u.ends(t, vmm.ExitPanicked, vmm.Booted, vmm.Panicked, vmm.Rebooting)
	if got := u.rig.console.String(); !strings.Contains(got, "Kernel panic - not syncing") {
		t.Errorf("the console has %q", got)
	}
}

func TestInsidePanicThatHangs(t *testing.T) {
	r := newRig(t)
	r.Cmdline = strings.Replace(r.Cmdline, "panic=-1", "panic=0", 1)
	u := r.start(t)
	u.tell(t, "panic")
	u.ends(t, vmm.ExitPanicked, vmm.Booted, vmm.Panicked)
}

func TestInsideKill(t *testing.T) {
	u := newRig(t).start(t)
	if err := u.Kill(); err != nil {
		t.Fatal(err)
	}
	if exit := u.ends(t, vmm.ExitKilled, vmm.Booted); exit.Signal != syscall.SIGKILL {
		t.Errorf("signal %v", exit.Signal)
	}
	if err := u.Kill(); err != nil {
		t.Errorf("killing it again: %v", err)
	}
}

func TestInsideStop(t *testing.T) {
	u := newRig(t).start(t)
	if err := u.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exit := u.ends(t, vmm.ExitKilled, vmm.Booted); exit.Code != 0 {
		t.Errorf("code %d", exit.Code)
	}
}

// A guest that says the time ten times a second falls silent when its machine is paused, and goes on after.
func TestInsidePause(t *testing.T) {
	r := newRig(t)
	r.tap(t, insideUID)
	r.share(t)
	t.Cleanup(func() { os.Remove(filepath.Join(r.Dir, "share.sock")) })
	u := r.start(t)
	u.tell(t, "tick")
	ticks := make(chan string)
	go func() {
		defer close(ticks)
		for lines := bufio.NewScanner(u.agent); lines.Scan(); {
			ticks <- lines.Text()
		}
	}()
	next := func(limit time.Duration) bool {
		select {
		case _, ok := <-ticks:
			return ok
		case <-time.After(limit):
			return false
		}
	}
	for round := range 3 {
		if !next(bootWait) {
			t.Fatalf("round %d: no tick before the pause", round)
		}
		if err := errors.Join(u.Pause(t.Context()), u.Pause(t.Context())); err != nil {
			t.Fatal(err)
		}
		for next(2 * time.Second) { // those on their way
			continue
		}
		if next(3 * time.Second) {
			t.Errorf("round %d: the guest goes on", round)
		}
		if state := processState(t, u.PID()); state != "T" {
			t.Errorf("round %d: the VMM's process is in state %s, not stopped", round, state)
		}
		if err := errors.Join(u.Resume(t.Context()), u.Resume(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	if !next(bootWait) {
		t.Fatal("no tick after the pause")
	}
	if err := u.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := u.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	u.ends(t, vmm.ExitKilled, vmm.Booted)
}

func TestInsidePowerButton(t *testing.T) {
	u := newRig(t).start(t)
	u.tell(t, "wait")
	if err := u.PowerButton(t.Context()); err != nil {
		t.Fatal(err)
	}
	u.ends(t, vmm.ExitPoweredOff, vmm.Booted, vmm.PoweredOff)
	if got := u.rig.console.String(); !strings.Contains(got, "guest: power button") {
		t.Errorf("the console has %q", got)
	}
}

func TestInsideSignalFromElsewhere(t *testing.T) {
	u := newRig(t).start(t)
	if err := syscall.Kill(u.PID(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	u.ends(t, vmm.ExitKilled, vmm.Booted)
}

// startErr starts what cannot be started.
func startErr(t *testing.T, ctx context.Context, r *rig) string {
	t.Helper()
	i, err := New("").Start(ctx, r.Machine)
	if err == nil {
		i.Kill()
		i.Wait()
		t.Fatal("it starts")
	}
	t.Log(err)
	return err.Error()
}

func TestInsideRefusals(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(*testing.T, *rig)
		want  []string
	}{
		{"missing kernel", func(t *testing.T, r *rig) { r.Kernel = "/no/kernel" }, []string{"Cannot open kernel file", "No such file"}},
		{"missing disk", func(t *testing.T, r *rig) { r.Disks[0].Path = "/no/disk" }, []string{"No such file"}},
		{"a disk of root's", func(t *testing.T, r *rig) { makeDisk(t, r.Disks[0].Path, 0) }, []string{"Permission denied"}},
		{"a TAP of somebody else's", func(t *testing.T, r *rig) { r.tap(t, insideUID+1) }, []string{"Open tap device failed", "Operation not permitted"}},
		{"no TAP of this name", func(t *testing.T, r *rig) { r.TAP = "clawnone" }, []string{"there is no TAP clawnone"}},
		{"more memory than there can be", func(t *testing.T, r *rig) { r.Memory = 1 << 50 }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			c.spoil(t, r)
			got := startErr(t, t.Context(), r)
			for _, want := range append(c.want, "cannot start cloud-hypervisor") {
				if !strings.Contains(got, want) {
					t.Errorf("%q does not say %q", got, want)
				}
			}
		})
	}
}

// A share whose virtiofsd isn't there keeps cloud-hypervisor's API busy for a minute.
func TestInsideStartGivesUpWithItsContext(t *testing.T) {
	r := newRig(t)
	r.Shares = []vmm.Share{{Tag: "share", Socket: filepath.Join(r.Dir, "nobody.sock")}}
	ctx, cancel := context.WithCancelCause(t.Context())
	r.Spawn = func(cmd *exec.Cmd) error {
		time.AfterFunc(3*time.Second, func() { cancel(errors.New("the share is lost")) })
		return cmd.Start()
	}
	began := time.Now()
	if got := startErr(t, ctx, r); !strings.Contains(got, "the share is lost") {
		t.Error(got)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %s", took)
	}
}

// processState is a process's state as /proc/PID/stat has it: the field after the name in brackets.
func processState(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return rest[:1]
}
