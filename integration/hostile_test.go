package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	shared "github.com/clawvm/clawvm/integration/world"
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

// TestGuestThatLies boots a guest whose init is not clawvm's: it says that it is
// ready, and then sends events, log, console output and an exec's output without
// an end. Its own VM costs what it may, the VM beside it goes on, and down ends it.
func TestGuestThatLies(t *testing.T) {
	w := newWorld(t)
	if vmmName() != "qemu" {
		t.Skip("the lying init speaks on the port that QEMU has")
	}
	w.prepareStore(t)
	init := filepath.Join(t.TempDir(), "init")
	cmd := exec.Command("go", "build", "-trimpath", "-o", init, "github.com/clawvm/clawvm/integration/hostile")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the lying init: %v\n%s", err, out)
	}
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
	// A command whose output never ends, into a pipe that is read.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	endless := exec.CommandContext(ctx, filepath.Join(w.bin, "clawvm"), "--root", w.root, "exec", "liar", "x")
	if err := endless.Start(); err != nil {
		t.Fatal(err)
	}
	most := map[string]int64{}
	var worst time.Duration
	for began := time.Now(); time.Since(began) < hostileTime; {
		for kind, pids := range w.processes(t, "liar") {
			for _, pid := range pids {
				most[kind] = max(most[kind], shared.RssAnon(pid))
			}
		}
		most["logs"] = max(most["logs"], treeSize(t, filepath.Join(w.root, "var/log/clawvm/liar")))
		asked := time.Now()
		if got := w.must(t, "exec", "beside", "--", "sh", "-c", "nslookup example.test | grep -c 'Address.*203.0.113.1'"); strings.TrimSpace(got) != "1" {
			t.Errorf("the VM beside is answered %q", got)
		}
		worst = max(worst, time.Since(asked))
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
	if s := w.status(t, "liar"); s.State != "ready" {
		t.Errorf("the liar is %s", s.State)
	}
	if s := w.status(t, "beside"); s.State != "ready" {
		t.Errorf("the VM beside is %s", s.State)
	}
	w.must(t, "down", "--timeout", "2s", "liar")
	if left := w.processes(t, "liar"); len(left) != 0 {
		t.Errorf("left of the liar: %v", left)
	}
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
		for kind, pids := range w.processes(t, "rude") {
			for _, pid := range pids {
				size := shared.RssAnon(pid)
				t.Logf("%s: %.1f MiB", kind, mib(size))
				if slices.Contains([]string{"supervisor", "gate", "virtiofsd"}, kind) && size > hostileProcess {
					t.Errorf("%s takes %.1f MiB, at most %.1f are allowed", kind, mib(size), mib(hostileProcess))
				}
			}
		}
		if size := treeSize(t, filepath.Join(w.root, "var/log/clawvm/rude")); size > 16<<20 {
			t.Errorf("its logs take %.1f MiB", mib(size))
		}
	})
	w.must(t, "down", "rude")
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
