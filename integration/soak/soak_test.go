package soak

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/world"
)

func TestMain(m *testing.M) { world.Main(m) }

// rounds is how many there are when nobody says otherwise: three minutes.
const rounds = 10

// TestKilledAtRandom kills a random process of a VM at a random moment of what is
// done with it, round after round. After each, one `up` works, the volume holds
// every record that was reported as synced, and after `down` the host is as it
// was before.
func TestKilledAtRandom(t *testing.T) {
	w := world.New(t)
	w.PrepareStore(t, Image)
	s := LoadRounds(t, "", Number(t, "CLAWVM_SOAK_ROUNDS", rounds))
	port := 18090
	declare := func() { w.Declare(t, "soak", Declaration(world.VMM(), port)) }
	declare()
	t.Cleanup(func() { w.Clawvm(t, "down", "--timeout", "1s", "soak") })
	w.Must(t, "up", "soak")
	world.Eventually(t, "the first record is reported", time.Minute, func() bool {
		return strings.Contains(w.Must(t, "logs", "soak"), "synced 1")
	})
	w.Must(t, "down", "soak")
	clean := w.Snapshot(t)
	r := round{w: w}

	for s.Done < s.Total {
		r.rnd = s.Draw()
		moment := moments[r.rnd.IntN(len(moments))]
		victim := victims[r.rnd.IntN(len(victims))]
		began := time.Now()
		if moment.up {
			w.Must(t, "up", "soak")
		}
		if moment.name == "reload" {
			port = 18090 + (port-18089)%2
			declare()
		}
		what, delay := r.strike(t, moment, victim)
		what = fmt.Sprintf("round %d of seed %d: %s, %s after its begin", s.Done+1, s.Seed, what, delay.Round(time.Millisecond))
		if r.rnd.IntN(3) == 0 {
			w.Must(t, "gc")
			what += ", then gc"
		}
		if res := w.Clawvm(t, "up", "soak"); res.Code != 0 {
			t.Fatalf("%s: up ends with %d: %s%s%s", what, res.Code, res.Stdout, res.Stderr, w.LastWords([]string{"soak"}))
		}
		if n := len(w.Processes(t, "soak")["vmm"]); n != 1 {
			t.Errorf("%s: %d VMMs run, want one", what, n)
		}
		r.verify(t, what)
		w.Must(t, "down", "soak")
		w.Compare(t, clean, w.Snapshot(t))
		if t.Failed() {
			t.Fatal(what)
		}
		s.Finish(t, moment.name+"/"+victim)
		t.Logf("%s (%s, %d records)", what, time.Since(began).Round(100*time.Millisecond), r.synced)
	}
}

// moment is what is done when the kill comes.
type moment struct {
	name string
	up   bool          // the VM is up before
	args []string      // of clawvm; none: nothing is done
	span time.Duration // how long it takes at most, as a rule: the kill comes within
}

var moments = []moment{
	{name: "up", args: []string{"up", "soak"}, span: 8 * time.Second},
	{name: "running", up: true, span: time.Second},
	{name: "down", up: true, args: []string{"down", "soak"}, span: 2 * time.Second},
	{name: "reload", up: true, args: []string{"reload", "soak"}, span: time.Second},
	{name: "exec", up: true, args: []string{"exec", "soak", "--", "sh", "-c", "head -c 3000000 /dev/urandom | md5sum"}, span: 2 * time.Second},
	{name: "cp", up: true, args: []string{"cp", "soak:/bin/busybox", "/run/soak-copy"}, span: 2 * time.Second},
}

// victims are kinds of processes: world.Processes' but for the command line that
// is under way.
var victims = []string{"cli", "supervisor", "gate", "vmm", "virtiofsd", "all"}

type round struct {
	w      *world.World
	rnd    *rand.Rand
	synced int // the highest record that was ever reported
}

// strike does what moment says and kills victim meanwhile. It returns what it did.
func (r *round) strike(t *testing.T, m moment, victim string) (string, time.Duration) {
	t.Helper()
	delay := time.Duration(r.rnd.Int64N(int64(m.span)))
	var cmd *exec.Cmd
	var said bytes.Buffer
	ended := make(chan error, 1)
	if len(m.args) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), world.CommandLimit)
		defer cancel()
		cmd = exec.CommandContext(ctx, filepath.Join(r.w.Bin, "clawvm"), append([]string{"--root", r.w.Root}, m.args...)...)
		cmd.Stdout, cmd.Stderr = &said, &said
		cmd.WaitDelay = 10 * time.Second
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { ended <- cmd.Wait() }()
	}
	// The moment is drawn, and not what happens then: that is the point.
	<-time.After(delay)
	found := r.w.Processes(t, "soak")
	if cmd != nil {
		found["cli"] = []int{cmd.Process.Pid}
	}
	var pids []int
	switch victim {
	case "all":
		for _, kind := range found {
			pids = append(pids, kind...)
		}
	case "virtiofsd": // one of them, with the child that it has in its sandbox
		if all := found[victim]; len(all) > 0 {
			pids = []int{all[r.rnd.IntN(len(all))]}
		}
	default:
		pids = found[victim]
	}
	vmm := found["vmm"]
	if len(pids) == 0 {
		victim += " (none at that moment)"
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	how := ""
	if cmd != nil {
		select {
		case err := <-ended:
			how = fmt.Sprintf(", which ended with %v", err)
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatalf("%s: %v: %s", m.name, err, &said)
			}
		case <-time.After(world.CommandLimit):
			t.Fatalf("%s does not end after its %s was killed: %s", m.name, victim, &said)
		}
	}
	if err := os.RemoveAll("/run/soak-copy"); err != nil {
		t.Fatal(err)
	}
	// A supervisor takes a moment to see that a part is gone. Until then the VM
	// counts as up, and an up would rightly have nothing to do.
	if len(pids) > 0 && victim != "cli" {
		world.Eventually(t, "the supervisor sees that its "+victim+" is gone", time.Minute, func() bool {
			now := r.w.Processes(t, "soak")["vmm"]
			return r.w.Status(t, "soak").State != "ready" || len(now) > 0 && !slices.Equal(now, vmm)
		})
	}
	return fmt.Sprintf("%s killed during %s%s", victim, m.name, how), delay
}

// verify reads the volume: records without a gap, and none missing that was
// reported as synced.
func (r *round) verify(t *testing.T, what string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(r.w.Root, "var/log/clawvm/soak/guest/workload*.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		r.synced = max(r.synced, Synced(string(text)))
	}
	if err := Check(r.w.Must(t, "exec", "soak", "cat", Records), r.synced); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
