package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/host"
	shared "github.com/clawvm/clawvm/integration/world"
	"github.com/clawvm/clawvm/network"
)

// What a hostile guest can cost its host. Measured: supervisor 6 MiB, gate 9 MiB,
// logs 60 MiB.
const (
	hostileProcess = 20 << 20  // bytes of RssAnon of supervisor and gate, each
	hostileLogs    = 120 << 20 // bytes of all logs of the VM: three of 24 MiB, twice that while they rotate
	hostileTime    = 15 * time.Second
	besideLimit    = 15 * time.Second // an exec in another VM: half a second alone, on emulated processors that are shared
)

const besideVM = `
image: small
vmm: %s
vcpus: 1
memory: 128MiB
nameservers: [203.0.113.1]
overlay: {tmpfs: 16MiB}
run: {argv: [httpd, -f, -p, "8080", -h, /srv/www], user: app, ready: {tcp: 8080}, stop: {timeout: 5s}}
`

// outside is the host's directory that the lies aim at (integration/hostile).
const outside = "/run/outside"

// clientMemory is what the command line may hold of what a guest sends it, in KiB
// of its resident set: 30 MiB are its program's.
const clientMemory = 80 << 10

// asksLiar runs clawvm, and returns its exit code and all that it says. It fails the
// test when clawvm takes too much memory, or says what drives a terminal.
func (w *world) asksLiar(t *testing.T, args ...string) (code int, said string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(w.bin, "clawvm"), append([]string{"--root", w.root}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("clawvm %s: %v", strings.Join(args, " "), errors.Join(err, ctx.Err()))
	}
	if most := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss; most > clientMemory {
		t.Errorf("clawvm took %d KiB of memory, at most %d are allowed", most, clientMemory)
	}
	if strings.ContainsAny(out.String(), "\x1b\x07") {
		t.Errorf("clawvm says what drives a terminal: %q", out.String())
	}
	if out.Len() > 64<<10 {
		t.Errorf("clawvm says %d bytes", out.Len())
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

// TestGuestThatLies boots a guest whose init is not clawvm's: it says that it is
// ready, and then lies in every copy and command, and at last sends events, log,
// console output and an exec's output without an end. Its own VM costs what it
// may, the VM beside it goes on, and down ends it.
func TestGuestThatLies(t *testing.T) {
	w := newWorld(t)
	if vmmName() != "qemu" {
		t.Skip("the lying init speaks on the port that QEMU has")
	}
	w.prepareStore(t)
	init := buildForGuest(t, "hostile")
	for _, name := range []string{"beside", "liar"} {
		w.declare(t, name, fmt.Sprintf(besideVM, vmmName()))
		t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", name) })
	}
	w.must(t, "up", "beside")
	t.Setenv("CLAWVM_INIT", init)
	w.must(t, "up", "liar")
	if err := os.Unsetenv("CLAWVM_INIT"); err != nil { // t.Setenv puts back what was
		t.Fatal(err)
	}
	t.Run("copies", func(t *testing.T) { copyFromLiar(t, w) })
	t.Run("commands", func(t *testing.T) { runInLiar(t, w) })
	t.Run("floods", func(t *testing.T) { bearLiar(t, w) })
	w.must(t, "down", "--timeout", "2s", "liar")
	if left := w.processes(t, "liar"); len(left) != 0 {
		t.Errorf("left of the liar: %v", left)
	}
}

// buildForGuest builds a program of these tests to run in a guest.
func buildForGuest(t *testing.T, name string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), filepath.Base(name))
	cmd := exec.Command("go", "build", "-trimpath", "-o", program, "github.com/clawvm/clawvm/integration/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot build %s: %v\n%s", name, err, out)
	}
	return program
}

// copyFromLiar copies what the liar makes up: nothing is written but beneath the
// target.
func copyFromLiar(t *testing.T, w *world) {
	if err := errors.Join(os.Mkdir(outside, 0o700), os.WriteFile(outside+"/file", []byte("the host's"), 0o600)); err != nil {
		t.Fatal(err)
	}
	before := listTree(t, outside)
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=16m,nr_inodes=500"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for name, refused := range map[string]string{ // "": it is taken
		"dots":                  ".. in it",
		"dots-first":            ".. in it",
		"absolute":              "absolute path",
		"through-a-link":        "not a directory",
		"through-a-link-up":     "not a directory",
		"through-the-top":       "not a directory",
		"directory-over-a-link": "not a directory",
		"file-over-a-link":      "",
		"hard-link":             "hard link",
		"hard-link-up":          "hard link",
		"device":                "device",
		"pipe":                  "pipe",
		"setuid":                "",
		"other-name":            "which was asked for",
		"terminal":              ".. in it",
		"huge":                  "kept for the host",
		"endless-bytes":         "kept for the host",
		"endless-files":         "kept for the host",
		"endless-header":        "cannot read the stream",
		"no-archive":            "cannot read the stream",
		"nothing":               "nothing in the stream",
		"early":                 "lost the command",
		"words":                 "VM liar: ?[2J",
	} {
		t.Run(name, func(t *testing.T) {
			target := filepath.Join(small, "target")
			if err := os.Mkdir(target, 0o755); err != nil {
				t.Fatal(err)
			}
			code, said := w.asksLiar(t, "cp", "liar:/lies/"+name, target)
			switch {
			case refused == "" && code != 0:
				t.Errorf("exit code %d: %s", code, said)
			case refused != "" && (code != 1 || !strings.Contains(said, refused)):
				t.Errorf("exit code %d, want a refusal with %q: %s", code, refused, said)
			}
			if after := listTree(t, outside); !slices.Equal(after, before) {
				t.Errorf("outside there is\n%s", strings.Join(after, "\n"))
			}
			if entries, err := os.ReadDir(small); err != nil || len(entries) != 1 {
				t.Errorf("beside the target there is %v, %v", entries, err)
			}
			for _, line := range listTree(t, target) {
				fields := strings.Fields(line)
				if mode := fields[1]; !strings.HasPrefix(mode, "-") && !strings.HasPrefix(mode, "d") && !strings.HasPrefix(mode, "L") || strings.Contains(line, ".clawvm-cp-") {
					t.Errorf("in the target there is %s", line)
				}
			}
			var st unix.Statfs_t
			if err := unix.Statfs(small, &st); err != nil {
				t.Fatal(err)
			}
			if st.Bavail < st.Blocks/20-1 || st.Ffree < st.Files/20-2 {
				t.Errorf("%d of %d blocks and %d of %d files are left", st.Bavail, st.Blocks, st.Ffree, st.Files)
			}
			if err := os.RemoveAll(target); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// runInLiar runs commands whose answers break the protocol.
func runInLiar(t *testing.T, w *world) {
	for name, says := range map[string]string{
		"huge-frame":    "a frame of 4294967295 bytes",
		"unknown-frame": "unknown kind 99",
		"credit":        "too much credit",
		"long-exit":     "a frame of kind 6 with 100 bytes",
		"early":         "has ended",
		"half-a-frame":  "unexpected EOF",
		"long-header":   "cannot run a command in VM liar",
		"long-refusal":  "no ?[2J",
	} {
		if code, said := w.asksLiar(t, "exec", "liar", name); code != host.ExitExec || !strings.Contains(said, says) {
			t.Errorf("%s: exit code %d, want %d and %q: %s", name, code, host.ExitExec, says, said)
		}
	}
	if code, said := w.asksLiar(t, "exec", "liar", "after-the-end"); code != 3 || said != "" {
		t.Errorf("more after the end: exit code %d, %q", code, said)
	}
}

// bearLiar lets the liar flood, and measures.
func bearLiar(t *testing.T, w *world) {
	// A command whose output never ends, into a pipe that is read.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	endless := exec.CommandContext(ctx, filepath.Join(w.bin, "clawvm"), "--root", w.root, "exec", "liar", "flood")
	if err := endless.Start(); err != nil {
		t.Fatal(err)
	}
	most := map[string]int64{}
	var worst time.Duration
	for began := time.Now(); time.Since(began) < hostileTime; {
		w.weigh(t, "liar", most)
		worst = max(worst, w.asksBeside(t))
	}
	cancel()
	if err := endless.Wait(); err == nil {
		t.Error("an exec without an end ended well")
	}
	t.Logf("after %s of it: supervisor %.1f MiB, gate %.1f MiB, VMM %.1f MiB (128 are the guest's), logs %.1f MiB; an exec with a DNS query in the VM beside took %s at most",
		hostileTime, mib(most["supervisor"]), mib(most["gate"]), mib(most["vmm"]), mib(most["logs"]), worst.Round(time.Millisecond))
	for _, kind := range []string{"supervisor", "gate"} {
		if most[kind] == 0 || most[kind] > hostileProcess {
			t.Errorf("the %s took %.1f MiB, at most %.1f are allowed", kind, mib(most[kind]), mib(hostileProcess))
		}
	}
	if most["logs"] > hostileLogs || most["logs"] < 8<<20 {
		t.Errorf("the logs took %.1f MiB, at most %.1f are allowed, and the flood should fill one", mib(most["logs"]), mib(hostileLogs))
	}
	if worst > besideLimit {
		t.Errorf("the VM beside took %s to answer", worst)
	}
	for _, name := range []string{"liar", "beside"} {
		if s := w.status(t, name); s.State != "ready" {
			t.Errorf("VM %s is %s", name, s.State)
		}
	}
}

// weigh notes the most that a VM's processes and logs take, by kind.
func (w *world) weigh(t *testing.T, vm string, most map[string]int64) {
	t.Helper()
	for kind, pids := range w.processes(t, vm) {
		for _, pid := range pids {
			most[kind] = max(most[kind], shared.RssAnon(pid))
		}
	}
	most["logs"] = max(most["logs"], treeSize(t, filepath.Join(w.root, "var/log/clawvm", vm)))
}

// asksBeside looks that the VM beside works, its network too, and how long that takes.
func (w *world) asksBeside(t *testing.T) time.Duration {
	t.Helper()
	asked := time.Now()
	if got := w.must(t, "exec", "beside", "--", "sh", "-c", "nslookup example.test | grep -c 'Address.*203.0.113.1'"); strings.TrimSpace(got) != "1" {
		t.Errorf("the VM beside is answered %q", got)
	}
	return time.Since(asked)
}

const rudeVM = `
image: small
vmm: %s
vcpus: 1
memory: 128MiB
nameservers: [203.0.113.1]
overlay: {size: 64MiB}
volumes:
  - {name: state, mount: /var/lib/state, size: 32MiB}
shares:
  - {source: %s, mount: /inbox, readonly: %t}
run: {argv: [httpd, -f, -p, "8080", -h, /srv/www], user: app, ready: {tcp: 8080}, stop: {timeout: 5s}}
`

// rudeQueries is how many names the rude guest asks for.
const rudeQueries = 100

// TestRudeRootOfAGuest is root of a guest of clawvm's own init: it fills its disks,
// misuses its share of the host's file system, and floods its resolver.
func TestRudeRootOfAGuest(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	inbox := filepath.Join(t.TempDir(), "inbox")
	const owner = 12345
	if err := os.Mkdir(inbox, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(inbox, owner, owner); err != nil {
		t.Fatal(err)
	}
	// The way there is open to the owner, whom virtiofsd runs as.
	for dir := filepath.Dir(inbox); dir != "/" && dir != "/tmp"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w.declare(t, "rude", fmt.Sprintf(rudeVM, vmmName(), inbox, false))
	t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "rude") })
	writable := true
	if r := w.clawvm(t, "up", "rude"); r.code != 0 && strings.Contains(r.stderr, "would let the guest write as the host's root") {
		// An old virtiofsd can't squash owners, and a writable share is refused.
		writable = false
		w.declare(t, "rude", fmt.Sprintf(rudeVM, vmmName(), inbox, true))
		w.must(t, "up", "rude")
	} else if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	root := func(t *testing.T, script string) result {
		t.Helper()
		return w.clawvm(t, "exec", "--root", "rude", "--", "sh", "-c", script)
	}

	t.Run("full disks", func(t *testing.T) {
		for _, dir := range []string{"/srv", "/var/lib/state"} {
			if r := root(t, "dd if=/dev/zero of="+dir+"/fill bs=1M; sync; df "+dir+" | tail -n 1"); !strings.Contains(r.stdout+r.stderr, "No space left") {
				t.Errorf("%s does not get full: %+v", dir, r)
			}
		}
		if used := diskUse(t, filepath.Join(w.root, "var/lib/clawvm/vms/rude")); used > 100<<20 {
			t.Errorf("the disks take %.1f MiB of the host, and 96 are declared", mib(used))
		}
		if r := root(t, "rm /srv/fill /var/lib/state/fill && echo x > /srv/again && cat /srv/again"); strings.TrimSpace(r.stdout) != "x" {
			t.Errorf("after that the guest can't write: %+v", r)
		}
	})
	t.Run("share", func(t *testing.T) {
		r := root(t, `cd /inbox
echo x > plain
cp /bin/busybox setuid; chmod 6777 setuid
mknod disk b 8 0; mknod null c 1 3; mkfifo fifo
ln -s /etc/shadow shadow; ln -s ../../../../../../etc/passwd up; ln -s . loop
chown 0:0 plain; ln plain hard
mount -o remount,suid,dev /inbox
i=0; while [ $i -lt 2000 ]; do : > many.$i; i=$((i+1)); done
i=3; while [ $i -lt 900 ]; do eval "exec $i< many.$i" || break; i=$((i+1)); done
cat up > /dev/null
umount -l /inbox; echo done`)
		if writable && !strings.Contains(r.stdout, "done") {
			t.Errorf("%+v", r)
		}
		names := 0
		err := filepath.WalkDir(inbox, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st syscall.Stat_t
			if err := syscall.Lstat(path, &st); err != nil {
				return err
			}
			names++
			if st.Uid != owner || st.Gid != owner {
				t.Errorf("%s belongs to %d:%d on the host, and the share's owner is %d", path, st.Uid, st.Gid, owner)
			}
			if kind := d.Type(); kind&(fs.ModeDevice|fs.ModeCharDevice) != 0 {
				t.Errorf("%s is a device on the host", path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if !writable && names != 1 {
			t.Errorf("a read-only share holds %d names", names-1)
		}
		if writable && names < 2000 {
			t.Errorf("the share holds %d names: the guest could not misuse it", names)
		}
		if r := w.clawvm(t, "exec", "rude", "true"); r.code != 0 {
			t.Errorf("the guest is gone: %+v", r)
		}
	})
	t.Run("names without an end", func(t *testing.T) {
		// In parallel, as many as the guest's memory bears.
		root(t, fmt.Sprintf(`i=0; while [ $i -lt %d ]; do nslookup flood-$i.test >/dev/null 2>&1 & i=$((i+1)); [ $((i %% 20)) = 0 ] && wait; done; wait`, rudeQueries))
		eventually(t, "each query is in the log, or counted as lost", 30*time.Second, func() bool {
			seen, lost := map[string]bool{}, 0
			for line := range strings.Lines(w.must(t, "net", "--json", "rude")) {
				var e struct {
					Kind, Name string
					Count      int
				}
				if err := json.Unmarshal([]byte(line), &e); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				if e.Kind == "query" && strings.HasPrefix(e.Name, "flood-") {
					seen[e.Name] = true
				}
				if e.Kind == "dropped" {
					lost += e.Count
				}
			}
			return len(seen)+lost >= rudeQueries
		})
	})
	t.Run("what it cost", func(t *testing.T) {
		most := map[string]int64{}
		w.weigh(t, "rude", most)
		bounded(t, most, 16<<20)
	})
	t.Run("a network flood", func(t *testing.T) {
		w.declare(t, "beside", fmt.Sprintf(besideVM, vmmName()))
		t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "beside") })
		w.must(t, "up", "beside")
		w.must(t, "cp", "--root", buildForGuest(t, "hostile/flood"), "rude:/srv")
		for kind, to := range map[string]string{"dns": "192.168.83.1", "connect": shared.Internet.Addr().String()} {
			most := map[string]int64{}
			var worst time.Duration
			sent := make(chan string, 1)
			go func() {
				r := w.clawvm(t, "exec", "--root", "rude", "--", "/srv/flood", kind, strconv.Itoa(floodSeconds), to)
				sent <- strings.TrimSpace(r.stdout) + r.stderr
			}()
			connections, count := 0, ""
			for count == "" {
				w.weigh(t, "rude", most)
				worst = max(worst, w.asksBeside(t))
				raw, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
				if err != nil {
					t.Fatal(err)
				}
				n, err := strconv.Atoi(strings.TrimSpace(string(raw)))
				if err != nil {
					t.Fatal(err)
				}
				connections = max(connections, n)
				select {
				case count = <-sent:
				default:
				}
			}
			if n, err := strconv.Atoi(count); err != nil || n < 100 { // emulated, on a busy machine
				t.Errorf("%s: the guest sent %q packets", kind, count)
			}
			if connections > floodConnections {
				t.Errorf("%s: the host tracks %d connections, at most %d are allowed", kind, connections, floodConnections)
			}
			if worst > besideLimit {
				t.Errorf("%s: the VM beside took %s to answer", kind, worst)
			}
			t.Logf("%s: %s packets, %d connections tracked, an exec with a query in the VM beside took %s at most", kind, count, connections, worst.Round(time.Millisecond))
			bounded(t, most, floodLogs)
		}
		if s := w.status(t, "rude"); s.State != "ready" {
			t.Errorf("the VM is %s", s.State)
		}
	})
	w.must(t, "down", "rude")
}

// What a flood of packets may cost the host.
const (
	floodSeconds     = 5
	floodConnections = network.ConnectionsMax + 500 // of all VMs, and those that are forgotten only later
	floodLogs        = 80 << 20                     // bytes: the network log is four files of 16 MiB while it rotates
)

// bounded looks that what was weighed is not too much.
func bounded(t *testing.T, most map[string]int64, logs int64) {
	t.Helper()
	for kind, size := range most {
		t.Logf("%s: %.1f MiB", kind, mib(size))
		if slices.Contains([]string{"supervisor", "gate", "virtiofsd"}, kind) && size > hostileProcess {
			t.Errorf("%s takes %.1f MiB, at most %.1f are allowed", kind, mib(size), mib(hostileProcess))
		}
	}
	if most["logs"] > logs {
		t.Errorf("the logs take %.1f MiB, at most %.1f are allowed", mib(most["logs"]), mib(logs))
	}
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// treeSize is the length of all files below dir.
func treeSize(t *testing.T, dir string) (size int64) {
	t.Helper()
	return sumTree(t, dir, func(st *syscall.Stat_t) int64 { return st.Size })
}

// diskUse is what all files below dir take of the disk.
func diskUse(t *testing.T, dir string) (size int64) {
	t.Helper()
	return sumTree(t, dir, func(st *syscall.Stat_t) int64 { return st.Blocks * 512 })
}

func sumTree(t *testing.T, dir string, of func(*syscall.Stat_t) int64) (size int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		var st syscall.Stat_t
		// A log may be renamed or removed at any moment.
		if err == nil && d.Type().IsRegular() && syscall.Lstat(path, &st) == nil {
			size += of(&st)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return size
}
