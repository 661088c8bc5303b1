package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	shared "github.com/clawvm/clawvm/integration/world"
)

// hollowHost gives the root of hollow VMs a bridge of its own.
const hollowHost = "bridge: hollowbr\naddress: 192.168.85.1/24\n"

// hollowVM has everything that a step makes something of.
const hollowVM = `
image: small
vmm: qemu
memory: 128MiB
overlay: {size: 16MiB}
volumes: [{name: state, mount: /var/lib/state, size: 16MiB}]
secrets: {made: {generate: 32}}
shares: [{source: DIR/share, mount: /srv/share, readonly: true}]
ports: ["127.0.0.1:18085:8080"]
run: {argv: [sleep, "1000"], user: app, ready: {timeout: 30s}}
`

// hollowWorld is a root whose QEMU is hollow, and whose clawvm fails where it is
// told to.
type hollowWorld struct {
	*refuser
	env   []string
	taken chan error    // how taking a port went
	over  chan struct{} // closed when the start that wanted it is over
}

var (
	hollowBuild    sync.Once
	hollowBuildErr error
)

// Where the programs of hollow worlds are.
const (
	hollowPrograms = "/run/hollow"
	hollowBin      = "/run/hollowbin"
)

func buildHollow() error {
	for _, b := range []struct{ tags, out, what string }{
		{"failpoints", hollowBin + "/", "../cmd/..."},
		{"", hollowPrograms + "/qemu-system-x86_64", "./hollow"},
	} {
		cmd := exec.Command("go", "build", "-trimpath", "-tags", b.tags, "-o", b.out, b.what)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("cannot build %s: %w\n%s", b.what, err, out)
		}
	}
	return nil
}

// newHollowWorld makes the root, with an image and a kernel in it.
func newHollowWorld(t *testing.T, root, host string) *hollowWorld {
	t.Helper()
	newWorld(t)
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("go is not installed: clawvm is built anew for these tests, with failures in it")
	}
	hollowBuild.Do(func() { hollowBuildErr = buildHollow() })
	if hollowBuildErr != nil {
		t.Fatal(hollowBuildErr)
	}
	w := &hollowWorld{refuser: &refuser{world: &world{World: &shared.World{Bin: hollowBin, Root: root}, bin: hollowBin, root: root}, dir: t.TempDir()}}
	w.env = append(os.Environ(), "PATH="+hollowPrograms+":"+os.Getenv("PATH"))
	for _, d := range []string{w.dir, filepath.Dir(w.dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mkdir(t, filepath.Join(w.dir, "share"), 0o755)
	for _, d := range []string{"var/lib/clawvm/leases", "etc/clawvm/vms"} {
		mkdir(t, filepath.Join(root, d), 0o755)
	}
	w.prepareStore(t)
	if err := os.WriteFile(filepath.Join(root, "etc/clawvm/clawvm.yaml"), []byte(host), 0o644); err != nil {
		t.Fatal(err)
	}
	return w
}

// with runs clawvm with more in its environment.
func (w *hollowWorld) with(t *testing.T, env []string, args ...string) result {
	t.Helper()
	r, err := w.start(env, args...)()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// start starts clawvm; the function that it returns waits for its end.
func (w *hollowWorld) start(env []string, args ...string) func() (result, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	cmd := exec.CommandContext(ctx, filepath.Join(w.bin, "clawvm"), append([]string{"--root", w.root}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = append(slices.Clone(w.env), env...)
	err := cmd.Start()
	return func() (result, error) {
		defer cancel()
		if err == nil {
			err = cmd.Wait()
		}
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			return result{}, fmt.Errorf("clawvm %s: %w", strings.Join(args, " "), err)
		}
		return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}, nil
	}
}

func (w *hollowWorld) up(t *testing.T, env ...string) {
	t.Helper()
	if r := w.with(t, env, "up", "vm"); r.code != 0 {
		t.Fatalf("up: exit code %d\n%s%s", r.code, r.stderr, w.LastWords([]string{"vm"}))
	}
}

func (w *hollowWorld) down(t *testing.T) {
	t.Helper()
	if r := w.with(t, nil, "down", "vm"); r.code != 0 {
		t.Fatalf("down: exit code %d\n%s%s", r.code, r.stderr, w.LastWords([]string{"vm"}))
	}
}

// behave sets the mode of the hollow VM vm.
func (w *hollowWorld) behave(t *testing.T, mode string) {
	t.Helper()
	file := filepath.Join(hollowPrograms, "vm.mode")
	if err := os.WriteFile(file, []byte(mode), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { remove(t, file) })
}

// unchanged compares the host with a snapshot, with time for a killed VM's
// children to go.
func (w *hollowWorld) unchanged(t *testing.T, before map[string][]string) {
	t.Helper()
	w.ended(t)
	w.compare(t, before, w.everything(t))
}

// everything is the refuser's, without whether a link has a carrier, which a
// bridge is told up to a second after its last port has gone.
func (w *hollowWorld) everything(t *testing.T) map[string][]string {
	t.Helper()
	shot := w.refuser.everything(t)
	for _, kind := range []string{"links", "addresses"} {
		for i, line := range shot[kind] {
			shot[kind][i] = carrier.ReplaceAllString(line, "")
		}
	}
	return shot
}

var carrier = regexp.MustCompile(` (DOWN|UP|UNKNOWN)\b|NO-CARRIER,|,LOWER_UP| +$`)

// ended waits for the end of the VM's processes. One that dies is seen no more
// some time before its lock is free.
func (w *hollowWorld) ended(t *testing.T) {
	t.Helper()
	var left map[string][]int
	defer func() {
		if len(left) > 0 {
			t.Logf("left are %v\n%s", left, w.LastWords([]string{"vm"}))
		}
	}()
	eventually(t, "no process of the VM is left", 30*time.Second, func() bool {
		left = w.processes(t, "vm")
		return len(left) == 0
	})
	f, err := os.OpenFile(filepath.Join(w.root, "run/clawvm/vm/lock"), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	eventually(t, "nobody holds the VM's lock", 30*time.Second, func() bool {
		lock := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
			t.Fatal(err)
		}
		return lock.Type == unix.F_UNLCK
	})
}

// clean makes the next case independent of what this one left.
func (w *hollowWorld) clean(t *testing.T) {
	t.Helper()
	if r := w.with(t, nil, "down", "--timeout", "1s", "vm"); r.code != 0 && !t.Failed() {
		t.Errorf("the VM was still up, and down says %s", r.stderr)
	}
	if r := w.with(t, nil, "gc"); r.code != 0 {
		t.Errorf("gc: exit code %d: %s", r.code, r.stderr)
	}
}

// pointsPassed brings the VM up and down and returns the points in the order in
// which they were passed: of the start, and of the end.
func (w *hollowWorld) pointsPassed(t *testing.T) (start, end []string) {
	t.Helper()
	log := filepath.Join(w.root, "var/log/clawvm/vm/supervisor.log")
	if err := os.RemoveAll(log); err != nil {
		t.Fatal(err)
	}
	w.up(t, "CLAWVM_FAILPOINT=tell")
	w.down(t)
	raw, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	ready := false
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSpace(line)
		point, ok := strings.CutPrefix(line, "failpoint: ")
		switch {
		case strings.HasSuffix(line, " ready"):
			ready = true
		case ok && ready:
			end = append(end, point)
		case ok:
			start = append(start, point)
		}
	}
	if !ready || len(start) < 40 || len(end) < 20 {
		t.Fatalf("the points of the start %q and of the end %q are not all that there are:\n%s", start, end, raw)
	}
	return start, end
}

// TestEveryStepFails lets each step of up, each rung of down and each undo fail
// in turn, before and after its work, and kills the supervisor there. A list of
// them is kept nowhere: they are those that a start and an end pass.
func TestEveryStepFails(t *testing.T) {
	w := newHollowWorld(t, "/run/fail", hollowHost)
	w.declare(t, "vm", w.expand(hollowVM))
	t.Cleanup(func() { w.clean(t) })
	w.up(t)
	w.down(t)
	clean := w.everything(t)
	start, end := w.pointsPassed(t)
	w.unchanged(t, clean)

	for _, point := range start {
		t.Run("up/"+point, func(t *testing.T) {
			r := w.with(t, []string{"CLAWVM_FAILPOINT=fail " + point}, "up", "vm")
			_, step, _ := strings.Cut(point, " ")
			if want := "cannot start VM vm: " + step + ": made to fail"; r.code != 1 || !strings.Contains(r.stderr, want) {
				t.Errorf("exit code %d, want 1 and %q:\n%s", r.code, want, r.stderr)
			}
			w.unchanged(t, clean)
			if end := w.lastEnd(t); end.Code != 1 || !strings.Contains(end.Reason, step+": made to fail") || end.Left {
				t.Errorf("the record of the end is %+v", end)
			}
		})
	}
	for _, point := range append(slices.Clone(start), end...) {
		if strings.HasPrefix(point, "before ") {
			continue // the same moment as after the point before it
		}
		t.Run("killed/"+point, func(t *testing.T) {
			env := []string{"CLAWVM_FAILPOINT=kill " + point}
			r := w.with(t, env, "up", "vm")
			if slices.Contains(end, point) {
				if r.code != 0 {
					t.Fatalf("up: exit code %d\n%s", r.code, r.stderr)
				}
				r = w.with(t, nil, "down", "vm")
			}
			if r.code != 1 || !strings.Contains(r.stderr, "VM vm") || !strings.Contains(r.stderr, "without a word") {
				t.Errorf("exit code %d, and it says\n%s", r.code, r.stderr)
			}
			w.ended(t)
			if r := w.with(t, nil, "gc"); r.code != 0 {
				t.Errorf("gc: exit code %d: %s", r.code, r.stderr)
			}
			w.unchanged(t, clean)
		})
	}
	for _, point := range end {
		t.Run("down/"+point, func(t *testing.T) {
			w.up(t, "CLAWVM_FAILPOINT=fail "+point)
			r := w.with(t, nil, "down", "vm")
			what, isUndo := strings.CutPrefix(point[strings.Index(point, " ")+1:], "undo of ")
			if !isUndo {
				// The next rung ends the guest.
				if r.code != 0 {
					t.Errorf("exit code %d: %s", r.code, r.stderr)
				}
				w.unchanged(t, clean)
				return
			}
			if want := "cannot take down " + what + ": made to fail"; r.code != 1 || !strings.Contains(r.stderr, want) {
				t.Errorf("exit code %d, want 1 and %q:\n%s", r.code, want, r.stderr)
			}
			if end := w.lastEnd(t); !end.Left || !strings.Contains(end.Reason, what) {
				t.Errorf("the record of the end is %+v", end)
			}
			if strings.HasPrefix(point, "before ") {
				w.with(t, nil, "gc") // whose business the rest is
			}
			w.unchanged(t, clean)
		})
	}
}

// lastEnd is the record of how the VM vm ended.
func (w *hollowWorld) lastEnd(t *testing.T) (end struct {
	Reason string `json:"reason"`
	Code   int    `json:"code"`
	Left   bool   `json:"left"`
}) {
	t.Helper()
	readJSON(t, filepath.Join(w.root, "var/lib/clawvm/vms/vm/last-end.json"), &end)
	return end
}

// failure is a start that really fails.
type failure struct {
	name   string
	vm     string // the declaration; without one hollowVM
	mode   string // of the hollow VM
	env    []string
	mounts string // as refusal's
	before func(t *testing.T, w *hollowWorld)
	after  func(t *testing.T, w *hollowWorld) // the start, before the host is compared
	// limits is what prlimit(1) is told.
	limits []string
	code   int
	// says is part of the answer, where the whole differs from machine to machine.
	says string
}

// realQEMU lets a start find the machine's own QEMU.
var realQEMU = "PATH=" + os.Getenv("PATH")

// fromTheFuture makes the files of the root, and the record of the VM's last end,
// what they are after the clock was set back by a year.
func (w *hollowWorld) fromTheFuture(t *testing.T) {
	t.Helper()
	later := time.Now().Add(365 * 24 * time.Hour)
	record := filepath.Join(w.root, "var/lib/clawvm/vms/vm/last-end.json")
	end := map[string]any{}
	readJSON(t, record, &end)
	end["time"], end["started"] = later, later
	raw, err := json.Marshal(end)
	if err == nil {
		err = os.WriteFile(record, raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"var", "etc", "run"} {
		err := filepath.WalkDir(filepath.Join(w.root, dir), func(path string, d fs.DirEntry, err error) error {
			if d != nil && d.Name() == "images" {
				return fs.SkipDir // whose times are part of what they are
			}
			if err != nil || d.Type()&fs.ModeSymlink != 0 {
				return err
			}
			return os.Chtimes(path, later, later)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// fullDisk mounts a file system without any room on a directory.
const fullDisk = "mount -t tmpfs -o size=64k none %[1]s\n" + "head -c 1M /dev/zero > %[1]s/fill 2>/dev/null || true\n"

var failures = []failure{
	{name: "vmm-ends-at-once", mode: "dies", code: 1},
	{name: "vmm-ends-early", mode: "goes", code: 1, says: "hollow: it is made to end"},
	{name: "never-ready", mode: "unready", vm: strings.Replace(hollowVM, "timeout: 30s", "timeout: 1s", 1), code: 124},
	{name: "virtiofsd-ends-at-once", env: []string{"CLAWVM_VIRTIOFSD=DIR/virtiofsd-dead"}, code: 1, says: "the server of a share ended, and the guest cannot go on without: virtiofsd of the share"},
	{name: "virtiofsd-ends-later", mode: "silent", env: []string{"CLAWVM_VIRTIOFSD=DIR/virtiofsd-later"}, code: 1, says: "the server of a share ended, and the guest cannot go on without: virtiofsd of the share"},
	{name: "tap-of-nobody", vm: hollowVM + "tap: failtap0\n", code: 1, before: func(t *testing.T, w *hollowWorld) {
		keepLink(t, tap("failtap0"), "")
	}},
	{name: "tap-of-another-root", vm: hollowVM + "tap: failtap0\n", code: 1, before: func(t *testing.T, w *hollowWorld) {
		keepLink(t, tap("failtap0"), "clawvm:0a1b2c3d:vm")
	}},
	{name: "port-taken-between-check-and-use", code: 1,
		env:    []string{"CLAWVM_FAILPOINT=run before sockets", "CLAWVM_FAILPOINT_COMMAND=touch DIR/now; until [ -e DIR/go ]; do sleep 0.02; done"},
		before: func(t *testing.T, w *hollowWorld) { w.takePort("127.0.0.1:18085") },
		after: func(t *testing.T, w *hollowWorld) {
			close(w.over)
			if err := <-w.taken; err != nil {
				t.Error(err)
			}
		}},
	{name: "address-taken-between-check-and-use", code: 78, vm: hollowVM + "address: 192.168.85.77\n",
		env: []string{"CLAWVM_FAILPOINT=run before lease", "CLAWVM_FAILPOINT_COMMAND=ln -s other ROOT/var/lib/clawvm/leases/192.168.85.77"},
		after: func(t *testing.T, w *hollowWorld) {
			remove(t, filepath.Join(w.root, "var/lib/clawvm/leases/192.168.85.77"))
		}},
	{name: "staging-full", code: 1, vm: strings.Replace(hollowVM, "secrets: {made: {generate: 32}}", "secrets: {"+manySecrets()+"}", 1)},
	{name: "disk-cut-off", code: 1, before: func(t *testing.T, w *hollowWorld) {
		damage(t, filepath.Join(w.root, "var/lib/clawvm/vms/vm/volumes/state.raw"))
	}},
	{name: "state-disk-full", code: 1, vm: strings.Replace(hollowVM, "name: state", "name: other", 1),
		mounts: "mkdir DIR/small\n" + fmt.Sprintf(fullDisk, "DIR/small") + "mount --bind DIR/small ROOT/var/lib/clawvm/vms/vm/volumes\n"},
	{name: "run-full", code: 1, mounts: "mkdir DIR/smallrun\n" + fmt.Sprintf(fullDisk, "DIR/smallrun") + "mount --bind DIR/smallrun ROOT/run/clawvm\n"},
	{name: "var-read-only", code: 1, mounts: "mount --bind ROOT/var ROOT/var\nmount -o remount,bind,ro ROOT/var\n"},
	{name: "no-descriptors", limits: []string{"--nofile=12"}, code: 1, says: "too many open files"},
	{name: "few-descriptors", limits: []string{"--nofile=24"}, code: 1, says: "too many open files"},
	{name: "no-processes", limits: []string{"--nproc=0"}, env: []string{realQEMU}, code: 1, says: "esource temporarily unavailable"},
	{name: "no-memory", limits: []string{"--as=3221225472"}, env: []string{realQEMU}, vm: strings.Replace(hollowVM, "memory: 128MiB", "memory: 3GiB", 1), code: 1, says: "Cannot allocate memory"},
	{name: "clock-set-back", mode: "dies", code: 1, before: func(t *testing.T, w *hollowWorld) { w.fromTheFuture(t) }},
	{name: "small-files", limits: []string{"--fsize=4096"}, code: 1, vm: strings.Replace(hollowVM, "name: state", "name: other", 1)},
}

// TestStartFails lets starts fail by real causes, and compares the whole answer
// with a golden file. The host is as before, and the next start works.
func TestStartFails(t *testing.T) {
	w := newHollowWorld(t, "/run/fail", hollowHost)
	w.declare(t, "vm", w.expand(hollowVM))
	t.Cleanup(func() { w.clean(t) })
	for i := range 17 {
		if err := os.WriteFile(filepath.Join(w.dir, fmt.Sprintf("secret%d", i)), bytes.Repeat([]byte{'x'}, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, script := range map[string]string{
		"virtiofsd-dead":  "#!/bin/sh\nif [ \"$1\" = --version ]; then echo virtiofsd 1.13.0; exit; fi\necho 'it is made to end' >&2\nexit 3\n",
		"virtiofsd-later": "#!/bin/sh\nif [ \"$1\" = --version ]; then exec REAL --version; fi\nexec timeout -s KILL 1 REAL \"$@\"\n",
	} {
		script = strings.ReplaceAll(script, "REAL", virtiofsd(t))
		if err := os.WriteFile(filepath.Join(w.dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w.up(t)
	w.down(t)
	clean := w.everything(t)
	for _, c := range failures {
		t.Run(c.name, func(t *testing.T) {
			vm := c.vm
			if vm == "" {
				vm = hollowVM
			}
			w.declare(t, "vm", w.expand(vm))
			t.Cleanup(func() { w.declare(t, "vm", w.expand(hollowVM)) })
			if c.mode != "" {
				w.behave(t, c.mode)
			}
			if c.before != nil {
				c.before(t, w)
			}
			before := w.everything(t)
			r := w.fail(t, c)
			if c.after != nil {
				c.after(t, w)
			}
			w.unchanged(t, before)
			if r.code != c.code || !strings.Contains(r.stderr, c.says) {
				t.Errorf("exit code %d, want %d and %q:\n%s", r.code, c.code, c.says, r.stderr)
			}
			if c.says == "" {
				// Without the logs, which have earlier starts in them.
				said, _, _ := strings.Cut(r.stderr, "the end of what ")
				said = strings.NewReplacer(w.dir, "DIR", w.root, "ROOT").Replace(said)
				golden(t, filepath.Join("testdata/failure", c.name+".golden"), fmt.Sprintf("%s\nexit code %d\n", strings.TrimSpace(said), r.code))
			}
		})
		t.Run(c.name+" leaves what the next start needs", func(t *testing.T) {
			w.up(t)
			w.down(t)
			w.unchanged(t, clean)
		})
	}
}

// fail runs the start of a failure.
func (w *hollowWorld) fail(t *testing.T, c failure) result {
	t.Helper()
	argv := []string{filepath.Join(w.bin, "clawvm"), "--root", w.root, "up", "vm"}
	if len(c.limits) > 0 {
		argv = append(append([]string{"prlimit"}, c.limits...), argv...)
	}
	if c.mounts != "" {
		argv = append([]string{"unshare", "--mount", "sh", "-c", "set -e\n" + w.expand(c.mounts) + `exec "$@"`, "sh"}, argv...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = slices.Clone(w.env)
	for _, v := range c.env {
		cmd.Env = append(cmd.Env, w.expand(v))
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", strings.Join(argv, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// manySecrets are declarations of more than fits where secrets are staged.
func manySecrets() string {
	var all []string
	for i := range 17 {
		all = append(all, fmt.Sprintf("s%d: {file: DIR/secret%d}", i, i))
	}
	return strings.Join(all, ", ")
}

// takePort listens on the address when the file now appears, lets the start go on
// by the file go, and stops when the start has failed.
func (w *hollowWorld) takePort(address string) {
	w.taken, w.over = make(chan error, 1), make(chan struct{})
	now, goOn := filepath.Join(w.dir, "now"), filepath.Join(w.dir, "go")
	go func() {
		there := func() bool { _, err := os.Stat(now); return err == nil }
		for deadline := time.Now().Add(time.Minute); !there(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				w.taken <- errors.New("the start did not come to the step in time")
				return
			}
		}
		l, err := net.Listen("tcp", address)
		if err == nil {
			err = os.WriteFile(goOn, nil, 0o644)
		}
		<-w.over
		if l != nil {
			err = errors.Join(err, l.Close())
		}
		w.taken <- err
	}()
}

// damage overwrites a disk's superblock for the length of the test.
func damage(t *testing.T, disk string) {
	t.Helper()
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const superblock = 1024
	was := make([]byte, superblock)
	if _, err := f.ReadAt(was, superblock); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, superblock), superblock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f, err := os.OpenFile(disk, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		now := make([]byte, superblock)
		if _, err := f.ReadAt(now, superblock); err != nil || !bytes.Equal(now, make([]byte, superblock)) {
			t.Errorf("the damaged disk was changed: %v", err)
		}
		if _, err := f.WriteAt(was, superblock); err != nil {
			t.Error(err)
		}
	})
}

// virtiofsd is the machine's own.
func virtiofsd(t *testing.T) string {
	t.Helper()
	for _, path := range []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Skip("virtiofsd is not installed (scripts/setup test)")
	return ""
}

// What differs from run to run in the answer of a start that failed.
var (
	pidText  = regexp.MustCompile(`process(es)? \[?[0-9]+\]?`)
	diskUser = regexp.MustCompile(`(reuid|regid)=[0-9]+`)
	digest   = regexp.MustCompile(`sha256-[0-9a-f]{64}`)
	release  = regexp.MustCompile(`kernel [0-9][^ :]+`)
)

// golden compares text with a file of testdata.
func golden(t *testing.T, file, text string) {
	t.Helper()
	text = release.ReplaceAllString(digest.ReplaceAllString(text, "sha256-SMALL"), "kernel RELEASE")
	sameAsFile(t, file, diskUser.ReplaceAllString(pidText.ReplaceAllString(text, "process N"), "$1=N"))
}

// sameAsFile compares text with a file, or writes the file anew where that is asked
// for.
func sameAsFile(t *testing.T, file, text string) {
	t.Helper()
	if *updateGolden {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if text != string(want) {
		t.Errorf("it says\n%s\nwant\n%s", text, want)
	}
}

func readJSON(t *testing.T, file string, into any) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(raw, into)
	}
	if err != nil {
		t.Errorf("%s: %v", file, err)
	}
}
