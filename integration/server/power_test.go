package server

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/integration/soak"
	"github.com/clawvm/clawvm/integration/world"
)

const (
	// upTakes is how long a start takes on the server, where this machine does nothing else.
	upTakes = 10 * time.Second
	// powerLimit bounds one thing that is done on the server: see upTakes.
	powerLimit = 6 * time.Minute
	// nothingLeft is what gc says when there is nothing to do.
	nothingLeft = "nothing was left behind\n"
)

// powered is a server whose power fails.
type powered struct {
	*emuhost.Host
	options emuhost.Options
	rounds  *soak.Rounds
	clean   map[string][]string // the host with the VM down in order
	secret  string              // what clawvm generated, until it may be another
	port    int                 // that the declaration publishes
	synced  int                 // the highest record that was ever reported
	slow    float64             // how many times longer than upTakes a start takes
}

// atPowerLoss is what is done when the power fails.
type atPowerLoss struct {
	name    string
	prepare string        // a script that comes first
	up      bool          // the VM is up then
	script  string        // what is under way; "": nothing
	span    time.Duration // how long that takes where a start takes upTakes: the power fails within
}

var powerLosses = []atPowerLoss{
	{name: "up", script: "clawvm up soak", span: 12 * time.Second},
	// With overlay, secrets, lease and the files that the kernel is booted from all to be made; volumes are kept.
	{name: "first up", prepare: "clawvm rm soak; rm -r /var/lib/clawvm/boot", script: "clawvm up soak", span: 14 * time.Second},
	{name: "running", up: true, span: 5 * time.Second},
	{name: "down", up: true, script: "clawvm down soak", span: 1200 * time.Millisecond},
	{name: "reload", up: true, script: "clawvm reload soak", span: 600 * time.Millisecond},
	{name: "exec", up: true, script: "clawvm exec soak -- sh -c 'head -c 3000000 /dev/urandom | md5sum'", span: 2 * time.Second},
	{name: "cp", up: true, script: "clawvm cp soak:/bin/busybox /root/copy && clawvm cp /root/copy soak:/tmp/copy", span: 3 * time.Second},
	{name: "import", script: "clawvm image import /root/other other", span: 1200 * time.Millisecond},
	{name: "rm", script: "clawvm rm soak", span: 300 * time.Millisecond},
}

// TestPowerLoss fails the power of a server again and again, at a random moment of what is done with a VM, on a disk that
// loses what was not flushed to it. After each, one `up` works, the volume holds every record that anybody was told was synced, what
// clawvm generated is what it was, and after `down` the host is as after any other `down`. It takes two minutes a
// round, so it has to be asked for.
func TestPowerLoss(t *testing.T) {
	rounds := soak.LoadRounds(t, ".power", soak.Number(t, "CLAWVM_SOAK_POWER", 0))
	if rounds.Total == 0 {
		t.Skip("takes two minutes a round: CLAWVM_SOAK_POWER=10 asks for ten")
	}
	p := &powered{rounds: rounds, port: 18090}
	p.options = emuhost.Options{Disk: filepath.Join(t.TempDir(), "server.raw"), Loss: rand.New(rand.NewPCG(rounds.Seed, uint64(rounds.Done)))}
	name := chosenVMM()
	t.Logf("under %s", name)
	p.boot(t)
	p.install(t)
	p.declare(t, name)
	began := time.Now()
	p.sh(t, "clawvm up soak")
	p.slow = max(1, float64(time.Since(began))/float64(upTakes))
	p.synced = soak.Synced(p.sh(t, "until clawvm logs soak | grep -q 'synced 1'; do sleep 0.2; done; clawvm logs soak"))
	p.sh(t, "clawvm down soak")
	p.clean = p.look(t)

	// Each thing comes once before one comes again.
	order := rand.New(rand.NewPCG(rounds.Seed, 0)).Perm(len(powerLosses))
	for rounds.Done < rounds.Total {
		loss := powerLosses[order[rounds.Done%len(order)]]
		began := time.Now()
		what := p.round(t, loss, name)
		if t.Failed() {
			t.Fatalf("%s\n%s", what, p.lastWords(t))
		}
		rounds.Finish(t, loss.name)
		t.Logf("%s (%s, %d records)", what, time.Since(began).Round(time.Second), p.synced)
	}
}

func (p *powered) round(t *testing.T, loss atPowerLoss, name string) (what string) {
	rnd := p.rounds.Draw()
	enabled := rnd.IntN(2) == 0
	// As an administrator who looks that it is written; that is not what is tried here.
	p.sh(t, map[bool]string{true: "clawvm enable soak; sync", false: "clawvm disable soak; sync"}[enabled])
	if loss.prepare != "" {
		p.sh(t, loss.prepare)
	}
	if strings.Contains(loss.prepare+loss.script, "clawvm rm") {
		p.secret = "" // rm forgets it
	}
	if loss.up {
		p.sh(t, "clawvm up soak")
	}
	if loss.name == "reload" {
		p.port = 18090 + (p.port-18089)%2
		p.declare(t, name)
	}
	delay := time.Duration(float64(rnd.Int64N(int64(loss.span))) * p.slow)
	said, over, cached, lost := p.fail(t, loss.script, delay)
	what = fmt.Sprintf("round %d of seed %d: power lost during %s, %s after its begin, %s; %d of %d pages in the disk's cache are lost",
		p.rounds.Done+1, p.rounds.Seed, loss.name, delay.Round(time.Millisecond), map[bool]string{true: "enabled", false: "not enabled"}[enabled], lost, cached)
	if over {
		what += "; it was done by then"
	}
	if said != "" {
		what += "; clawvm said: " + strings.ReplaceAll(said, "\n", " | ")
	}

	p.boot(t)
	recovered := p.sh(t, "dmesg | grep -c 'EXT4-fs.*recovery complete' || true")
	what += "; journals recovered: " + strings.TrimSpace(recovered)
	if rnd.IntN(2) == 0 && !enabled {
		what += "; gc: " + strings.ReplaceAll(strings.TrimSpace(p.sh(t, "clawvm gc")), "\n", ", ")
	}
	p.sh(t, "clawvm up soak")
	if err := soak.Check(p.sh(t, "clawvm exec soak cat "+soak.Records), p.synced); err != nil {
		t.Errorf("%v", err)
	}
	secret := p.sh(t, "clawvm exec soak sha256sum /run/secrets/made")
	if p.secret != "" && secret != p.secret {
		t.Errorf("the secret that clawvm generated is another: %s, was %s", secret, p.secret)
	}
	p.secret = secret
	if loss.name == "import" {
		p.sh(t, "clawvm image import /root/other other && clawvm image rm other")
	}
	p.sh(t, "clawvm down soak")
	world.Compare(t, p.clean, p.look(t))
	if out := p.sh(t, "clawvm gc"); out != nothingLeft {
		t.Errorf("gc after a down in order: %s", out)
	}
	return what
}

// fail runs a script, and fails the power after the delay. It returns what the script had said, and whether it was over.
func (p *powered) fail(t *testing.T, script string, delay time.Duration) (said string, over bool, cached, lost int) {
	t.Helper()
	var follow, out collector
	var running sync.WaitGroup
	var done atomic.Bool
	for to, script := range map[*collector]string{
		// What has left the server can't be taken back: that counts as reported.
		&follow: "exec tail -n +1 -F /var/log/clawvm/soak/guest/workload.log 2>/dev/null",
		&out:    script,
	} {
		if script == "" {
			continue
		}
		running.Go(func() {
			// It ends with the power, or before.
			p.Exec(context.Background(), emuhost.Command{Argv: []string{"bash", "-c", script}, Stdout: to, Stderr: to})
			if to == &out {
				done.Store(true)
			}
		})
	}
	// The moment is drawn, and not what happens then: that is the point.
	<-time.After(delay)
	over = done.Load()
	cached, lost, err := p.PowerOff()
	if err != nil {
		t.Fatal(err)
	}
	running.Wait()
	p.synced = max(p.synced, soak.Synced(follow.String()))
	return strings.TrimSpace(out.String()), over, cached, lost
}

// collector keeps what is written to it.
type collector struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (c *collector) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all.Write(p)
}

func (c *collector) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all.String()
}

func (p *powered) boot(t *testing.T) {
	t.Helper()
	p.Host = emuhost.Start(t, p.options)
	loadDevices(t, p.Host)
}

// sh runs a script on the server and returns what it prints on standard output.
func (p *powered) sh(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), powerLimit)
	defer cancel()
	out, errs, code, err := p.Script(ctx, script)
	if err != nil || code != 0 {
		t.Fatalf("round %d of seed %d: exit code %d, %v of\n%s\nwhich says\n%s%s\n%s", p.rounds.Done+1, p.rounds.Seed, code, err, script, out, errs, p.lastWords(t))
	}
	return out
}

func (p *powered) lastWords(t *testing.T) string {
	ctx, cancel := context.WithTimeout(context.Background(), powerLimit)
	defer cancel()
	out, _, _, err := p.Script(ctx, "exec 2>&1; clawvm status soak || true; journalctl -b --no-pager -n 40 -u 'clawvm@*' || true; tail -n 20 /var/log/clawvm/*/*.log /var/log/clawvm/*/guest/console.log; ls -lR /var/lib/clawvm/vms || true")
	if err != nil {
		return err.Error()
	}
	return out
}

// install puts clawvm on the server as `make install` does, with its units.
func (p *powered) install(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), powerLimit)
	defer cancel()
	copyIn(ctx, t, p.Host, map[string]string{
		"/": made(ctx, t), "/root/small": world.SmallImage(t, soak.Image), "/root/other": world.SmallImage(t),
	})
	p.sh(t, "systemctl daemon-reload; clawvm image import /root/small small; sync")
}

// declare writes the declaration as an editor does that takes care.
func (p *powered) declare(t *testing.T, name string) {
	t.Helper()
	p.sh(t, fmt.Sprintf("cat >/etc/clawvm/.new <<'END'\n%sEND\nsync /etc/clawvm/.new; mv /etc/clawvm/.new /etc/clawvm/vms/soak.yaml; sync", soak.Declaration(name, p.port)))
}

// look is what the server has: of its mounts what is clawvm's, and all that lies in clawvm's directories but for the images' own
// files and what is logged.
func (p *powered) look(t *testing.T) map[string][]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), powerLimit)
	defer cancel()
	run := func(argv ...string) (string, error) {
		out, errs, code, err := p.Run(ctx, argv...)
		if err == nil && code != 0 {
			err = fmt.Errorf("exit code %d: %s", code, errs)
		}
		return out, err
	}
	shot, err := world.Look("/", run)
	if err != nil {
		t.Fatal(err)
	}
	shot["mounts"] = slices.DeleteFunc(shot["mounts"], func(line string) bool { return !strings.Contains(line, "clawvm") })
	shot["files"] = strings.Split(p.sh(t, `find /etc/clawvm /run/clawvm /var/lib/clawvm -name rootfs -prune -o -printf '%y %p\n'`), "\n")
	return shot
}
