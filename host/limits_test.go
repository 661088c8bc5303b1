package host

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
)

// TestLimitsOf holds what a declaration's limits are in the cgroup.
func TestLimitsOf(t *testing.T) {
	vm := func(text string) *config.VM {
		vm, err := config.Parse("x", "x.yaml", []byte("image: base\n"+text), nil)
		if err != nil {
			t.Fatal(err)
		}
		return vm
	}
	for _, c := range []struct {
		name, declared string
		shares         int
		emulated       bool
		want, line     string
	}{
		{"defaults", "", 1, false,
			"memory.oom.group=1 memory.max=2382364672 memory.swap.max=0 cpu.max=max 100000 pids.max=1024",
			"memory 2272MiB, cpu weight 100, tasks 1024"},
		{"emulated, more shares", "memory: 256MiB", 3, true,
			"memory.oom.group=1 memory.max=1585446912 memory.swap.max=0 cpu.max=max 100000 pids.max=1024",
			"memory 1512MiB, cpu weight 100, tasks 1024"},
		{"all", "memory: 1GiB\nlimits: {cpus: 1.5, cpuWeight: 50, tasks: 256, memoryOverhead: 128MiB, swap: 64MiB}", 3, true,
			"memory.oom.group=1 memory.max=1207959552 memory.swap.max=67108864 cpu.max=150000 100000 pids.max=256",
			"memory 1152MiB, cpus 1.5, cpu weight 50, tasks 256"},
		{"least processor time", "limits: {cpus: 1%}", 1, false,
			"memory.oom.group=1 memory.max=2382364672 memory.swap.max=0 cpu.max=1000 100000 pids.max=1024",
			"memory 2272MiB, cpus 0.01, cpu weight 100, tasks 1024"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := limitsOf(vm(c.declared), c.shares, c.emulated)
			var words []string
			for _, v := range l.values() {
				words = append(words, v.file+"="+v.value)
			}
			if diff := cmp.Diff(c.want, strings.Join(words, " ")); diff != "" {
				t.Errorf("values (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(c.line, l.String()); diff != "" {
				t.Errorf("line (-want +got):\n%s", diff)
			}
		})
	}
}

func TestChoosePlace(t *testing.T) {
	for _, c := range []struct {
		what string
		f    cgroupFacts
		want placement
	}{
		{"a unit with Delegate=yes", cgroupFacts{name: "clawvm@x.service", delegated: true, alone: true, systemd: true}, placeHere},
		{"and with DelegateSubgroup=supervisor", cgroupFacts{name: "supervisor", aboveDelegated: true, alone: true, systemd: true}, placeAbove},
		{"a unit without", cgroupFacts{name: "other.service", alone: true, systemd: true}, placeScope},
		{"a session", cgroupFacts{name: "session-1.scope", systemd: true}, placeScope},
		{"a delegated cgroup with others in it", cgroupFacts{name: "tmux.scope", delegated: true, systemd: true}, placeScope},
		{"somebody's leaf of the same name", cgroupFacts{name: "supervisor", alone: true, systemd: true}, placeScope},
		{"no manager", cgroupFacts{name: "/"}, placeSubtree},
	} {
		if got := choosePlace(c.f); got != c.want {
			t.Errorf("%s: placement %d, want %d", c.what, got, c.want)
		}
	}
}

func TestLimitsReached(t *testing.T) {
	l := Limits{Memory: 300 << 20, Tasks: 64}
	for _, c := range []struct {
		what          string
		memory, tasks map[string]int64
		want          string
	}{
		{"nothing", map[string]int64{"max": 7, "oom": 0, "oom_kill": 0}, map[string]int64{"max": 0}, ""},
		{"the limit", map[string]int64{"max": 7, "oom": 1, "oom_kill": 3, "oom_group_kill": 1}, nil,
			"out of memory: VMM and virtiofsd needed more than 44MiB over the guest's 256MiB and were killed; more can be declared as limits.memoryOverhead"},
		{"the host", map[string]int64{"oom_kill": 3}, nil, "out of memory: the host had none left, and its kernel killed the VM's processes"},
		{"refused, and nobody killed", map[string]int64{"oom": 2}, nil, ""},
		{"tasks", nil, map[string]int64{"max": 2}, "limits.tasks: VMM and virtiofsd wanted more than 64 processes and threads"},
	} {
		if got := limitsReached(c.memory, c.tasks, l, 256<<20); got != c.want {
			t.Errorf("%s: %q, want %q", c.what, got, c.want)
		}
	}
}

func TestParseCgroup(t *testing.T) {
	for text, want := range map[string]string{
		"0::/clawvm.slice/clawvm@x.service\n":            "/clawvm.slice/clawvm@x.service",
		"9:name=systemd:/\n4:memory:/a\n0::/\n":          "/",
		"4:memory:/a\n":                                  "",
		"0::/user.slice/a:b/session-1.scope (deleted)\n": "/user.slice/a:b/session-1.scope (deleted)",
		"": "",
	} {
		if got, ok := parseCgroup([]byte(text)); got != want || ok != (want != "") {
			t.Errorf("parseCgroup(%q) = %q, %v, want %q", text, got, ok, want)
		}
	}
	if got := cgroupMount.sub("/clawvm.slice/clawvm@x.service"); got.path() != "/clawvm.slice/clawvm@x.service" || unitName(got) != "clawvm@x.service" || unitName(got.sub("vm")) != "" {
		t.Errorf("%s is %s, of the unit %q", got, got.path(), unitName(got))
	}
}

func TestParseCounts(t *testing.T) {
	got := parseCounts("low 0\nmax 17\noom_kill 3\nnonsense\nalso x\n")
	if diff := cmp.Diff(map[string]int64{"low": 0, "max": 17, "oom_kill": 3}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// limitVariable makes the test its own child, which limits itself and says what its
// children are held to.
const limitVariable = "CLAWVM_TEST_LIMITS"

func limited() int {
	if err := ForbidCores(); err != nil {
		return 1
	}
	if err := limitSupervisor(); err != nil {
		return 2
	}
	spawner := newSpawner("clawvm:test:limits")
	for _, spawn := range []func(*exec.Cmd) error{spawner.spawn, spawner.spawnDispensable, spawner.spawn} {
		cmd := exec.Command("sh", "-c", "sed -n 's/Max core file size *//p' /proc/self/limits; ulimit -n; cat /proc/self/oom_score_adj")
		cmd.Stdout = os.Stdout
		if err := spawn(cmd); err != nil {
			return 3
		}
		if err := cmd.Wait(); err != nil {
			return 4
		}
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || dumpable != 0 {
		return 5
	}
	return 0
}

// TestProcessLimits: no process of a VM leaves a core, each may open enough files,
// and the guest's are the first to go.
func TestProcessLimits(t *testing.T) {
	if os.Getenv(limitVariable) != "" {
		os.Exit(limited())
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestProcessLimits$")
	cmd.Env = append(os.Environ(), limitVariable+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	score, err := os.ReadFile(oomScoreFile)
	if err != nil {
		t.Fatal(err)
	}
	own, err := strconv.Atoi(strings.TrimSpace(string(score)))
	if err != nil {
		t.Fatal(err)
	}
	block := func(score int) []string {
		return []string{"1", "1", "bytes", strconv.FormatUint(min(openFiles, files.Max), 10), strconv.Itoa(score)}
	}
	want := append(append(block(own), block(min(own+dispensable, oomScoreMax))...), block(own)...)
	if diff := cmp.Diff(want, strings.Fields(string(out))); diff != "" {
		t.Errorf("a plain child, a dispensable one, a plain one (-want +got):\n%s", diff)
	}
}
