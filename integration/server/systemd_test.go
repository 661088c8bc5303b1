package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/integration/world"
	"github.com/clawvm/clawvm/vmm"
)

const (
	// unitLimit bounds what one thing under systemd takes in the emulated server: a
	// VM's start takes 10 s on an idle machine.
	unitLimit = 5 * time.Minute
	// unitPoll is how often it is asked whether it is done: each time costs the
	// emulated processors a tenth of a second.
	unitPoll = 500 * time.Millisecond
	// hardened is how much `systemd-analyze security` may leave a supervisor, of 10.
	hardened = 4.9
	// unitWatchdog is the watchdog's time here: short enough to wait for, and long
	// enough for a supervisor on a busy emulated processor, which may be late by seconds.
	unitWatchdog = 20 * time.Second
	// stopLimit is the unit's TimeoutStopSec=, in which a host that goes down has to
	// have ended its guests.
	stopLimit = 90 * time.Second
	// everyVMM asks for each thing under each VMM, and not by turns, and for a crash
	// loop, which is three starts: minutes more.
	everyVMM = "CLAWVM_TEST_UNITS"
)

// unitVM is a VM under systemd: secrets that systemd gives to its unit, in clear
// and encrypted, and one that another unit makes before it starts.
const unitVM = `
image: small
vmm: %s
vcpus: 1
memory: 192MiB
limits: {tasks: 200, cpuWeight: 50, memoryOverhead: 160MiB}
overlay: {tmpfs: 16MiB}
volumes:
  - {name: state, mount: /var/lib/state, size: 32MiB}
shares:
  - {source: /srv/inbox, mount: /inbox}
secrets:
  given: {credential: api-key}
  sealed: {credential: sealed-key}
  staged: {file: /run/staged/%s}
run:
  argv: [httpd, -f, -p, "8080", -h, /srv/www]
  user: app
  ready: {http: {port: 8080, path: /index.html}}
  stop: {timeout: 5s}
`

// stager is what an administrator writes to stage a secret before the VM starts.
const stager = `[Unit]
Description=stages a secret of %[1]s
Before=clawvm@%[1]s.service
[Service]
Type=oneshot
RemainAfterExit=yes
UMask=0077
ExecStart=sh -c 'mkdir -p /run/staged && echo staged for %[1]s >/run/staged/%[1]s'
[Install]
RequiredBy=clawvm@%[1]s.service
`

// dropIn gives the credentials, and a watchdog that a test can wait for.
const dropIn = `[Service]
LoadCredential=api-key:/etc/test-api-key
LoadCredentialEncrypted=sealed-key:/etc/test-sealed-key
WatchdogSec=%s
`

// unmindful is a configuration of systemd-networkd that takes all it sees.
const unmindful = "[Match]\nName=!lo\n[Network]\nAddress=10.99.99.9/24\n"

// units is a server with two VMs that systemd owns. Where there is a
// cloud-hypervisor, the second is under it.
type units struct {
	*emuhost.Host
	vmms map[string]string
}

// unitVMs are their names.
var unitVMs = []string{"alpha", "beta"}

// TestSystemd installs clawvm on a server as `make install` does, enables two VMs,
// reboots the server, and treats the VMs as an administrator treats units.
func TestSystemd(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "server.raw")
	u := &units{vmms: map[string]string{"alpha": vmm.QEMU, "beta": vmm.CloudHypervisor}}
	if cloudHypervisor() == "" {
		u.vmms["beta"] = vmm.QEMU
		t.Logf("both VMs are under QEMU: neither %s nor the PATH has a cloud-hypervisor to carry along", vmm.CloudHypervisorEnv)
	}
	u.Host = emuhost.Start(t, emuhost.Options{Disk: disk})
	u.step(t, "install", u.install)
	if t.Failed() {
		return
	}
	u.step(t, "verify", u.verify)
	u.step(t, "enable", u.enable)
	u.poweroff(t)

	u.Host = emuhost.Start(t, emuhost.Options{Disk: disk})
	u.step(t, "both are ready after a reboot", u.readyAfterReboot)
	if t.Failed() {
		return
	}
	u.step(t, "status and journal", u.statusAndJournal)
	u.step(t, "secrets", u.secrets)
	u.step(t, "a writable share", u.share)
	u.step(t, "limits", u.limits)
	u.step(t, "networkd leaves the links alone", u.networkd)
	u.step(t, "reload", u.reload)
	u.step(t, "up and down go by systemd", u.upAndDown)
	u.step(t, "a killed supervisor starts again", u.killed)
	u.step(t, "the watchdog sees what hangs and not what is paused", u.watchdog)
	u.step(t, "what is no use is not tried again", u.wrong)
	u.step(t, "a start that fails is tried again, up to a limit", u.startLimit)
	if os.Getenv(everyVMM) != "" {
		u.step(t, "a crash loop", u.crashLoop)
	}
	u.step(t, "the target ends all", u.target)
	u.step(t, "disable", u.disable)
	u.step(t, "poweroff", func(t *testing.T) { u.inOrder(t, disk) })
}

// step runs a part of the test, and says how long it took.
func (u *units) step(t *testing.T, name string, do func(*testing.T)) {
	t.Helper()
	began := time.Now()
	t.Run(name, do)
	t.Logf("%s: %s", name, time.Since(began).Round(time.Second))
}

// by is the VM under which a thing is tried, or both when that is asked for.
func (u *units) by(vm string) []string {
	if os.Getenv(everyVMM) != "" {
		return unitVMs
	}
	return []string{vm}
}

// sh runs a script in the server and returns all that it printed.
func (u *units) sh(t *testing.T, script string) string {
	t.Helper()
	out, code := u.try(t, script)
	if code != 0 {
		t.Fatalf("exit code %d of\n%s\nwhich says\n%s\n%s", code, script, out, u.lastWords(t))
	}
	return out
}

func (u *units) try(t *testing.T, script string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), unitLimit)
	defer cancel()
	out, _, code, err := u.Run(ctx, "bash", "-c", "{\n"+script+"\n} 2>&1")
	if err != nil {
		t.Fatalf("%s: %v", script, err)
	}
	return strings.TrimSpace(out), code
}

// lastWords is the end of the units' logs.
func (u *units) lastWords(t *testing.T) string {
	out, _ := u.try(t, "journalctl -b --no-pager -n 60 -u 'clawvm@*'; tail -n 20 /var/log/clawvm/*/*.log /var/log/clawvm/*/guest/console.log")
	return out
}

func (u *units) eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(unitLimit)
	for tick := time.NewTicker(unitPoll); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s\n%s", unitLimit, what, u.lastWords(t))
		}
	}
}

// show reads properties of a VM's unit.
func (u *units) show(t *testing.T, vm string, properties ...string) map[string]string {
	t.Helper()
	got := map[string]string{}
	for line := range strings.Lines(u.sh(t, "systemctl show "+host.Unit(vm)+" -p "+strings.Join(properties, ","))) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		got[key] = value
	}
	return got
}

// state is clawvm's own view of a VM.
func (u *units) state(t *testing.T, vm string) (e host.Entry) {
	t.Helper()
	out, _ := u.try(t, "clawvm status --json "+vm) // its exit code is the state
	if err := json.Unmarshal([]byte(out), &e); err != nil {
		t.Fatalf("clawvm status --json %s: %v\n%s", vm, err, out)
	}
	return e
}

// isReady says so where a VM is not.
func (u *units) isReady(t *testing.T, vm, when string) {
	t.Helper()
	if e := u.state(t, vm); e.State != host.Running || e.Health != host.HealthReady {
		t.Errorf("%s: %s is %s, %s: %s", when, vm, e.State, e.Health, e.Why)
	}
}

func (u *units) install(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), unitLimit)
	defer cancel()
	dest := made(ctx, t)
	write := func(path, text string) {
		t.Helper()
		file := filepath.Join(dest, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("etc/test-api-key", "from systemd\n")
	write("etc/systemd/network/10-all.network", unmindful)
	for _, vm := range unitVMs {
		write("etc/clawvm/vms/"+vm+".yaml", fmt.Sprintf(unitVM, u.vmms[vm], vm))
		write("etc/systemd/system/stage-"+vm+".service", fmt.Sprintf(stager, vm))
		write("etc/systemd/system/"+host.Unit(vm)+".d/test.conf", fmt.Sprintf(dropIn, unitWatchdog))
	}
	copyIn(ctx, t, u.Host, map[string]string{"/": dest, "/root/small": world.SmallImage(t)})
	uninstalled(t, dest)
	// Nobody but the unit loads KVM: udev knows no module for an emulated processor.
	u.sh(t, "systemctl daemon-reload; systemctl enable systemd-networkd; clawvm image import /root/small small")
	u.sh(t, "install -d -o 1000 -g 1000 /srv/inbox")
	// By the host's own key; the emulated server has no TPM.
	u.sh(t, "systemd-creds setup && echo sealed on this host | systemd-creds encrypt --with-key=host --name=sealed-key - /etc/test-sealed-key && ! grep -q 'sealed on' /etc/test-sealed-key")
}

// uninstalled takes away what was put in place, and looks for what is left.
func uninstalled(t *testing.T, dest string) {
	t.Helper()
	out, err := exec.Command("make", "-s", "-C", "../..", "uninstall", "DESTDIR="+dest).CombinedOutput()
	if err != nil || !strings.Contains(string(out), dest+"/etc/clawvm is left; it is yours") {
		t.Errorf("make uninstall: %v\n%s", err, out)
	}
	err = filepath.WalkDir(filepath.Join(dest, "usr"), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("make uninstall left %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dest, "etc/clawvm/vms/*.yaml")); err != nil || len(left) == 0 {
		t.Errorf("make uninstall took the declarations: %v", err)
	}
}

// verify has systemd's own tools look at the units.
func (u *units) verify(t *testing.T) {
	if out, code := u.try(t, "systemd-analyze verify clawvm@alpha.service clawvm.target clawvm.slice"); code != 0 || out != "" {
		t.Errorf("systemd-analyze verify ends with %d and says\n%s", code, out)
	}
	out := u.sh(t, "systemd-analyze security --no-pager clawvm@alpha.service")
	m := regexp.MustCompile(`Overall exposure level for clawvm@alpha.service: ([0-9.]+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("systemd-analyze security says\n%s", out)
	}
	level, err := strconv.ParseFloat(m[1], 64)
	if err != nil || level > hardened {
		t.Errorf("the exposure level is %s, want %.1f at most:\n%s", m[1], hardened, out)
	}
	t.Logf("the exposure level is %s (%s)", m[1], strings.SplitN(u.sh(t, "systemctl --version"), "\n", 2)[0])
}

func (u *units) enable(t *testing.T) {
	all := strings.Join(unitVMs, " ")
	u.sh(t, "systemctl enable $(printf 'stage-%s.service ' "+all+")")
	if out := u.sh(t, "clawvm enable "+all); strings.Count(out, "is enabled") != len(unitVMs) {
		t.Errorf("clawvm enable says\n%s", out)
	}
	for _, vm := range unitVMs {
		if out := u.sh(t, "systemctl is-enabled "+host.Unit(vm)); out != "enabled" {
			t.Errorf("%s is %s", vm, out)
		}
		if e := u.state(t, vm); !e.Enabled || e.State != host.Stopped {
			t.Errorf("clawvm status says %+v", e)
		}
	}
	if out, code := u.try(t, "clawvm enable nothing"); code != host.ExitNoSuchVM {
		t.Errorf("a VM that nothing declares: exit code %d, %s", code, out)
	}
}

// poweroff ends the server as its administrator does, and says how long that took.
func (u *units) poweroff(t *testing.T) time.Duration {
	t.Helper()
	began := time.Now()
	// The answer may be lost with the server that is asked.
	ctx, cancel := context.WithTimeout(t.Context(), unitLimit)
	defer cancel()
	_, _, _, err := u.Run(ctx, "systemctl", "poweroff", "--no-block")
	select {
	case <-u.Done():
	case <-ctx.Done():
		t.Fatalf("the server does not go off: %v", errors.Join(err, ctx.Err()))
	}
	return time.Since(began)
}

func (u *units) readyAfterReboot(t *testing.T) {
	for _, vm := range unitVMs {
		u.eventually(t, vm+" is active", func() bool {
			p := u.show(t, vm, "ActiveState", "SubState", "NRestarts")
			if p["ActiveState"] == "failed" {
				t.Fatalf("%s is %v\n%s", vm, p, u.lastWords(t))
			}
			return p["ActiveState"] == "active"
		})
		// The kernel of an emulated server on a busy machine may be too slow for a
		// guest's limits; that is tried again, and nothing else may have been.
		again, slow := u.show(t, vm, "NRestarts")["NRestarts"], u.sh(t, "journalctl --no-pager -b -o cat -u "+host.Unit(vm)+" | grep -c ': not within 1m0s$' || true")
		if again != slow {
			t.Errorf("%s was started again %s times, %s times for want of time\n%s", vm, again, slow, u.lastWords(t))
		}
		u.isReady(t, vm, "it is active")
		if e := u.state(t, vm); e.VMM != u.vmms[vm] || !e.Enabled {
			t.Errorf("%s is active under %s, want %s; enabled: %t", vm, e.VMM, u.vmms[vm], e.Enabled)
		}
	}
	t.Log(u.sh(t, "systemd-analyze time; clawvm ls"))
}

func (u *units) statusAndJournal(t *testing.T) {
	for _, vm := range unitVMs {
		out := u.sh(t, "systemctl status --no-pager "+host.Unit(vm))
		if !regexp.MustCompile(`Status: "ready at 192\.168\.83\.[0-9]+ \(`).MatchString(out) || !strings.Contains(out, "clawvm.slice") {
			t.Errorf("systemctl status says\n%s", out)
		}
		journal := u.sh(t, "journalctl --no-pager -b -o cat -u "+host.Unit(vm))
		file := u.sh(t, "clawvm logs --supervisor "+vm)
		for _, want := range []string{"guest: ", "ready"} {
			if !strings.Contains(journal, want) || !strings.Contains(file, want) {
				t.Errorf("%q is missing in the journal\n%s\nor in the log\n%s", want, journal, file)
			}
		}
	}
}

func (u *units) secrets(t *testing.T) {
	for _, vm := range unitVMs {
		out := u.sh(t, "clawvm exec "+vm+" -- sh -c 'cd /run/secrets && cat given sealed staged'")
		if want := "from systemd\nsealed on this host\nstaged for " + vm; out != want {
			t.Errorf("%s has the secrets %q, want %q", vm, out, want)
		}
		ls := u.sh(t, "clawvm secret ls "+vm)
		if !strings.Contains(ls, "credential api-key") || !strings.Contains(ls, "credential sealed-key") || strings.Contains(ls, "cannot") {
			t.Errorf("secret ls says\n%s", ls)
		}
		// Nowhere else: not in what the unit or its processes show. (Nor does this
		// command itself hold what it looks for.)
		if out, code := u.try(t, "grep -las -e '[f]rom systemd' -e '[s]ealed on' -r /proc/[0-9]*/environ /proc/[0-9]*/cmdline /run/clawvm /var/log/clawvm; systemctl show "+host.Unit(vm)+" | grep -e '[f]rom systemd' -e '[s]ealed on'"); code == 0 || out != "" {
			t.Errorf("a secret is to be found in %s", out)
		}
	}
}

// share has the guests write to a directory of the server, whose owner virtiofsd is
// in a namespace of its own.
func (u *units) share(t *testing.T) {
	for _, vm := range unitVMs {
		u.sh(t, "clawvm exec "+vm+" -- sh -c 'echo written by "+vm+" >/inbox/"+vm+"'")
		if out := u.sh(t, "cat /srv/inbox/"+vm+"; stat -c %u:%g /srv/inbox/"+vm); out != "written by "+vm+"\n1000:1000" {
			t.Errorf("the share has\n%s", out)
		}
	}
}

// limits looks at the declared limits where the kernel keeps them.
func (u *units) limits(t *testing.T) {
	for _, vm := range unitVMs {
		e := u.state(t, vm)
		if want := "/clawvm.slice/" + host.Unit(vm); e.Limits == nil || e.Limits.Cgroup != want {
			t.Errorf("the limits of %s are %+v, want them in %s", vm, e.Limits, want)
			continue
		}
		dir := "/sys/fs/cgroup" + e.Limits.Cgroup
		for file, want := range map[string]string{
			"vm/memory.max": strconv.Itoa((192 + 160) << 20), "vm/memory.swap.max": "0", "vm/pids.max": "200", "cpu.weight": "50",
			"cgroup.procs": "", "supervisor/cgroup.procs": strconv.Itoa(e.PID), "gate/pids.max": "256",
		} {
			if got := u.sh(t, "cat "+dir+"/"+file); got != want {
				t.Errorf("%s of %s is %q, want %q", file, vm, got, want)
			}
		}
		// The VMM and the virtiofsd of image, secrets and share; by their scores they go
		// before the supervisor, which has the unit's.
		scores := strings.Fields(u.sh(t, "for p in $(cat "+dir+"/vm/cgroup.procs); do cat /proc/$p/oom_score_adj; done"))
		if len(scores) < 4 || slices.ContainsFunc(scores, func(s string) bool { return s != "400" }) {
			t.Errorf("the processes of %s in its leaf have the scores %v", vm, scores)
		}
		if out := u.sh(t, fmt.Sprintf("cat /proc/%d/oom_score_adj; sed -n 's/^Max core file size *//p' /proc/%[1]d/limits", e.PID)); strings.Join(strings.Fields(out), " ") != "-100 1 1 bytes" {
			t.Errorf("the supervisor of %s has the score and the core limit %q", vm, out)
		}
	}
}

func (u *units) networkd(t *testing.T) {
	if out := u.sh(t, "systemctl is-active systemd-networkd"); out != "active" {
		t.Fatalf("systemd-networkd is %s", out)
	}
	u.sh(t, "systemctl restart systemd-networkd")
	out := u.sh(t, "networkctl list --no-pager --no-legend")
	n := 0
	for line := range strings.Lines(out) {
		if strings.Contains(line, "microbr") || strings.Contains(line, " claw") {
			n++
			if !strings.Contains(line, "unmanaged") {
				t.Errorf("networkd manages it: %s", line)
			}
		}
	}
	if n != 1+len(unitVMs) {
		t.Errorf("there are %d of our links:\n%s", n, out)
	}
	if out := u.sh(t, "ip -4 -o addr show dev microbr"); !strings.Contains(out, "192.168.83.1/24") || strings.Contains(out, "10.99.99.9") {
		t.Errorf("the bridge has\n%s", out)
	}
}

func (u *units) reload(t *testing.T) {
	for _, vm := range u.by("alpha") {
		file := "/run/staged/" + vm
		u.sh(t, "umask 077; echo staged anew >"+file+".new && mv "+file+".new "+file+" && systemctl reload "+host.Unit(vm))
		if out := u.sh(t, "clawvm exec "+vm+" -- cat /run/secrets/staged"); out != "staged anew" {
			t.Errorf("after a reload %s has %q", vm, out)
		}
		if out := u.sh(t, "echo 'ports: [\"127.0.0.1:18080:8080\"]' >>/etc/clawvm/vms/"+vm+".yaml; systemctl reload "+host.Unit(vm)+"; clawvm status "+vm); !strings.Contains(out, "18080") {
			t.Errorf("after a reload the status is\n%s", out)
		}
		// A declaration with a mistake fails the reload, and the VM goes on.
		if out, code := u.try(t, "sed -i '$s/8080/nonsense/' /etc/clawvm/vms/"+vm+".yaml; systemctl reload "+host.Unit(vm)); code == 0 {
			t.Errorf("a reload of a wrong declaration says %q", out)
		}
		u.sh(t, "sed -i '$d' /etc/clawvm/vms/"+vm+".yaml; systemctl reload "+host.Unit(vm))
		u.isReady(t, vm, "after reloads")
	}
}

func (u *units) upAndDown(t *testing.T) {
	for _, vm := range u.by("beta") {
		if out := u.sh(t, "clawvm down "+vm); !strings.Contains(out, vm+" is down") {
			t.Errorf("down says %s", out)
		}
		if p := u.show(t, vm, "ActiveState", "Result"); p["ActiveState"] != "inactive" || p["Result"] != "success" {
			t.Errorf("after down the unit is %v", p)
		}
		if out := u.sh(t, "clawvm up "+vm); !strings.Contains(out, "systemd starts it, as "+host.Unit(vm)) || !strings.Contains(out, vm+" is ready after") {
			t.Errorf("up says\n%s", out)
		}
	}
	for _, vm := range u.by("alpha") {
		unit := host.Unit(vm)
		u.sh(t, "systemctl stop "+unit)
		if e := u.state(t, vm); e.State != host.Stopped || e.PID != 0 || e.End == nil || e.End.Kind != host.EndByOwner {
			t.Errorf("after systemctl stop it is %+v", e)
		}
		// systemctl returns when the guest is ready. Until then the unit's status is the
		// step that the start is at.
		said := u.sh(t, "systemctl start "+unit+" & p=$!; while kill -0 $p 2>/dev/null; do systemctl show -P StatusText "+unit+"; sleep 0.5; done; wait $p")
		u.isReady(t, vm, "after systemctl start")
		if !strings.Contains(said, "starting: guest") {
			t.Errorf("while %s was started its status was\n%s", vm, said)
		}
		pid := u.show(t, vm, "MainPID")["MainPID"]
		u.sh(t, "systemctl restart "+unit)
		u.isReady(t, vm, "after systemctl restart")
		if u.show(t, vm, "MainPID")["MainPID"] == pid {
			t.Errorf("after systemctl restart the supervisor of %s is the one that it was", vm)
		}
	}
}

// again waits until systemd has started the supervisor anew.
func (u *units) again(t *testing.T, vm, pid, how string) {
	t.Helper()
	u.eventually(t, vm+" is active again", func() bool {
		p := u.show(t, vm, "ActiveState", "MainPID")
		return p["ActiveState"] == "active" && p["MainPID"] != pid
	})
	u.isReady(t, vm, "systemd started it again")
	if out := u.sh(t, "journalctl --no-pager -b -o cat -u "+host.Unit(vm)); !strings.Contains(out, how) {
		t.Errorf("the journal does not say %q:\n%s", how, out)
	}
}

func (u *units) killed(t *testing.T) {
	for _, vm := range u.by("beta") {
		pid := u.show(t, vm, "MainPID")["MainPID"]
		u.sh(t, "kill -KILL "+pid)
		u.again(t, vm, pid, "code=killed, status=9/KILL")
		if out := u.sh(t, "ls /sys/class/net | grep -c ^claw"); out != strconv.Itoa(len(unitVMs)) {
			t.Errorf("there are %s TAPs", out)
		}
	}
}

func (u *units) watchdog(t *testing.T) {
	for _, hung := range u.by("beta") {
		paused := unitVMs[(slices.Index(unitVMs, hung)+1)%len(unitVMs)]
		before := u.show(t, paused, "MainPID")["MainPID"]
		pid := u.show(t, hung, "MainPID")["MainPID"]
		u.sh(t, "clawvm pause "+paused)
		began := time.Now()
		u.sh(t, "kill -STOP "+pid)
		u.again(t, hung, pid, "Watchdog timeout")
		if d := time.Since(began); d <= unitWatchdog {
			t.Errorf("the watchdog saw the supervisor of %s within %s", hung, d)
		}
		if p := u.show(t, paused, "MainPID", "ActiveState", "StatusText"); p["MainPID"] != before || p["ActiveState"] != "active" || !strings.HasPrefix(p["StatusText"], "paused at ") {
			t.Errorf("the unit of %s, which was paused meanwhile, is %v, was %s", paused, p, before)
		}
		u.sh(t, "clawvm resume "+paused+" && clawvm exec "+paused+" -- true")
	}
}

// with changes a VM's declaration by a shell command on its file, for a while.
func (u *units) with(t *testing.T, vm, change string, do func()) {
	t.Helper()
	file := "/etc/clawvm/vms/" + vm + ".yaml"
	u.sh(t, "cp "+file+" /root/good.yaml")
	u.sh(t, "f="+file+"; "+change)
	do()
	u.sh(t, "cp /root/good.yaml "+file)
}

func (u *units) wrong(t *testing.T) {
	for _, vm := range u.by("beta") {
		u.with(t, vm, "echo 'memroy: 1GiB' >>$f", func() {
			if out, code := u.try(t, "systemctl restart "+host.Unit(vm)); code == 0 {
				t.Errorf("systemctl restart with a wrong declaration says %q", out)
			}
			p := u.show(t, vm, "ActiveState", "ExecMainStatus", "StatusText", "NRestarts")
			if p["ActiveState"] != "failed" || p["ExecMainStatus"] != strconv.Itoa(host.ExitDeclaration) || !strings.Contains(p["StatusText"], "memroy") || p["NRestarts"] != "0" {
				t.Errorf("the unit is %v", p)
			}
			if out, code := u.try(t, "clawvm up "+vm); code != host.ExitDeclaration || !strings.Contains(out, "want memory, most likely") {
				t.Errorf("up ends with %d and says\n%s", code, out)
			}
		})
	}
}

// startLimit lets a start fail, of a VM that is down, until systemd gives up.
func (u *units) startLimit(t *testing.T) {
	for _, vm := range u.by("beta") {
		u.try(t, "systemctl stop "+host.Unit(vm))
		u.with(t, vm, `echo 'ports: ["127.0.0.1:81:8080"]' >>$f`, func() {
			u.sh(t, "systemd-run -q --unit=taken systemd-socket-activate -l 127.0.0.1:81 true; d=/run/systemd/system/"+host.Unit(vm)+".d; mkdir -p $d"+
				"; printf '[Unit]\nStartLimitBurst=3\n[Service]\nRestartSec=100ms\nRestartSteps=0\n' >$d/quick.conf; systemctl daemon-reload")
			if out, code := u.try(t, "systemctl start "+host.Unit(vm)); code == 0 {
				t.Errorf("systemctl start with a port that is taken says %q", out)
			}
			u.eventually(t, "systemd gives up", func() bool { return u.show(t, vm, "ActiveState")["ActiveState"] == "failed" })
			p := u.show(t, vm, "NRestarts", "StatusText", "ExecMainStatus")
			if p["NRestarts"] != "3" || p["ExecMainStatus"] != strconv.Itoa(host.ExitFailed) || !strings.Contains(p["StatusText"], "127.0.0.1:81") {
				t.Errorf("the unit is %v", p)
			}
			if e := u.state(t, vm); e.State != host.Failed || !strings.Contains(e.Why, "127.0.0.1:81") {
				t.Errorf("clawvm status says %s, %s", e.State, e.Why)
			}
			// A person who asks for it is not held to that.
			u.sh(t, "rm -r /run/systemd/system/"+host.Unit(vm)+".d; systemctl daemon-reload; systemctl stop taken; clawvm up "+vm)
			if out := u.sh(t, "curl -sS -m 60 http://127.0.0.1:81/"); out != "served by the guest" {
				t.Errorf("the guest serves %q", out)
			}
		})
		u.sh(t, "clawvm reload "+vm) // the next one is to find the port free
	}
}

// crashLoop has a guest that reboots before it is ever ready.
func (u *units) crashLoop(t *testing.T) {
	for _, vm := range u.by("beta") {
		u.with(t, vm, "sed -i 's/{http: .*/{tcp: 9}/' $f", func() {
			u.sh(t, "systemctl restart --no-block "+host.Unit(vm)+"; timeout 240 sh -c 'until systemctl is-failed -q "+host.Unit(vm)+"; do clawvm exec --root "+vm+" -- reboot -f; sleep 0.5; done'")
			p := u.show(t, vm, "ExecMainStatus", "NRestarts", "StatusText")
			if p["ExecMainStatus"] != strconv.Itoa(host.ExitCrashLoop) || p["NRestarts"] != "0" || !strings.Contains(p["StatusText"], "is not started any more") {
				t.Errorf("the unit is %v", p)
			}
			if out := u.sh(t, "clawvm ls"); !strings.Contains(out, host.HealthCrashLoop) {
				t.Errorf("ls says\n%s", out)
			}
		})
		u.sh(t, "clawvm up "+vm)
	}
}

func (u *units) target(t *testing.T) {
	// It does not wait for those that are part of it.
	u.sh(t, "systemctl stop clawvm.target")
	for _, vm := range unitVMs {
		u.eventually(t, vm+" is down", func() bool {
			switch state := u.show(t, vm, "ActiveState")["ActiveState"]; state {
			case "inactive":
				return true
			case "failed":
				t.Fatalf("%s is %s\n%s", vm, state, u.lastWords(t))
			}
			return false
		})
	}
	if out := u.sh(t, "clawvm gc"); out != "nothing was left behind" {
		t.Errorf("gc says\n%s", out)
	}
	if out := u.sh(t, "find /sys/fs/cgroup/clawvm.slice -mindepth 1 -type d 2>/dev/null || true"); out != "" {
		t.Errorf("these cgroups are left:\n%s", out)
	}
	u.sh(t, "systemctl start clawvm.target")
	for _, vm := range unitVMs {
		u.isReady(t, vm, "clawvm.target is reached")
	}
}

func (u *units) disable(t *testing.T) {
	u.sh(t, "clawvm disable alpha")
	if e := u.state(t, "alpha"); e.Enabled || e.State != host.Running {
		t.Errorf("after disable it is %+v", e)
	}
	if out, _ := u.try(t, "systemctl is-enabled clawvm@alpha"); out != "disabled" {
		t.Errorf("systemd says %s", out)
	}
}

// inOrder looks at what a poweroff of the server left on its disk.
func (u *units) inOrder(t *testing.T, disk string) {
	for _, vm := range unitVMs {
		u.sh(t, "clawvm exec "+vm+" -- sh -c 'echo kept >/var/lib/state/kept'")
	}
	took := u.poweroff(t)
	t.Logf("the server is off after %s", took.Round(100*time.Millisecond))
	if took > stopLimit {
		t.Errorf("the server went off after %s, and a unit's time to stop is %s", took, stopLimit)
	}
	read := func(image, path string) string {
		t.Helper()
		to := filepath.Join(t.TempDir(), "file")
		if out, err := exec.Command("debugfs", "-R", "dump "+path+" "+to, image).CombinedOutput(); err != nil {
			t.Fatalf("debugfs %s: %v\n%s", path, err, out)
		}
		return to
	}
	for _, vm := range unitVMs {
		log, err := os.ReadFile(read(disk, "/var/log/clawvm/"+vm+"/supervisor.log"))
		if err != nil {
			t.Fatal(err)
		}
		end := string(log[max(0, strings.LastIndex(string(log), "asking the guest to end")):])
		t.Logf("the end of %s:\n%s", vm, end)
		if !strings.HasPrefix(end, "asking the guest") || !strings.Contains(end, "ended: "+string(host.EndByOwner)) || strings.Contains(end, "power button") || strings.Contains(end, "stopping the VMM") || strings.Contains(end, "does not answer") {
			t.Errorf("the guest %s did not end by itself:\n%s", vm, end)
		}
		volume := read(disk, "/var/lib/clawvm/vms/"+vm+"/volumes/state.raw")
		header, err := exec.Command("dumpe2fs", "-h", volume).CombinedOutput()
		if err != nil || strings.Contains(string(header), "needs_recovery") || !regexp.MustCompile(`Filesystem state: +clean`).Match(header) {
			t.Errorf("the volume of %s was not taken down in order: %v\n%s", vm, err, header)
		}
		if kept, err := os.ReadFile(read(volume, "/kept")); err != nil || string(kept) != "kept\n" {
			t.Errorf("the volume of %s has %q, %v", vm, kept, err)
		}
	}
}
