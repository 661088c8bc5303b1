package doctor

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/storage"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func TestPrint(t *testing.T) {
	all := []Finding{
		{Check: "kvm", Severity: OK, Seen: "a guest runs in /dev/kvm"},
		{Check: "cpu", Severity: Note, Seen: "AMD EPYC: svm; this host is a VM itself, guests are nested"},
		{Check: "firewall", Severity: Error, Seen: "ip filter FORWARD drops at its end, what VMs send to elsewhere too (docker)", Do: "iptables -I DOCKER-USER -m mark --mark 0x53000000/0xff000000 -j ACCEPT"},
		{Check: "images", Severity: Unknown, Seen: "could not look: permission denied", Do: "ask as root"},
		{Check: "clock", Severity: Warning, Seen: "nothing keeps it right", Do: "timedatectl set-ntp true"},
		{Check: "firewall", Severity: OK, Seen: "a chain with a \x1b[31mhostile\nname"},
		{Check: "declaration", VM: "web", Severity: OK, Seen: "/etc/clawvm/vms/web.yaml, up"},
		{Check: "secret", VM: "web", Severity: Error, Seen: "cannot use secret token: others may read it (mode 0644)", Do: "chmod 600 /etc/token"},
		{Check: "declaration", VM: "well", Severity: OK, Seen: "/etc/clawvm/vms/well.yaml, down"},
	}
	for name, quiet := range map[string]bool{"all.txt": false, "quiet.txt": true} {
		var b bytes.Buffer
		if err := Print(&b, all, quiet); err != nil {
			t.Fatal(err)
		}
		golden(t, name, b.String())
	}
	var b bytes.Buffer
	if err := Print(&b, all[:1], true); err != nil || b.String() != "1 ok\n" {
		t.Errorf("nothing to say: %q, %v", &b, err)
	}
	for worst, n := range map[Severity]int{OK: 1, Note: 2, Error: len(all)} {
		if got := Worst(all[:n]); got != worst {
			t.Errorf("the worst of %d is %s, want %s", n, got, worst)
		}
	}
	if Worst(nil) != OK {
		t.Error("nothing is worse than ok")
	}
}

// lines shows findings as a test compares them.
func lines(all ...Finding) string {
	var b strings.Builder
	for _, f := range all {
		if f.VM != "" {
			fmt.Fprintf(&b, "%s: ", f.VM)
		}
		fmt.Fprintf(&b, "%s %s: %s", f.Severity, f.Check, f.Seen)
		if f.Do != "" {
			fmt.Fprintf(&b, " → %s", f.Do)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// Every judgement of what was read, on hosts that are well and on such that aren't.
func TestJudgements(t *testing.T) {
	var b strings.Builder
	say := func(what string, all ...Finding) { fmt.Fprintf(&b, "# %s\n%s\n", what, lines(all...)) }

	say("Intel, bare metal", processor("processor : 0\nmodel name : Intel(R) Xeon(R)\nflags : fpu vmx sse\n\nprocessor : 1\nmodel name: other\nflags : fpu\n"))
	say("AMD, a VM", processor("model name : AMD EPYC\nflags : svm hypervisor\n"))
	say("no virtualisation", processor("model name : AMD EPYC\nflags : fpu hypervisor\n"))
	say("nothing", processor(""))

	sysctl := func(values map[string]string) func(string) (string, error) {
		return func(path string) (string, error) {
			v, ok := values[path]
			if !ok {
				return "", fs.ErrNotExist
			}
			return v, nil
		}
	}
	say("sysctls in order", sysctls(sysctl(map[string]string{"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/rp_filter": "2", "user/max_user_namespaces": "15000",
		"net/bridge/bridge-nf-call-iptables": "0", "net/netfilter/nf_conntrack_count": "79", "net/netfilter/nf_conntrack_max": "100"}))...)
	say("sysctls not in order", sysctls(sysctl(map[string]string{"net/ipv4/ip_forward": "0", "net/ipv4/conf/all/rp_filter": "1", "user/max_user_namespaces": "0",
		"net/bridge/bridge-nf-call-iptables": "1", "net/netfilter/nf_conntrack_count": "80", "net/netfilter/nf_conntrack_max": "100"}))...)
	say("sysctls that aren't there", sysctls(sysctl(nil))...)

	say("cgroup v1", cgroup(false, "")...)
	say("cgroup v2", cgroup(true, "cpuset cpu io memory hugetlb pids\n")...)
	say("cgroup v2 without memory, and cpuset is not cpu", cgroup(true, "cpuset io pids\n")...)

	say("no other firewall", firewall(nil, "microbr")...)
	for _, program := range []string{"docker", "ufw", "firewalld", "iptables", ""} {
		for _, hook := range []string{"input", "forward"} {
			n := network.Neighbour{Family: "ip", Table: "filter", Chain: strings.ToUpper(hook), Hook: hook, Firewall: program}
			say(fmt.Sprintf("%s of %q", hook, program), firewall([]network.Neighbour{n}, "microbr")...)
		}
	}
	say("told", firewall([]network.Neighbour{{Family: "inet", Table: "mine", Chain: "f", Hook: "forward", Told: true}}, "microbr")...)

	passwd, subuid := []string{"root:x:0:0::/root:/bin/sh", "odd", "app:x:2000000007:7::/:/bin/sh"}, []string{"me:100000:65536", ""}
	say("uids free", uids(2000000000, 2000000006, passwd, subuid, "clawvm.yaml")...)
	say("uid of a user", uids(2000000000, 2000000007, passwd, subuid, "clawvm.yaml")...)
	say("uids of containers", uids(165535, 165600, nil, subuid, "clawvm.yaml")...)
	say("uids beside containers'", uids(165536, 165600, nil, subuid, "clawvm.yaml")...)

	const gib = 1 << 30
	say("no VM", use{total: 4 * gib, available: gib}.judge()...)
	say("memory enough", use{vms: 2, all: 4 * gib, down: gib, total: 4 * gib, available: gib}.judge()...)
	say("more than there is", use{vms: 3, all: 5 * gib, total: 4 * gib, available: gib}.judge()...)
	say("more than is left", use{vms: 3, all: 4 * gib, down: 2 * gib, total: 4 * gib, available: gib}.judge()...)

	say("room", room{"space-store", "/store", 3 * gib, 100 * gib, 1e6, 1e6, false}.judge())
	say("little room", room{"space-store", "/store", gib, 100 * gib, 1e6, 1e6, false}.judge())
	say("a small file system with room", room{"space-run", "/run", gib, 2 * gib, 1e6, 1e6, false}.judge())
	say("no room", room{"space-run", "/run", 1 << 20, 2 * gib, 1e6, 1e6, false}.judge())
	say("few inodes", room{"space-store", "/store", 50 * gib, 100 * gib, 9000, 1e6, false}.judge())
	say("no inodes", room{"space-store", "/store", 50 * gib, 100 * gib, 0, 1e6, false}.judge())
	say("inodes without end", room{"space-store", "/store", 50 * gib, 100 * gib, 0, 0, false}.judge())
	say("read-only", room{"space-disks", "/vms", 50 * gib, 100 * gib, 1e6, 1e6, true}.judge())

	at := func(year int) time.Time { return time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC) }
	say("clock", clock(at(2026), true)...)
	say("clock adrift", clock(at(2026), false)...)
	say("clock of 1970", clock(at(1970), true)...)

	disk := host.NamedDisk{Disk: storage.Disk{Path: "/vms/web/overlay.raw", Size: gib}, Name: "the overlay"}
	say("disk to make", diskFinding(disk, storage.DiskState{}, fs.ErrNotExist, false))
	say("clean", diskFinding(disk, storage.DiskState{}, nil, false))
	say("in use", diskFinding(disk, storage.DiskState{Unfinished: true}, nil, true))
	say("killed", diskFinding(disk, storage.DiskState{Unfinished: true}, nil, false))
	say("with errors", diskFinding(disk, storage.DiskState{Errors: true}, nil, true))
	say("cut", diskFinding(disk, storage.DiskState{}, fmt.Errorf("the disk /vms/web/overlay.raw: its %w: it was cut off; restore it", storage.ErrCorruptDisk), false))

	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	list := []netip.Addr{one, two}
	silent := answer{err: errors.New("time-out")}
	say("name servers", nameservers(list, map[netip.Addr]answer{one: {took: 12 * time.Millisecond}, two: {}})...)
	say("one name server is silent", nameservers(list, map[netip.Addr]answer{one: {}, two: silent})...)
	say("all name servers are silent", nameservers(list, map[netip.Addr]answer{one: silent, two: silent})...)
	golden(t, "judgements.txt", b.String())
}

func TestMeminfo(t *testing.T) {
	total, available, err := meminfo("MemTotal:       2048 kB\nMemFree: 7 kB\nMemAvailable:   1024 kB\nHugePages_Total: 0\n")
	if total != 2<<20 || available != 1<<20 || err != nil {
		t.Error(total, available, err)
	}
	if _, _, err := meminfo("MemTotal: 12 kB\n"); err == nil {
		t.Error("half of it is enough")
	}
}

func TestUnits(t *testing.T) {
	dir := t.TempDir()
	etc, usr := filepath.Join(dir, "etc"), filepath.Join(dir, "usr")
	put := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	look := func() string {
		return strings.ReplaceAll(lines(units([]string{etc, usr}, func(n string) bool { return n == "web" })...), dir, "")
	}
	expect := func(want string) {
		t.Helper()
		if got := look(); got != want {
			t.Errorf("got  %swant %s", got, want)
		}
	}
	expect("note systemd: clawvm@.service is not installed: nothing starts VMs at boot → make install puts it in place\n")
	put(filepath.Join(etc, "multi-user.target.wants/clawvm@web.service"), "")
	expect("error systemd: web is enabled, and clawvm@.service is not installed → make install\n")
	program := filepath.Join(dir, "clawvm")
	put(filepath.Join(usr, unitName), "[Service]\nExecStart=-"+program+" run %i\n")
	expect("error systemd: /usr/clawvm@.service starts /clawvm, which isn't there → make install\n")
	put(program, "")
	expect("ok systemd: /usr/clawvm@.service; enabled: web\n")
	put(filepath.Join(etc, "clawvm.target.wants/clawvm@gone.service"), "")
	expect("warning systemd: clawvm@gone is enabled, and nothing declares VM gone → systemctl disable clawvm@gone, or declare it\n")
}

func TestPermissions(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to own files and to give them away")
	}
	dir := t.TempDir()
	store := filepath.Join(dir, "store")
	if err := os.Mkdir(store, 0o700); err != nil {
		t.Fatal(err)
	}
	look := func() string {
		return strings.ReplaceAll(lines(permissions([]owned{{store, 0o077, "others may reach it"}, {dir + "/none", 0o022, ""}})...), dir, "")
	}
	if got, want := look(), "ok permissions: clawvm's directories are root's alone\n"; got != want {
		t.Errorf("got  %swant %s", got, want)
	}
	if err := errors.Join(os.Chmod(store, 0o755), os.Chown(store, 12, 12)); err != nil {
		t.Fatal(err)
	}
	want := "error permissions: /store belongs to uid 12 and not to root → chown root /store\n" +
		"error permissions: /store has mode 0755: others may reach it → chmod 0700 /store\n"
	if got := look(); got != want {
		t.Errorf("got  %swant %s", got, want)
	}
}

// A check that hangs is said to, and holds up nothing.
func TestHangingCheck(t *testing.T) {
	never := make(chan struct{})
	defer close(never)
	c := check{name: "slow", do: func(context.Context, *look) []Finding { <-never; return nil }}
	k := &look{Options: Options{Limit: time.Millisecond}}
	if got := lines(c.run(t.Context(), k)...); got != "unknown slow: no answer within 1ms → give it more time: --timeout\n" {
		t.Error(got)
	}
}

// Who may not look says so, and never that nothing is there.
func TestCouldNotLook(t *testing.T) {
	f := broken("images", Error, fmt.Errorf("cannot list the images: %w", unix.EACCES))
	want := Finding{Check: "images", Severity: Error, Seen: "cannot list the images: permission denied"}
	if os.Geteuid() != 0 {
		want = Finding{Check: "images", Severity: Unknown, Seen: "could not look: cannot list the images: permission denied", Do: "ask as root"}
	}
	if f != want {
		t.Errorf("%+v", f)
	}
}
