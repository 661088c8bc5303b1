package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// outcome is a way in which a command may end: its exit code, and a part of what
// it says.
type outcome struct {
	code int
	says string
}

// What commands may say when others are at work on the same VM.
var (
	isReady   = outcome{0, "is ready after"}
	isUp      = outcome{0, "is up already"}
	takenDown = outcome{1, "was taken down while it started"}
	isDown    = outcome{0, "is down after"}
	wasDown   = outcome{0, "is down already"}
	removed   = outcome{0, "is removed"}
	runs      = outcome{1, "it runs; "}
	collected = outcome{0, ""}
	reloaded  = outcome{0, "nothing has changed"}
	stops     = outcome{1, "it is stopping"}
	notUp     = outcome{3, "not running"}
	endsNow   = outcome{3, "ended before it answered"}
)

// is says whether the command ended so.
func (r result) is(o outcome) bool {
	return r.code == o.code && strings.Contains(r.stdout+r.stderr, o.says)
}

// atOnce is a world in which commands are given to one VM, vm, at once.
type atOnce struct {
	*hollowWorld
	clean map[string][]string // when it is down
	took  map[string]time.Duration
}

// moments is how many moments of the first command there are at which the second
// one is given.
const moments = 6

// at gives first, and then second after a part of the time that the first takes
// alone; it returns how both ended, one of those that may be.
func (w *atOnce) at(t *testing.T, part int, first, second []string, firstMay, secondMay []outcome) (result, result) {
	t.Helper()
	firstEnd := w.start(nil, first...)
	// Which moment it is, is what the cases differ in.
	<-time.After(w.took[first[0]] * time.Duration(part) / moments)
	secondEnd := w.start(nil, second...)
	a := w.outcome(t, first, firstEnd, firstMay)
	return a, w.outcome(t, second, secondEnd, secondMay)
}

func (w *atOnce) outcome(t *testing.T, args []string, end func() (result, error), may []outcome) result {
	t.Helper()
	r, err := end()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(may, r.is) {
		t.Errorf("%s: exit code %d, which is none of %v\n%s%s%s", strings.Join(args, " "), r.code, may, r.stdout, r.stderr, w.LastWords([]string{"vm"}))
	}
	return r
}

// isIn looks for the VM's state, and for one process of each kind or none.
func (w *atOnce) isIn(t *testing.T, state string) {
	t.Helper()
	if s := w.status(t, "vm"); string(s.State) != state {
		t.Errorf("the VM is %s, want %s", s.State, state)
	}
	want := 0
	if state == "ready" {
		want = 1
	} else {
		w.ended(t)
	}
	for _, kind := range []string{"supervisor", "gate", "vmm"} {
		if n := len(w.processes(t, "vm")[kind]); n != want {
			t.Errorf("%d processes of kind %s, want %d", n, kind, want)
		}
	}
}

// isClean takes the VM down if it is up, and compares the host with how it was.
func (w *atOnce) isClean(t *testing.T) {
	t.Helper()
	w.down(t)
	w.unchanged(t, w.clean)
}

// TestAtOnce gives a VM commands that are in each other's way. Each of them ends in
// one of the ways that it may, and says so; the VM is what the last of them made of
// it, and nothing is left.
func TestAtOnce(t *testing.T) {
	w := &atOnce{hollowWorld: newHollowWorld(t, "/run/once", "bridge: oncebr\naddress: 192.168.87.1/24\n")}
	w.declare(t, "vm", w.expand(hollowVM))
	t.Cleanup(func() { w.hollowWorld.clean(t) })
	w.up(t)
	w.down(t)
	w.took = map[string]time.Duration{}
	for _, args := range [][]string{upVM, downVM, removeVM} {
		began := time.Now()
		if r := w.with(t, nil, args...); r.code != 0 {
			t.Fatalf("%s: %s", strings.Join(args, " "), r.stderr)
		}
		w.took[args[0]] = time.Since(began)
	}
	t.Logf("alone they take %v", w.took)
	w.up(t)
	w.down(t)
	w.clean = w.everything(t)

	t.Run("up and up", w.upAndUp)
	t.Run("up and down", w.upAndDown)
	t.Run("down and up", w.downAndUp)
	t.Run("up and rm", w.upAndRemove)
	t.Run("up and gc", w.upAndCollect)
	t.Run("up and whoever holds the lock", w.upAndHolder)
	t.Run("down and reload", w.downAndReload)
	t.Run("fifty", w.fifty)
}

var (
	upVM     = []string{"up", "vm"}
	downVM   = []string{"down", "vm"}
	removeVM = []string{"rm", "vm"}
	reloadVM = []string{"reload", "vm"}
)

func (w *atOnce) upAndUp(t *testing.T) {
	ends := make([]func() (result, error), 5)
	for i := range ends {
		ends[i] = w.start(nil, upVM...)
	}
	for _, end := range ends {
		w.outcome(t, upVM, end, []outcome{isReady, isUp})
	}
	w.isIn(t, "ready")
	w.isClean(t)
}

func (w *atOnce) upAndDown(t *testing.T) {
	for part := range moments {
		up, down := w.at(t, part, upVM, downVM, []outcome{isReady, takenDown}, []outcome{isDown, wasDown})
		switch {
		case down.is(wasDown) && !up.is(isReady):
			t.Errorf("moment %d: the VM was down already, and yet: %s", part, up.stderr)
		case down.is(wasDown):
			w.isIn(t, "ready")
		default:
			w.isIn(t, "stopped")
		}
		w.isClean(t)
	}
}

func (w *atOnce) downAndUp(t *testing.T) {
	for part := range moments {
		w.up(t)
		_, up := w.at(t, part, downVM, upVM, []outcome{isDown}, []outcome{isReady, isUp})
		if up.is(isReady) {
			w.isIn(t, "ready")
		} else {
			w.isIn(t, "stopped")
		}
		w.isClean(t)
	}
}

func (w *atOnce) upAndRemove(t *testing.T) {
	for part := range moments {
		w.at(t, part, upVM, removeVM, []outcome{isReady}, []outcome{removed, runs})
		w.isIn(t, "ready")
		if _, err := os.Stat(filepath.Join(w.root, "var/log/clawvm/vm/supervisor.log")); err != nil {
			t.Errorf("moment %d: the log: %v", part, err)
		}
		w.isClean(t)
	}
	// The other way round the start waits.
	for part := range moments {
		w.at(t, part, removeVM, upVM, []outcome{removed}, []outcome{isReady})
		w.isIn(t, "ready")
		w.isClean(t)
	}
}

// upAndCollect collects garbage all the time, with bridge and tables when no VM is
// up.
func (w *atOnce) upAndCollect(t *testing.T) {
	for _, collect := range [][]string{{"gc"}, {"gc", "--all"}} {
		stop, stopped := make(chan struct{}), make(chan int)
		go func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					stopped <- n
					return
				default:
				}
				if r, err := w.start(nil, collect...)(); err != nil || !r.is(collected) {
					t.Errorf("%v: %v, exit code %d: %s", collect, err, r.code, r.stderr)
				}
			}
		}()
		for range moments {
			w.up(t)
			w.isIn(t, "ready")
			w.down(t)
		}
		close(stop)
		t.Logf("%v was done %d times during %d starts", collect, <-stopped, moments)
		w.up(t) // which makes the bridge, when that is gone
		w.isClean(t)
	}
}

// upAndHolder holds the VM's lock as gc does, for longer.
func (w *atOnce) upAndHolder(t *testing.T) {
	lock, err := os.OpenFile(filepath.Join(w.root, "run/clawvm/vm/lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		may  outcome
	}{{upVM, isReady}, {removeVM, runs}} {
		end := w.start(nil, c.args...)
		if c.may == isReady {
			eventually(t, "the supervisor is there", 10*time.Second, func() bool { return len(w.processes(t, "vm")["supervisor"]) == 1 })
			if err := lock.Close(); err != nil {
				t.Fatal(err)
			}
		}
		w.outcome(t, c.args, end, []outcome{c.may})
	}
	w.isClean(t)
}

func (w *atOnce) downAndReload(t *testing.T) {
	for part := range moments {
		w.up(t)
		began := time.Now()
		w.at(t, part, downVM, reloadVM, []outcome{isDown}, []outcome{reloaded, stops, notUp, endsNow})
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("moment %d: both took %s", part, took)
		}
		w.isIn(t, "stopped")
		w.isClean(t)
	}
}

// manyVM is as little as a VM can be.
const manyVM = "image: small\nvmm: qemu\nmemory: 128MiB\noverlay: {tmpfs: 16MiB}\nrun: {argv: [sleep, \"1000\"], user: app}\n"

// fifty brings up fifty VMs, each by a command of its own.
func (w *atOnce) fifty(t *testing.T) {
	const number = 50
	names := make([]string, number)
	for i := range names {
		names[i] = fmt.Sprintf("many-%d", i)
		w.declare(t, names[i], manyVM)
	}
	began := time.Now()
	ends := make([]func() (result, error), number)
	for i, name := range names {
		ends[i] = w.start(nil, "up", name)
	}
	for i, end := range ends {
		w.outcome(t, []string{"up", names[i]}, end, []outcome{isReady})
	}
	t.Logf("%d VMs were ready after %s", number, time.Since(began).Round(time.Millisecond))
	for _, name := range names {
		if s := w.status(t, name); s.State != "ready" {
			t.Errorf("%s is %s", name, s.State)
		}
	}
	for _, verb := range []string{"down", "rm"} {
		if r := w.with(t, nil, append([]string{verb}, names...)...); r.code != 0 {
			t.Errorf("%s: exit code %d: %s", verb, r.code, r.stderr)
		}
	}
	for _, name := range names {
		remove(t, w.declaration(name))
	}
	w.unchanged(t, w.clean)
}
