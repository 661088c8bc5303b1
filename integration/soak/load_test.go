package soak

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/world"
)

const (
	listLimit = 100 * time.Millisecond // of ls, with a thousand declared, where nothing else runs
	listWork  = 250 * time.Millisecond // of processor time; some 85 ms, which others' caches and threads can double
	// bothMemory is what supervisor and gate of one VM may hold together, of their
	// own (RssAnon), in bytes.
	bothMemory = 12 << 20
)

// TestListOfAThousand lists a thousand VMs, each with an address of a subnet that
// has room for them. The quickest of ten counts.
func TestListOfAThousand(t *testing.T) {
	const number = 1000
	shared := world.New(t)
	w := &world.World{Bin: shared.Bin, Root: "/run/thousand"}
	for i := range number {
		w.Declare(t, fmt.Sprintf("vm-%d", i), fmt.Sprintf(smallVM, world.VMM()))
	}
	host := filepath.Join(w.Root, "etc/clawvm/clawvm.yaml")
	if err := os.WriteFile(host, []byte("bridge: wide\naddress: 10.20.0.1/16\nuidBase: 3000000000\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	leases := filepath.Join(w.Root, "var/lib/clawvm/leases")
	if err := os.MkdirAll(leases, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range number {
		a := netip.AddrFrom4([4]byte{10, 20, byte(i/250 + 1), byte(i%250 + 1)})
		if err := os.Symlink(fmt.Sprintf("vm-%d", i), filepath.Join(leases, a.String())); err != nil {
			t.Fatal(err)
		}
	}
	var wall, work []time.Duration
	for range 10 {
		// A VM that is down in order is listed with --all only.
		cmd := exec.Command(filepath.Join(w.Bin, "clawvm"), "--root", w.Root, "ls", "--all")
		began := time.Now()
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		wall = append(wall, time.Since(began))
		work = append(work, cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime())
		if n, leased := strings.Count(string(out), "vm-"), strings.Count(string(out), " 10.20."); n != number || leased != number {
			t.Fatalf("%d VMs are listed, %d with an address, not %d", n, leased, number)
		}
	}
	slices.Sort(wall)
	slices.Sort(work)
	load := loadAverage(t)
	t.Logf("ls of %d: %s to %s, median %s; of processor time %s to %s; load average %.1f", number, wall[0], wall[9], wall[5], work[0], work[9], load)
	if load < 1 && wall[0] > listLimit {
		t.Errorf("ls took %s at least, want %s", wall[0], listLimit)
	}
	// Who shares the machine waits; how much work it is says more then.
	if work[0] > listWork {
		t.Errorf("ls took %s of processor time at least, want %s", work[0], listWork)
	}
}

// loadAverage is that of the last minute.
func loadAverage(t *testing.T) (load float64) {
	t.Helper()
	raw, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		_, err = fmt.Sscan(string(raw), &load)
	}
	if err != nil {
		t.Fatal(err)
	}
	return load
}

const smallVM = `
image: small
vmm: %s
vcpus: 1
memory: 128MiB
nameservers: [203.0.113.1]
overlay: {tmpfs: 16MiB}
run: {argv: [httpd, -f, -p, "8080", -h, /srv/www], user: app, ready: {tcp: 8080}, stop: {timeout: 5s}}
`

// TestManyVMs brings up as many VMs at once as CLAWVM_SOAK_VMS says and the
// machine's memory bears, and looks that each is ready and takes no more than its
// share.
func TestManyVMs(t *testing.T) {
	w := world.New(t)
	w.PrepareStore(t)
	const each, reserve = 260 << 20, 2 << 30 // bytes: guest, VMM, virtiofsd, supervisor and gate; what others need
	number := Number(t, "CLAWVM_SOAK_VMS", 3)
	if room := int((available(t) - reserve) / each); room < number {
		t.Logf("the machine has room for %d VMs, not %d", room, number)
		number = room
	}
	names := make([]string, number)
	for i := range names {
		names[i] = fmt.Sprintf("many-%d", i)
		w.Declare(t, names[i], fmt.Sprintf(smallVM, world.VMM()))
	}
	t.Cleanup(func() { w.Clawvm(t, append([]string{"down", "--timeout", "1s"}, names...)...) })
	began := time.Now()
	w.MustWithin(t, 25*time.Minute, append([]string{"up"}, names...)...)
	t.Logf("%d VMs were ready after %s", number, time.Since(began).Round(time.Second))
	var most int64
	for _, name := range names {
		if s := w.Status(t, name); s.State != "ready" {
			t.Errorf("%s is %s", name, s.State)
		}
		processes := w.Processes(t, name)
		both := int64(0)
		for _, kind := range []string{"supervisor", "gate"} {
			for _, pid := range processes[kind] {
				both += world.RssAnon(pid)
			}
		}
		if most = max(most, both); both == 0 || both > bothMemory {
			t.Errorf("%s: supervisor and gate hold %.1f MiB, at most %d are allowed", name, float64(both)/(1<<20), bothMemory>>20)
		}
	}
	began = time.Now()
	w.Must(t, "ls")
	t.Logf("supervisor and gate hold at most %.1f MiB; ls took %s", float64(most)/(1<<20), time.Since(began).Round(time.Millisecond))
	w.MustWithin(t, 10*time.Minute, append([]string{"down"}, names...)...)
}

// available is MemAvailable in bytes.
func available(t *testing.T) int64 {
	t.Helper()
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		var kib int64
		if n, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); err == nil && n == 1 {
			return kib << 10
		}
	}
	t.Fatal("/proc/meminfo has no MemAvailable")
	return 0
}

// TestNothingGrows works on one VM in a loop, for a minute or as many as
// CLAWVM_SOAK_MINUTES says, and looks that supervisor and gate hold no more
// descriptors and no more memory in the end than after a quarter of the time.
func TestNothingGrows(t *testing.T) {
	w := world.New(t)
	w.PrepareStore(t)
	minutes := Number(t, "CLAWVM_SOAK_MINUTES", 1)
	port := 18095
	declare := func() {
		w.Declare(t, "loop", fmt.Sprintf(smallVM, world.VMM())+fmt.Sprintf("ports: [\"127.0.0.1:%d:8080\"]\n", port))
	}
	declare()
	t.Cleanup(func() { w.Clawvm(t, "down", "--timeout", "1s", "loop") })
	w.Must(t, "up", "loop")
	type sample struct{ files, memory float64 }
	samples := map[string][]sample{}
	began, loops := time.Now(), 0
	for ; time.Since(began) < time.Duration(minutes)*time.Minute; loops++ {
		w.Must(t, "exec", "loop", "--", "sh", "-c", "nslookup example.test; echo x > /proc/1/fd/1 2>/dev/null; true")
		w.Must(t, "logs", "loop")
		w.Must(t, "status", "loop")
		if loops%5 == 0 {
			port = 18095 + (port-18094)%2
			declare()
			w.Must(t, "reload", "loop")
		}
		for _, kind := range []string{"supervisor", "gate"} {
			pids := w.Processes(t, "loop")[kind]
			if len(pids) != 1 {
				t.Fatalf("%d processes of kind %s", len(pids), kind)
			}
			files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pids[0]))
			if err != nil {
				t.Fatal(err)
			}
			samples[kind] = append(samples[kind], sample{float64(len(files)), float64(world.RssAnon(pids[0]))})
		}
	}
	w.Must(t, "down", "loop")
	for kind, all := range samples {
		if len(all) < 8 {
			t.Fatalf("%d loops are too few to tell", len(all))
		}
		files, memory := make([]float64, len(all)), make([]float64, len(all))
		for i, s := range all {
			files[i], memory[i] = s.files, s.memory
		}
		grownFiles, grownMemory := grown(files), grown(memory)
		t.Logf("%s after %d loops in %d min: %.0f descriptors (%+.1f), %.1f MiB (%+.2f)", kind, loops, minutes, files[len(files)-1], grownFiles, memory[len(memory)-1]/(1<<20), grownMemory/(1<<20))
		// A descriptor a loop would be hundreds; a heap breathes by some hundred KiB.
		if grownFiles > 3 {
			t.Errorf("%s: %.1f more descriptors", kind, grownFiles)
		}
		if grownMemory > 2<<20 {
			t.Errorf("%s: %.1f MiB more memory", kind, grownMemory/(1<<20))
		}
	}
}

// grown is by how much the line through the last three quarters of the values
// rises (least squares): the first quarter is the time that caches take to fill.
func grown(values []float64) float64 {
	values = values[len(values)/4:]
	n := float64(len(values))
	var x, y, xx, xy float64
	for i, v := range values {
		f := float64(i)
		x, y, xx, xy = x+f, y+v, xx+f*f, xy+f*v
	}
	return (n*xy - x*y) / (n*xx - x*x) * (n - 1)
}

func TestGrown(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{9, 5, 5, 5, 5, 5, 5, 5}, 0},
		{[]float64{0, 0, 2, 3, 4, 5, 6, 7}, 5},
		{[]float64{1, 1, 1, 2, 1, 2, 1, 2}, 3. / 7},
	} {
		if got := grown(c.values); got < c.want-0.3 || got > c.want+0.3 {
			t.Errorf("%v grows by %v, want %v", c.values, got, c.want)
		}
	}
}
