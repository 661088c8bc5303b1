package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	shared "github.com/clawvm/clawvm/integration/world"
)

// doctorLimit is what doctor may take, whatever hangs.
const doctorLimit = 3 * time.Second

// finding is the JSON of `clawvm doctor`.
type finding struct {
	Check    string `json:"check"`
	VM       string `json:"vm"`
	Severity string `json:"severity"`
	Seen     string `json:"seen"`
	Do       string `json:"do"`
}

func (f finding) String() string {
	return fmt.Sprintf("%s %s %s: %s → %s", f.VM, f.Severity, f.Check, f.Seen, f.Do)
}

// patient is how doctor is run.
type patient struct {
	root string
	env  []string
	uid  uint32
	args []string
}

// doctor runs the program and reads what it found.
func (w *world) doctor(t *testing.T, p patient) ([]finding, int) {
	t.Helper()
	if p.root == "" {
		p.root = w.root
	}
	cmd := exec.Command(filepath.Join(w.bin, "clawvm"), append([]string{"--root", p.root, "doctor", "--json"}, p.args...)...)
	cmd.Env = append(os.Environ(), p.env...)
	if p.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: p.uid, Gid: p.uid}}
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err := cmd.Run()
	if took := time.Since(began); took > doctorLimit {
		t.Errorf("doctor took %v", took)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var all []finding
	if err := json.Unmarshal(stdout.Bytes(), &all); err != nil {
		t.Fatalf("doctor ended with %d: %v\n%s%s", cmd.ProcessState.ExitCode(), err, &stdout, &stderr)
	}
	return all, cmd.ProcessState.ExitCode()
}

// of finds the findings of a check about a VM.
func of(all []finding, check, vm string) []finding {
	return slices.DeleteFunc(slices.Clone(all), func(f finding) bool { return f.Check != check || f.VM != vm })
}

// declaration of the VM that doctor looks at.
const patientText = `
image: small
vmm: qemu
memory: 128MiB
overlay: {size: 16MiB}
nameservers: [203.0.113.1]
secrets:
  token: {file: /run/doctor-token}
  made: {generate: 32}
ports: ["127.0.0.1:18080:80"]
`

// TestDoctor breaks the host in many ways, one at a time, and looks that doctor sees each, says what to do, and sees nothing before.
func TestDoctor(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	put := func(t *testing.T, path, text string, mode os.FileMode) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	do := func(t *testing.T, errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	w.declare(t, "patient", patientText)
	put(t, "/run/doctor-token", "secret", 0o600)
	t.Cleanup(func() {
		do(t, os.Remove(filepath.Join(w.root, "etc/clawvm/vms/patient.yaml")), os.RemoveAll(filepath.Join(w.root, "var/lib/clawvm/vms/patient")))
	})
	image := strings.TrimSpace(w.must(t, "image", "import", shared.SmallImage(t), "doctored"))
	t.Cleanup(func() { w.must(t, "image", "rm", "doctored") })
	rootfs := filepath.Join(w.root, "var/lib/clawvm/store/images", strings.Replace(image, ":", "-", 1), "rootfs")

	bind := func(t *testing.T, source, at string) func() {
		t.Helper()
		do(t, unix.Mount(source, at, "", unix.MS_BIND, ""))
		return func() { do(t, unix.Unmount(at, 0)) }
	}
	tmpfs := func(t *testing.T, at, options string, flags uintptr) func() {
		t.Helper()
		do(t, os.MkdirAll(at, 0o755), unix.Mount("tmpfs", at, "tmpfs", flags, options))
		return func() { do(t, unix.Unmount(at, 0)) }
	}
	logs, disk := filepath.Join(w.root, "var/log/clawvm"), filepath.Join(w.root, "var/lib/clawvm/vms/patient/overlay.raw")
	for _, c := range []struct {
		name      string
		check, vm string
		severity  string
		seen, do  string
		env, args []string
		harm      func(t *testing.T) (mend func())
	}{
		{name: "subnet in use", check: "subnet", severity: "error", seen: "overlaps the route to 192.168.83.0/25", do: "declare another `address:`",
			harm: func(t *testing.T) func() {
				uplink, err := netlink.LinkByName("uplink")
				do(t, err)
				route := &netlink.Route{LinkIndex: uplink.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4(192, 168, 83, 0), Mask: net.CIDRMask(25, 32)}}
				do(t, netlink.RouteAdd(route))
				return func() { do(t, netlink.RouteDel(route)) }
			}},
		{name: "Docker's drop", check: "firewall", severity: "error", seen: "(docker)", do: "iptables -I DOCKER-USER -m mark",
			harm: func(t *testing.T) func() {
				c, err := nftables.New()
				do(t, err)
				table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "filter"})
				drop := nftables.ChainPolicyDrop
				c.AddChain(&nftables.Chain{Name: "DOCKER-USER", Table: table})
				c.AddChain(&nftables.Chain{Name: "FORWARD", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
				do(t, c.Flush())
				return func() {
					c, err := nftables.New()
					do(t, err)
					c.DelTable(table)
					do(t, c.Flush())
				}
			}},
		{name: "no tun", check: "tap", severity: "error", seen: "cannot attach VM trial", do: "tun",
			harm: func(t *testing.T) func() { return bind(t, "/dev/null", "/dev/net/tun") }},
		{name: "uid of a user", check: "uids", severity: "error", seen: "user mallory", do: "uidBase",
			harm: func(t *testing.T) func() {
				put(t, "/run/passwd", "mallory:x:2000000003:2000000003::/:/bin/sh\n", 0o644)
				return bind(t, "/run/passwd", "/etc/passwd")
			}},
		{name: "full", check: "space-log", severity: "error", seen: "left for " + logs, do: "make the file system larger",
			harm: func(t *testing.T) func() { return tmpfs(t, logs, "size=1m", 0) }},
		{name: "no inodes", check: "space-log", severity: "error", seen: "inodes",
			harm: func(t *testing.T) func() { return tmpfs(t, logs, "nr_inodes=2", 0) }},
		{name: "read-only", check: "space-log", severity: "error", seen: "read-only",
			harm: func(t *testing.T) func() { return tmpfs(t, logs, "", unix.MS_RDONLY) }},
		{name: "virtiofsd", check: "virtiofsd", severity: "error", seen: "/none", do: "correct it", env: []string{"CLAWVM_VIRTIOFSD=/none"}},
		{name: "cloud-hypervisor", check: "cloud-hypervisor", severity: "error", seen: "/none", do: "unset it", env: []string{"CLAWVM_CLOUD_HYPERVISOR=/none"}},
		{name: "declarations that all may write", check: "permissions", severity: "error", seen: "0777", do: "chmod 0755",
			harm: func(t *testing.T) func() {
				dir := filepath.Join(w.root, "etc/clawvm/vms")
				do(t, os.Chmod(dir, 0o777))
				return func() { do(t, os.Chmod(dir, 0o755)) }
			}},
		{name: "image", check: "images", severity: "error", seen: "usr/bin/marker", do: "image rm",
			harm: func(t *testing.T) func() {
				marker := filepath.Join(rootfs, "usr/bin/marker")
				do(t, os.Chmod(marker, 0o777))
				return func() { do(t, os.Chmod(marker, 0o644)) }
			}},
		{name: "image's content", check: "images", severity: "error", seen: "usr/bin/marker", args: []string{"--verify"},
			harm: func(t *testing.T) func() {
				marker := filepath.Join(rootfs, "usr/bin/marker")
				info, err := os.Stat(marker)
				do(t, err)
				was, err := os.ReadFile(marker)
				do(t, err, os.WriteFile(marker, bytes.ToUpper(was), 0), os.Chtimes(marker, info.ModTime(), info.ModTime()))
				return func() { do(t, os.WriteFile(marker, was, 0), os.Chtimes(marker, info.ModTime(), info.ModTime())) }
			}},
		{name: "left-overs", check: "left-overs", severity: "warning", seen: "run/clawvm/ghost/gate.sock", do: "--root " + w.root + " gc",
			harm: func(t *testing.T) func() {
				dir := filepath.Join(w.root, "run/clawvm/ghost")
				put(t, filepath.Join(dir, "gate.sock"), "", 0o600)
				return func() { do(t, os.RemoveAll(dir)) }
			}},
		{name: "host's settings", check: "host-config", severity: "error", seen: "bridg", do: "",
			harm: func(t *testing.T) func() {
				file := filepath.Join(w.root, "etc/clawvm/clawvm.yaml")
				put(t, file, "bridg: br0\n", 0o644)
				return func() { do(t, os.Remove(file)) }
			}},
		{name: "declaration", check: "declaration", vm: "ill", severity: "error", seen: "ill.yaml:2:1", do: "want",
			harm: func(t *testing.T) func() {
				w.declare(t, "ill", "image: small\nmemroy: 1GiB\n")
				return func() { do(t, os.Remove(filepath.Join(w.root, "etc/clawvm/vms/ill.yaml"))) }
			}},
		{name: "no image", check: "image", vm: "bare", severity: "error", seen: "no image nothing", do: "--root " + w.root + " image build nothing",
			harm: func(t *testing.T) func() {
				w.declare(t, "bare", "image: nothing\nnameservers: [203.0.113.1]\n")
				return func() { do(t, os.Remove(filepath.Join(w.root, "etc/clawvm/vms/bare.yaml"))) }
			}},
		{name: "a secret that others read", check: "secret", vm: "patient", severity: "error", seen: "0644", do: "chmod 600 /run/doctor-token",
			harm: func(t *testing.T) func() {
				do(t, os.Chmod("/run/doctor-token", 0o644))
				return func() { do(t, os.Chmod("/run/doctor-token", 0o600)) }
			}},
		{name: "no secret", check: "secret", vm: "patient", severity: "error", seen: "no such file", do: "write the secret there",
			harm: func(t *testing.T) func() {
				do(t, os.Remove("/run/doctor-token"))
				return func() { put(t, "/run/doctor-token", "secret", 0o600) }
			}},
		{name: "a disk without a file system", check: "disk", vm: "patient", severity: "error", seen: "no ext4 file system",
			harm: func(t *testing.T) func() {
				put(t, disk, strings.Repeat("x", 16<<20), 0o600)
				return func() { do(t, os.Remove(disk)) }
			}},
		{name: "silent name server", check: "nameserver", vm: "deaf", severity: "error", seen: "203.0.113.77", do: "nameservers:",
			harm: func(t *testing.T) func() {
				w.declare(t, "deaf", "image: small\nnameservers: [203.0.113.77]\n")
				return func() { do(t, os.Remove(filepath.Join(w.root, "etc/clawvm/vms/deaf.yaml"))) }
			}},
		{name: "port taken", check: "up ports", vm: "patient", severity: "error", seen: "127.0.0.1:18080", do: "end it", args: []string{"patient"},
			harm: func(t *testing.T) func() {
				l, err := net.Listen("tcp", "127.0.0.1:18080")
				do(t, err)
				return func() { do(t, l.Close()) }
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			well, _ := w.doctor(t, patient{args: c.args})
			for _, f := range of(well, c.check, c.vm) {
				if f.Severity == c.severity && strings.Contains(f.Seen, c.seen) {
					// On a machine that is as ill as the test would make it, nothing is proved.
					t.Skipf("so it is here without that: %v", f)
				}
			}
			if c.harm != nil {
				defer c.harm(t)()
			}
			ill, code := w.doctor(t, patient{env: c.env, args: c.args})
			found := of(ill, c.check, c.vm)
			if !slices.ContainsFunc(found, func(f finding) bool {
				return f.Severity == c.severity && strings.Contains(f.Seen, c.seen) && strings.Contains(f.Do, c.do)
			}) {
				t.Errorf("wanted %s %s: …%s… → …%s…; found: %v", c.severity, c.check, c.seen, c.do, found)
			}
			if c.severity == "error" && code != 1 || c.severity == "warning" && code != 1 && code != 10 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

// TestDoctorOfOne says what the next start of a VM would do, and does nothing of it.
func TestDoctorOfOne(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	w.declare(t, "patient", strings.Replace(patientText, "file: /run/doctor-token", "generate: 16", 1))
	t.Cleanup(func() {
		if err := os.Remove(filepath.Join(w.root, "etc/clawvm/vms/patient.yaml")); err != nil {
			t.Fatal(err)
		}
	})
	before := tree(t, w.root)
	all, _ := w.doctor(t, patient{args: []string{"patient"}})
	for check, want := range map[string]string{
		"up declaration": "patient.yaml: 4 vCPUs, 128MiB", "up secrets": "2, each", "up image": "small, sha256:", "up VMM": "qemu ",
		"up kernel": "(", "up address": "the lowest free one of 192.168.83.0/24", "up ports": "127.0.0.1:18080->80/tcp", "up disks": "makes the overlay (16MiB)",
	} {
		found := of(all, check, "patient")
		if len(found) != 1 || found[0].Severity != "ok" || !strings.Contains(found[0].Seen, want) {
			t.Errorf("%s: want %q, found %v", check, want, found)
		}
	}
	for _, f := range all {
		if f.VM != "" && f.VM != "patient" {
			t.Errorf("not asked for: %v", f)
		}
	}
	if after := tree(t, w.root); after != before {
		t.Errorf("changed:\n%s\nwas:\n%s", after, before)
	}
	for _, c := range []struct {
		code int
		args []string
	}{{4, []string{"nobody"}}, {2, []string{"No-Name"}}, {2, []string{"a", "b"}}} {
		if r := w.clawvm(t, append([]string{"doctor"}, c.args...)...); r.code != c.code || r.stderr == "" {
			t.Errorf("doctor %v: %+v", c.args, r)
		}
	}
	// What is for people says the same.
	if r := w.clawvm(t, "doctor", "patient"); !strings.Contains(r.stdout, "\nVM patient\n") || !strings.Contains(r.stdout, "makes the overlay (16MiB)") {
		t.Errorf("%+v", r)
	}
}

// TestDoctorUnprivileged tells what isn't there from what could not be looked at.
func TestDoctorUnprivileged(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	const nobody = 65534
	all, _ := w.doctor(t, patient{uid: nobody})
	for _, check := range []string{"network", "images", "left-overs"} {
		found := of(all, check, "")
		if len(found) != 1 || found[0].Severity != "unknown" || found[0].Do != "ask as root" {
			t.Errorf("%s: %v", check, found)
		}
	}
	// Of a root that isn't there everything is said, and it isn't made.
	fresh := "/run/fresh"
	all, _ = w.doctor(t, patient{root: fresh})
	for check, seen := range map[string]string{"declarations": "no VM is declared", "images": "the store has none", "left-overs": "nothing was started"} {
		if found := of(all, check, ""); len(found) != 1 || !strings.Contains(found[0].Seen, seen) {
			t.Errorf("%s: %v", check, found)
		}
	}
	if _, err := os.Lstat(fresh); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s was made: %v", fresh, err)
	}
}

// tree lists what is below a directory, with what a change would change.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&b, path, info.Mode(), info.Size(), info.ModTime().UnixNano())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
