package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/integration/world"
	"github.com/clawvm/clawvm/vmm"
)

const (
	limitsLimit = 20 * time.Minute
	// eventuallyLimit bounds what follows a kill or a start, on a busy machine.
	eventuallyLimit = 3 * time.Minute
	// busyFor is how long a busy guest is watched.
	busyFor = 4 * time.Second
)

// limited is a VM with limits that are reached soon. Its guest runs nothing.
const limited = `
image: small
vmm: %s
vcpus: 1
memory: 192MiB
overlay: {tmpfs: 16MiB}
volumes:
  - {name: state, mount: /var/lib/state, size: 64MiB}
secrets: {made: {generate: 32}}
restart: "no"
limits: {cpus: 0.5, cpuWeight: 200, tasks: 100, memoryOverhead: 128MiB}
`

// What limited says, as the kernel does.
const (
	limitedMemory = (192 + 128) << 20
	limitedOver   = "out of memory: VMM and virtiofsd needed more than 128MiB over the guest's 192MiB"
)

// limitsServer is a server on which limits are tried.
type limitsServer struct {
	*emuhost.Host
	ctx context.Context
}

// TestLimits tries on a server with systemd and cgroup v2 that a VM's limits hold,
// that who goes beyond them goes alone, and that no cgroup stays; with a VM that is
// a unit, with one whose supervisor was started by hand, and without systemd.
func TestLimits(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), limitsLimit)
	defer cancel()
	h := limitsServer{emuhost.Start(t, emuhost.Options{}), ctx}
	first := h.install(t)
	h.declare(t, "hog", fmt.Sprintf(limited, first))
	h.declare(t, "other", fmt.Sprintf(limited, vmm.QEMU))
	h.sh(t, "clawvm up hog")
	h.sh(t, "setsid clawvm run other </dev/null >/dev/null 2>&1 &")
	h.eventually(t, "other is ready", func() bool { return h.vm(t, "other").State == "ready" })
	hog, other := h.vm(t, "hog"), h.vm(t, "other")

	t.Run("the cgroups", func(t *testing.T) {
		for _, c := range []struct {
			vm    limitsVM
			where string
			score int // how far the kernel spares the supervisor when the host has no memory left
		}{
			{hog, `^/clawvm\.slice/clawvm@hog\.service$`, -100},
			{other, `^/clawvm\.slice/clawvm-[0-9a-f]{8}-other-[0-9]+\.scope$`, 0},
		} {
			base := c.vm.Limits.Cgroup
			if !regexp.MustCompile(c.where).MatchString(base) {
				t.Errorf("the VM's cgroup is %q", base)
			}
			out := h.sh(t, "systemctl show -p CPUWeight -p Delegate "+filepath.Base(base))
			if lines := slices.Sorted(strings.Lines(out)); strings.Join(lines, "") != "CPUWeight=200\nDelegate=yes\n" {
				t.Errorf("weight and delegation are %q", out)
			}
			h.holds(t, c.vm)
			h.members(t, c.vm, c.score)
		}
	})
	t.Run("top", func(t *testing.T) { h.top(t, hog) })
	t.Run("processor time", func(t *testing.T) { h.processorTime(t, hog) })
	t.Run("tasks", func(t *testing.T) {
		// In place of a VMM that makes processes without end.
		out := h.sh(t, `sh -c 'echo $$ > `+hog.file("vm/cgroup.procs")+`; for i in $(seq 150); do sleep 1000 & done' 2>&1 || true; pkill -x -f 'sleep 1000' || true`)
		if n := h.counts(t, hog, "vm/pids.events")["max"]; n == 0 {
			t.Errorf("150 processes beside the VM's were not too many: %s", out)
		}
		h.isReady(t, "hog")
	})
	t.Run("a killed supervisor of a unit", func(t *testing.T) {
		h.sh(t, fmt.Sprintf("kill -9 %d", hog.PID))
		was := hog.PID
		h.eventually(t, "systemd has started it again", func() bool {
			hog = h.vm(t, "hog")
			return hog.State == "ready" && hog.PID != was
		})
		h.holds(t, hog)
		h.members(t, hog, -100)
	})
	t.Run("memory", func(t *testing.T) {
		// In place of a VMM that eats memory without end.
		h.sh(t, `sh -c 'echo $$ > `+hog.file("vm/cgroup.procs")+`; exec tail /dev/zero' || true`)
		h.eventually(t, "the VM has ended", func() bool { return h.vm(t, "hog").State == "failed" })
		if end := h.vm(t, "hog").End.Reason; !strings.Contains(end, limitedOver) {
			t.Errorf("the end's reason is %q", end)
		}
		if out := h.sh(t, "clawvm status hog || true; systemctl status --no-pager clawvm@hog || true"); strings.Count(out, limitedOver) < 2 {
			t.Errorf("clawvm and systemd do not say %q:\n%s", limitedOver, out)
		}
		if now := h.vm(t, "other"); now.State != "ready" || now.PID != other.PID {
			t.Errorf("the other VM is %+v, was %+v", now, other)
		}
		if n := h.counts(t, other, "vm/memory.events")["oom_kill"]; n != 0 {
			t.Errorf("%d processes of the other VM were killed", n)
		}
		h.gone(t, hog)
		// What systemd was told for this run alone, it has been told to forget.
		if out := h.sh(t, "systemctl show -p CPUWeight --value clawvm@hog"); out != "[not set]\n" {
			t.Errorf("the weight of the unit is %s after the VM's end", out)
		}
	})
	t.Run("a killed supervisor of a scope", func(t *testing.T) {
		h.sh(t, fmt.Sprintf("kill -9 %d", other.PID))
		h.gone(t, other)
		h.sh(t, "clawvm gc")
	})
	t.Run("without systemd", h.withoutSystemd)
}

// holds looks that the VM's cgroups have the declared limits.
func (h limitsServer) holds(t *testing.T, vm limitsVM) {
	t.Helper()
	for file, want := range map[string]string{
		"vm/memory.max": strconv.Itoa(limitedMemory), "vm/memory.swap.max": "0", "vm/memory.oom.group": "1",
		"vm/cpu.max": "50000 100000", "vm/pids.max": "100", "gate/pids.max": "256", "gate/memory.max": strconv.Itoa(256 << 20),
		"cpu.weight": "200",
	} {
		if got := h.read(t, vm, file); got != want {
			t.Errorf("%s of %s is %s, want %s", file, vm.Limits.Cgroup, got, want)
		}
	}
}

// members looks which processes are in the VM's cgroups: no core is dumped of any,
// and the guest's are the first to go when the host has no memory left.
func (h limitsServer) members(t *testing.T, vm limitsVM, score int) {
	t.Helper()
	for leaf, want := range map[string][]string{
		"supervisor": {"clawvm"}, "gate": {"exe"}, "vm": {"VMM", "virtiofsd"}, ".": nil,
	} {
		var got []string
		for pid := range strings.FieldsSeq(h.read(t, vm, leaf+"/cgroup.procs")) {
			name := strings.TrimSpace(h.sh(t, "cat /proc/"+pid+"/comm"))
			if strings.HasPrefix(name, "cloud-hyp") || strings.HasPrefix(name, "qemu") {
				name = "VMM"
			}
			got = append(got, name)
			wantScore := score
			if leaf == "vm" {
				wantScore += 500
			}
			limits := h.sh(t, "sed -n 's/^Max core file size *//p' /proc/"+pid+"/limits; cat /proc/"+pid+"/oom_score_adj")
			if got := strings.Fields(limits); !slices.Equal(got, []string{"1", "1", "bytes", strconv.Itoa(wantScore)}) {
				t.Errorf("%s (%s) has the core limit and the OOM score %q, want a score of %d", name, pid, got, wantScore)
			}
		}
		slices.Sort(got)
		if got := slices.Compact(got); !slices.Equal(got, want) {
			t.Errorf("the cgroup %s/%s holds %v, want %v", vm.Limits.Cgroup, leaf, got, want)
		}
	}
}

// busy lets the guest's processor run until the returned function is called.
func (h limitsServer) busy(t *testing.T, name string) (stop func()) {
	t.Helper()
	h.sh(t, "clawvm exec "+name+" -- sh -c 'touch /tmp/busy; while [ -e /tmp/busy ]; do :; done' </dev/null >/dev/null 2>&1 &")
	h.eventually(t, "the guest is busy", func() bool {
		return h.sh(t, "clawvm exec "+name+" -- sh -c 'ls /tmp'") == "busy\n"
	})
	return func() { h.sh(t, "clawvm exec "+name+" -- rm /tmp/busy") }
}

// usage is what top says of a VM.
type usage struct {
	CPU                                    float64
	Memory, MemoryMax, Read, Written, Disk int64
	Tasks                                  int
}

func (h limitsServer) usage(t *testing.T, name string) usage {
	t.Helper()
	var list []usage
	out := h.sh(t, "clawvm top --json "+name)
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 {
		t.Fatalf("top prints %s (%v)", out, err)
	}
	return list[0]
}

// top compares what top shows with what was done in the guest, and with the kernel.
func (h limitsServer) top(t *testing.T, vm limitsVM) {
	const filled = 48 // MiB
	idle := h.usage(t, "hog")
	if idle.MemoryMax != limitedMemory || idle.Tasks < 10 {
		t.Errorf("idle: %+v", idle)
	}
	h.sh(t, fmt.Sprintf(`clawvm exec --root hog -- sh -c 'mkdir /tmp/fill && mount -t tmpfs fill /tmp/fill && dd if=/dev/zero of=/tmp/fill/x bs=1M count=%[1]d &&
dd if=/dev/urandom of=/var/lib/state/x bs=1M count=%[1]d conv=fsync' 2>&1`, filled))
	full := h.usage(t, "hog")
	for what, grown := range map[string]int64{
		"memory": full.Memory - idle.Memory, "bytes written": full.Written - idle.Written, "disk": full.Disk - idle.Disk,
	} {
		if grown < filled<<20*9/10 {
			t.Errorf("the guest has filled %d MiB of memory and as much of its volume, and top shows %d MiB more of %s", filled, grown>>20, what)
		}
	}
	current, cache := int64(0), h.counts(t, vm, "memory.stat")["inactive_file"]
	if _, err := fmt.Sscan(h.read(t, vm, "memory.current"), &current); err != nil {
		t.Fatal(err)
	}
	if off := full.Memory - (current - cache); off > 16<<20 || off < -16<<20 {
		t.Errorf("top says %d MiB, and the kernel %d, %d of them cache", full.Memory>>20, current>>20, cache>>20)
	}
	h.sh(t, `clawvm exec --root hog -- sh -c 'umount /tmp/fill && rmdir /tmp/fill && rm /var/lib/state/x'`)

	stop := h.busy(t, "hog")
	if u := h.usage(t, "hog"); u.CPU < 35 || u.CPU > 65 {
		t.Errorf("a guest that is busy, and may have half a processor, has %.1f%%", u.CPU)
	}
	// On a terminal, a page every two seconds until ^C; a page takes the place of the
	// one before.
	out := h.sh(t, "script -qec 'timeout --foreground --preserve-status -s INT 8 clawvm top' /dev/null </dev/null")
	stop()
	pages := strings.Split(out, "\x1b[H")[1:]
	if len(pages) < 2 {
		t.Fatalf("top shows %d pages in 8 s: %q", len(pages), out)
	}
	for _, page := range pages {
		if !strings.HasPrefix(page, "NAME") || !regexp.MustCompile(`(?m)^hog +ready +[3-6]\d\.\d% +\S+MiB +320MiB `).MatchString(page) || !strings.Contains(page, "\x1b[J") {
			t.Errorf("a page is %q", page)
		}
	}
	t.Logf("idle %+v, full %+v; on a terminal:\n%s", idle, full, regexp.MustCompile("\x1b\\[[A-Z]").ReplaceAllString(pages[len(pages)-1], ""))
}

func (h limitsServer) processorTime(t *testing.T, vm limitsVM) {
	stop := h.busy(t, "hog")
	before, began := h.counts(t, vm, "vm/cpu.stat"), time.Now()
	h.sh(t, fmt.Sprintf("sleep %d", int(busyFor/time.Second)))
	after, took := h.counts(t, vm, "vm/cpu.stat"), time.Since(began)
	stop()
	used := time.Duration(after["usage_usec"]-before["usage_usec"]) * time.Microsecond
	if after["nr_throttled"] == before["nr_throttled"] {
		t.Errorf("a busy guest used %s in %s and was never held back: %v", used, took, after)
	}
	// One period more may have begun and ended within.
	if most := took/2 + 200*time.Millisecond; used > most || used < took/5 {
		t.Errorf("a busy guest used %s of processor time in %s, want %s at most, and not much less", used, took, most)
	}
	t.Logf("a busy guest used %s of processor time in %s, and was held back in %d periods", used, took.Round(time.Millisecond), after["nr_throttled"]-before["nr_throttled"])
}

// withoutSystemd hides systemd from a VM's supervisor.
func (h limitsServer) withoutSystemd(t *testing.T) {
	const hidden = "mkdir -p /run/nothing && unshare -m --propagation private sh -ec 'mount --bind /run/nothing /run/systemd; %s'"
	h.sh(t, fmt.Sprintf(hidden, "clawvm up hog"))
	hog := h.vm(t, "hog")
	if !regexp.MustCompile(`^/clawvm-[0-9a-f]{8}/hog$`).MatchString(hog.Limits.Cgroup) {
		t.Errorf("the VM's cgroup is %q", hog.Limits.Cgroup)
	}
	h.holds(t, hog)
	h.members(t, hog, 0)
	h.sh(t, fmt.Sprintf("kill -9 %d", hog.PID))
	h.eventually(t, "the VM's processes are gone", func() bool { return h.read(t, hog, "vm/cgroup.procs") == "" })
	if out := h.sh(t, "clawvm gc"); !strings.Contains(out, "cgroup of VM hog") {
		t.Errorf("gc says %q", out)
	}
	left := func(when string) {
		t.Helper()
		if out := h.sh(t, "ls -d /sys/fs/cgroup/clawvm-* 2>/dev/null || true"); out != "" {
			t.Errorf("%s leaves %s", when, out)
		}
	}
	left("gc")
	h.sh(t, fmt.Sprintf(hidden, "clawvm up hog && clawvm down hog"))
	left("down")
}

// limitsVM is what status says of a VM.
type limitsVM struct {
	State  string `json:"state"`
	PID    int    `json:"pid"`
	Limits struct {
		Cgroup string `json:"cgroup"`
		None   string `json:"none"`
	} `json:"limits"`
	End struct {
		Reason string `json:"reason"`
	} `json:"end"`
}

// file is a file of the VM's cgroup.
func (vm limitsVM) file(name string) string {
	return filepath.Join("/sys/fs/cgroup", vm.Limits.Cgroup, name)
}

// install puts clawvm in place as `make install` does, and an image, and says which
// VMM to try: cloud-hypervisor where there is one.
func (h limitsServer) install(t *testing.T) string {
	t.Helper()
	copyIn(h.ctx, t, h.Host, map[string]string{"/": made(h.ctx, t), "/root/image": world.SmallImage(t)})
	loadDevices(t, h.Host)
	h.sh(t, `systemctl daemon-reload
clawvm image import /root/image small`)
	return chosenVMM()
}

func (h limitsServer) declare(t *testing.T, name, text string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), name+".yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := h.CopyIn(h.ctx, file, "/etc/clawvm/vms/"+name+".yaml"); err != nil {
		t.Fatal(err)
	}
}

// sh runs a script that must work, and returns what it printed.
func (h limitsServer) sh(t *testing.T, script string) string {
	t.Helper()
	var out, said bytes.Buffer
	code, err := h.Exec(h.ctx, emuhost.Command{Argv: []string{"bash", "-euo", "pipefail", "-c", script}, Stdout: &out, Stderr: &said})
	if err != nil || code != 0 {
		last, _, _, _ := h.Run(h.ctx, "bash", "-c", "tail -n 20 /var/log/clawvm/*/*.log; journalctl -b --no-pager -n 20")
		t.Fatalf("on the server: %s\ncode %d, %v\n%s%s\n%s", script, code, err, &out, &said, last)
	}
	return out.String()
}

func (h limitsServer) vm(t *testing.T, name string) limitsVM {
	t.Helper()
	var vm limitsVM
	// Its exit code is the VM's state.
	if err := json.Unmarshal([]byte(h.sh(t, "clawvm status --json "+name+" || true")), &vm); err != nil {
		t.Fatal(err)
	}
	return vm
}

func (h limitsServer) isReady(t *testing.T, name string) {
	t.Helper()
	if vm := h.vm(t, name); vm.State != "ready" {
		t.Errorf("VM %s is %s", name, vm.State)
	}
}

func (h limitsServer) read(t *testing.T, vm limitsVM, file string) string {
	t.Helper()
	return strings.TrimSpace(h.sh(t, "cat "+vm.file(file)))
}

func (h limitsServer) counts(t *testing.T, vm limitsVM, file string) map[string]int64 {
	t.Helper()
	all := map[string]int64{}
	for line := range strings.Lines(h.read(t, vm, file)) {
		var name string
		var n int64
		if _, err := fmt.Sscan(line, &name, &n); err != nil {
			t.Fatalf("%s: %q: %v", file, line, err)
		}
		all[name] = n
	}
	return all
}

// gone waits until a VM's cgroup is.
func (h limitsServer) gone(t *testing.T, vm limitsVM) {
	t.Helper()
	h.eventually(t, "the cgroup "+vm.Limits.Cgroup+" is gone", func() bool {
		return h.sh(t, "test -e "+vm.file("")+" && echo there || true") == ""
	})
}

func (h limitsServer) eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	world.Eventually(t, what, eventuallyLimit, ok)
}
