package integration

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	shared "github.com/clawvm/clawvm/integration/world"
)

var updateGolden = flag.Bool("update", false, "rewrite the golden files in testdata")

// refuseLimit bounds one refusal, which takes some 100 ms; the first one also
// makes the kernel's initramfs.
const refuseLimit = 2 * time.Minute

// refuseHost gives the root of these tests a bridge of its own, so that it meets
// no other test's.
const refuseHost = "bridge: refusebr\naddress: 192.168.84.1/24\n"

// refuser is a root with an image and a kernel, in which nothing is ever started.
type refuser struct {
	*world
	dir   string // what is not in the root: secrets, shares, archives
	image string // digest of the image small
	torn  string // and of the image torn, in which a file was changed
}

// refusal is a command that must fail, and leave everything as it was.
type refusal struct {
	name string
	// vm is the declaration of the VM vm; DIR in it stands for the directory of
	// the tests' files. Without one nothing is declared.
	vm string
	// args is the command line; without one it is `up vm`.
	args []string
	// env is added to the environment.
	env []string
	// mounts is a shell script that changes what the command sees of the host, in
	// a mount namespace of its own.
	mounts string
	uid    uint32
	root   string // another --root
	before func(t *testing.T, r *refuser)
	// leaves is what may be left below the root.
	leaves []string
}

const (
	// noHardware hides the processor's virtualisation, so that the machine's own
	// doesn't show in a message.
	noHardware = "mount --bind DIR/cpuinfo /proc/cpuinfo\n"
	// noKernels hides the host's kernels.
	noKernels = "for d in /boot /lib/modules /run/booted-system ROOT/var/lib/clawvm/store/kernels; do\n" +
		"  if [ -d $d ]; then mount -t tmpfs none $d; fi\ndone\n"
	noPath = "PATH=DIR/empty"
)

var refusals = []refusal{
	// What is wrong with a declaration by itself.
	{name: "unknown-field", vm: "image: small\nmemroy: 256MiB\n"},
	{name: "wrong-type", vm: "image: small\nvcpus: two\nports: 8080\n"},
	{name: "bad-size", vm: "image: small\nmemory: 2 gigabytes\n"},
	{name: "bad-address", vm: "image: small\naddress: 192.168.84.300\n"},
	{name: "address-outside", vm: "image: small\naddress: 10.0.0.5\n"},
	{name: "duplicate-port", vm: "image: small\nports: [\"8080:80\", \"8080:81\"]\n"},
	{name: "duplicate-key", vm: "image: small\nvcpus: 1\nvcpus: 2\n"},
	{name: "memory-too-small", vm: "image: small\nmemory: 64MiB\n"},
	{name: "unknown-vmm", vm: "image: small\nvmm: firecracker\n"},
	{name: "two-documents", vm: "image: small\n---\nimage: small\n"},
	{name: "billion-laughs", vm: "image: small\nrun:\n  argv: &a [lol, lol]\n  env: {A: [*a, *a, *a, *a]}\n"},
	{name: "many-problems", vm: "imagee: small\nvcpus: 100\nmemory: 1MiB\nvmm: xen\n"},
	{name: "no-yaml", vm: "image: [small\n"},
	{name: "empty", vm: "\n"},
	{name: "hundred-megabytes", before: func(t *testing.T, r *refuser) {
		r.declare(t, "vm", "image: small\n")
		if err := os.Truncate(r.declaration("vm"), 100<<20); err != nil {
			t.Fatal(err)
		}
	}},
	{name: "directory", before: func(t *testing.T, r *refuser) { mkdir(t, r.declaration("vm"), 0o755) }},
	{name: "host-config", vm: "image: small\n", before: func(t *testing.T, r *refuser) {
		r.configure(t, "brigde: refusebr\n")
	}},

	// What a declaration names.
	{name: "memory-of-the-host", vm: "image: small\nmemory: 16TiB\n"},
	{name: "address-taken", vm: "image: small\naddress: 192.168.84.10\n", before: func(t *testing.T, r *refuser) {
		lease := filepath.Join(r.root, "var/lib/clawvm/leases/192.168.84.10")
		if err := os.Symlink("other", lease); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { remove(t, lease) })
	}},
	{name: "secret-missing", vm: "image: small\nsecrets: {token: {file: DIR/nothing}}\n"},
	{name: "secret-mode", vm: "image: small\nsecrets: {token: {file: DIR/open}}\n"},
	{name: "secret-empty", vm: "image: small\nsecrets: {token: {file: DIR/void}}\n"},
	{name: "secret-not-given", vm: "image: small\nsecrets: {token: {stdin: true}}\n"},
	{name: "secret-credential", vm: "image: small\nsecrets: {token: {credential: api-key}}\n"},
	{name: "secrets", vm: "image: small\nsecrets: {a: {file: DIR/nothing}, b: {file: DIR/open}}\n"},
	{name: "image-missing", vm: "image: nothing\n"},
	{name: "image-digest-unknown", vm: "image: sha256:" + strings.Repeat("0", 64) + "\n"},
	{name: "image-corrupt", vm: "image: torn\n"},
	{name: "user-missing", vm: "image: small\nrun: {argv: [sh], user: nobody}\n"},
	{name: "kernel-missing", vm: "image: small\nkernel: 6.66.6-none\n"},
	{name: "kernel-path-missing", vm: "image: small\nkernel: DIR/vmlinuz\n"},
	{name: "share-missing", vm: "image: small\nshares: [{source: DIR/nothing, mount: /srv/x, readonly: true}]\n"},
	{name: "share-file", vm: "image: small\nshares: [{source: DIR/void, mount: /srv/x, readonly: true}]\n"},
	{
		name: "share-not-squashed", vm: "image: small\nshares: [{source: DIR/share, mount: /srv/x}]\n",
		env: []string{"CLAWVM_VIRTIOFSD=DIR/virtiofsd-1.12"},
	},
	{
		name: "share-of-root", vm: "image: small\nshares: [{source: DIR/empty, mount: /srv/x}]\n",
		env: []string{"CLAWVM_VIRTIOFSD=DIR/virtiofsd-1.13"},
	},
	{name: "port-in-use", vm: "image: small\nports: [\"18099:80\"]\n", before: func(t *testing.T, r *refuser) {
		l, err := net.Listen("tcp", "127.0.0.1:18099")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}},
	{name: "port-address", vm: "image: small\nports: [\"198.51.100.7:8080:80\"]\n"},
	{name: "all-at-once", vm: "image: nothing\nmemory: 16TiB\nsecrets: {token: {file: DIR/nothing}}\nkernel: 6.66.6-none\nports: [\"198.51.100.7:8080:80\"]\n"},

	// What the host lacks.
	{name: "no-vmm", vm: "image: small\n", env: []string{noPath}, mounts: noHardware},
	{name: "no-qemu", vm: "image: small\nvmm: qemu\n", env: []string{noPath}},
	{name: "no-cloud-hypervisor", vm: "image: small\nvmm: cloud-hypervisor\n", env: []string{noPath}},
	{name: "cloud-hypervisor-named-wrongly", vm: "image: small\nvmm: cloud-hypervisor\n", env: []string{"CLAWVM_CLOUD_HYPERVISOR=/nowhere/cloud-hypervisor"}},
	{name: "cloud-hypervisor-without-kvm", vm: "image: small\nvmm: cloud-hypervisor\n", env: []string{"CLAWVM_CLOUD_HYPERVISOR=/bin/true"}, mounts: noHardware},
	{name: "no-virtiofsd", vm: "image: small\n", env: []string{"CLAWVM_VIRTIOFSD=/nowhere/virtiofsd"}},
	{name: "old-virtiofsd", vm: "image: small\n", env: []string{"CLAWVM_VIRTIOFSD=DIR/virtiofsd-1.8"}},
	{name: "no-kernel", vm: "image: small\n", mounts: noKernels},
	{name: "no-root", vm: "image: small\n", uid: 65534},
	{name: "bridge-of-another-root", vm: "image: small\n", before: func(t *testing.T, r *refuser) {
		keepLink(t, bridge("refusebr"), "clawvm:0a1b2c3d:")
	}},
	{name: "bridge-of-nobody", vm: "image: small\n", before: func(t *testing.T, r *refuser) { keepLink(t, bridge("refusebr"), "") }},
	{name: "subnet-in-use", vm: "image: small\n", before: func(t *testing.T, r *refuser) {
		keepLink(t, bridge("vpn0"), "")
		if err := addAddress("vpn0", netip.MustParsePrefix("192.168.84.129/25")); err != nil {
			t.Fatal(err)
		}
	}},

	// What is wrong with a command line.
	{name: "unknown-vm", args: []string{"up", "nothing"}},
	{name: "invalid-name", args: []string{"up", "No_Name"}},
	{name: "no-name", args: []string{"up"}},
	{name: "unknown-command", args: []string{"frobnicate"}},
	{name: "unknown-subcommand", args: []string{"image", "frobnicate"}},
	{name: "unknown-flag", args: []string{"up", "--frobnicate", "vm"}},
	{name: "unknown-flag-before", args: []string{"--frobnicate", "up", "vm"}},
	{name: "bad-flag", args: []string{"up", "--timeout", "soon", "vm"}},
	{name: "long-root", args: []string{"up", "vm"}, root: "/run/" + strings.Repeat("r", 100)},
	{name: "status-unknown-vm", args: []string{"status", "nothing"}},
	{name: "down-unknown-vm", args: []string{"down", "nothing"}},
	{name: "enable-root", vm: "image: small\n", args: []string{"enable", "vm"}},
	{name: "down-bad-time", vm: "image: small\n", args: []string{"down", "-t", "ten", "vm"}},
	{name: "pause-down", vm: "image: small\n", args: []string{"pause", "vm"}},
	{name: "resume-unknown-vm", args: []string{"resume", "nothing"}},
	{name: "reload-down", vm: "image: small\n", args: []string{"reload", "vm"}},
	{name: "reload-no-name", args: []string{"reload"}},
	{name: "recreate-broken", vm: "image: nothing\n", args: []string{"up", "--recreate", "vm"}},
	{name: "exec-down", vm: "image: small\n", args: []string{"exec", "vm", "true"}},
	{name: "exec-unknown-vm", args: []string{"exec", "nothing", "true"}},
	{name: "cp-nothing", vm: "image: small\n", args: []string{"cp", "DIR/empty"}},
	{name: "cp-down", vm: "image: small\n", args: []string{"cp", "DIR/empty", "vm:/tmp"}},
	{name: "cp-from-down", vm: "image: small\n", args: []string{"cp", "vm:/etc/passwd", "-"}},
	{name: "cp-source-missing", vm: "image: small\n", args: []string{"cp", "DIR/nothing", "vm:/tmp"}},
	{name: "cp-unknown-vm", args: []string{"cp", "nothing:/etc", "DIR/empty"}},
	{name: "cp-no-vm", vm: "image: small\n", args: []string{"cp", "DIR/empty", "DIR/other"}},
	{name: "cp-no-path", vm: "image: small\n", args: []string{"cp", "vm:", "DIR/other"}},
	{name: "cp-bad-name", vm: "image: small\n", args: []string{"cp", "Bad_Name:/etc", "DIR/other"}},
	{name: "cp-owners", vm: "image: small\n", args: []string{"cp", "-a", "DIR/empty", "vm:/tmp"}},
	{name: "logs-since", vm: "image: small\n", args: []string{"logs", "--since", "yesterday", "vm"}},
	{name: "logs-until", vm: "image: small\n", args: []string{"logs", "--since", "1h", "--until", "2h", "vm"}},
	{name: "logs-two", vm: "image: small\n", args: []string{"logs", "--console", "--supervisor", "vm"}},
	{name: "logs-nothing", args: []string{"logs"}},
	{name: "two-vms", vm: "image: nothing\n", args: []string{"up", "vm", "other"}, before: func(t *testing.T, r *refuser) {
		r.declare(t, "other", "image: small\nmemory: 1MiB\n")
	}},
	{
		name: "run", vm: "image: nothing\n", args: []string{"run", "vm"},
		leaves: []string{"run/clawvm/vm/lock", "run/clawvm/vm", "var/lib/clawvm/vms/vm/last-end.json", "var/lib/clawvm/vms/vm"},
	},

	// A declaration that is given as a file.
	{name: "file-missing", args: []string{"up", "DIR/nothing.yaml"}},
	{name: "file-directory", args: []string{"up", "DIR/empty"}},
	{name: "file-name", args: []string{"up", "DIR/Bad_Name.yaml"}},
	{name: "file-broken", args: []string{"up", "DIR/broken.yaml"}},
	{name: "file-of-a-declared-vm", vm: "image: small\n", args: []string{"up", "DIR/vm.yaml"}},
	{name: "config-check", vm: "image: small\nvcpus: 100\nmemory: 1MiB\n", args: []string{"config", "check"}},

	// Images.
	{name: "import-digest", args: []string{"image", "import", "--digest", "sha256:" + strings.Repeat("0", 64), "DIR/tree", "other"}},
	{name: "import-no-digest", args: []string{"image", "import", "--digest", "sha256:123", "DIR/tree", "other"}},
	{name: "import-missing", args: []string{"image", "import", "DIR/nothing", "other"}},
	{name: "import-name", args: []string{"image", "import", "DIR/tree", "No Name"}},
	{name: "import-no-archive", args: []string{"image", "import", "DIR/open", "other"}},
	{name: "verify-corrupt", args: []string{"image", "verify", "torn"}},
	{name: "verify-missing", args: []string{"image", "verify", "nothing"}},
}

// TestRefuse gives clawvm what it must refuse, and compares its whole answer with
// a golden file. Whatever it refuses, the host is as before.
func TestRefuse(t *testing.T) {
	r := newRefuser(t)
	for _, c := range refusals {
		t.Run(c.name, func(t *testing.T) { r.refuse(t, c) })
	}
}

// TestRefuseHalfway lets a start fail after network, rules and gate are there,
// which no check foresees: the server of the image ends at once. Only what
// outlives every VM stays, and gc --all removes that.
func TestRefuseHalfway(t *testing.T) {
	r := newRefuser(t)
	r.declare(t, "vm", "image: small\noverlay: {tmpfs: 16MiB}\nsecrets: {made: {generate: 32}}\n")
	t.Cleanup(func() { remove(t, r.declaration("vm")) })
	before := r.everything(t)
	got := r.try(t, refusal{args: []string{"up", "vm"}, env: []string{"CLAWVM_VIRTIOFSD=DIR/virtiofsd-1.13"}})
	if got.code != 1 || !strings.Contains(got.stderr, "cannot start VM vm:") || strings.Count(got.stderr, "VM vm") != 1 {
		t.Errorf("exit code %d, and it says\n%s", got.code, got.stderr)
	}
	t.Log(r.conceal(got.stderr))
	if out := r.must(t, "gc"); out != "nothing was left behind\n" {
		t.Errorf("gc says %q", out)
	}
	r.must(t, "gc", "--all")
	r.must(t, "rm", "vm")
	// An empty file, which all that change rules lock.
	remove(t, filepath.Join(r.root, "run/clawvm/.rules.lock"))
	r.compare(t, before, r.everything(t))
}

func newRefuser(t *testing.T) *refuser {
	w := newWorld(t)
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("QEMU is not installed: its absence would be a problem of every VM (scripts/setup test)")
	}
	r := &refuser{world: &world{World: &shared.World{Bin: w.bin, Root: "/run/refuse"}, bin: w.bin, root: "/run/refuse"}, dir: t.TempDir()}
	// Others pass through, as a test runs as one of them.
	for _, d := range []string{r.dir, filepath.Dir(r.dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.prepareStore(t)
	r.configure(t, refuseHost)
	for _, d := range []string{"var/lib/clawvm/leases", "etc/clawvm/vms"} {
		mkdir(t, filepath.Join(r.root, d), 0o755)
	}
	for _, d := range []string{"empty", "share", "tree"} {
		mkdir(t, filepath.Join(r.dir, d), 0o755)
	}
	if err := os.Chown(filepath.Join(r.dir, "share"), 1000, 1000); err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]struct {
		text string
		mode os.FileMode
	}{
		"open": {"not so secret\n", 0o644}, "void": {"", 0o600}, "tree/file": {"whole\n", 0o644},
		"cpuinfo":       {"processor\t: 0\nflags\t\t: fpu sse\n", 0o444},
		"Bad_Name.yaml": {"image: small\n", 0o644}, "broken.yaml": {"image: nothing\n", 0o644}, "vm.yaml": {"image: small\n", 0o644},
		"virtiofsd-1.8": {"#!/bin/sh\necho virtiofsd 1.8.0\n", 0o755}, "virtiofsd-1.12": {"#!/bin/sh\necho virtiofsd 1.12.0\n", 0o755}, "virtiofsd-1.13": {"#!/bin/sh\necho virtiofsd 1.13.0\n", 0o755},
	} {
		path := filepath.Join(r.dir, name)
		if err := os.WriteFile(path, []byte(file.text), file.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, file.mode); err != nil {
			t.Fatal(err)
		}
	}
	r.image = r.digestOf(t, "small")
	r.torn = strings.TrimSpace(r.must(t, "image", "import", filepath.Join(r.dir, "tree"), "torn"))
	file := filepath.Join(r.root, "var/lib/clawvm/store/images", strings.Replace(r.torn, ":", "-", 1), "rootfs/file")
	if err := os.WriteFile(file, []byte("torn to pieces\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return r
}

// digestOf reads where an image's name leads.
func (r *refuser) digestOf(t *testing.T, name string) string {
	t.Helper()
	target, err := os.Readlink(filepath.Join(r.root, "var/lib/clawvm/store/names", name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(filepath.Base(target), "-", ":", 1)
}

func (r *refuser) refuse(t *testing.T, c refusal) {
	for _, name := range []string{"vm", "other"} {
		t.Cleanup(func() { remove(t, r.declaration(name)) })
	}
	if c.vm != "" {
		r.declare(t, "vm", r.expand(c.vm))
	}
	if c.before != nil {
		c.before(t, r)
	}
	if len(c.args) == 0 {
		c.args = []string{"up", "vm"}
	}
	before := r.everything(t)
	got := r.try(t, c)
	for _, path := range c.leaves {
		if err := os.Remove(filepath.Join(r.root, path)); err != nil {
			t.Error(err)
		}
	}
	r.compare(t, before, r.everything(t))
	if got.code == 0 || got.stderr == "" {
		t.Errorf("exit code %d, and it says %q", got.code, got.stderr)
	}
	for _, bad := range []string{"fork/exec", ": open /", ": stat /", ": lstat /", "%!", "&{", "0x", "<nil>"} {
		if strings.Contains(got.stderr, bad) {
			t.Errorf("%q is no word for an administrator:\n%s", bad, got.stderr)
		}
	}
	text := fmt.Sprintf("$ clawvm %s\n%s%sexit code %d\n", strings.Join(c.args, " "), got.stdout, got.stderr, got.code)
	sameAsFile(t, filepath.Join("testdata/refuse", c.name+".golden"), r.conceal(text))
}

// try runs the command, in a mount namespace of its own where the case changes
// what is mounted.
func (r *refuser) try(t *testing.T, c refusal) result {
	t.Helper()
	root := r.root
	if c.root != "" {
		root = c.root
	}
	argv := []string{filepath.Join(r.bin, "clawvm"), "--root", root}
	for _, a := range c.args {
		argv = append(argv, r.expand(a))
	}
	if c.mounts != "" {
		env := append([]string{"env"}, c.env...)
		script := "set -e\n" + r.expand(c.mounts) + `exec "$@"`
		for i := range env {
			env[i] = r.expand(env[i])
		}
		argv = append(append([]string{"unshare", "--mount", "sh", "-c", script, "sh"}, env...), argv...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), refuseLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !strings.HasPrefix(name, "CLAWVM_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	if c.mounts == "" {
		for _, v := range c.env {
			cmd.Env = append(cmd.Env, r.expand(v))
		}
	}
	if c.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.uid, Gid: c.uid}}
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", strings.Join(argv, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// expand puts this run's paths in the place of DIR and ROOT.
func (r *refuser) expand(s string) string {
	return strings.NewReplacer("DIR", r.dir, "ROOT", r.root).Replace(s)
}

// What differs between machines and is no matter of these tests.
var (
	hostMemory  = regexp.MustCompile(`more than the [0-9]+[KMGT]?i?B that`)
	hostRelease = regexp.MustCompile(`the host's own \([^)]*\)`)
	storeHas    = regexp.MustCompile(`\(it has: [^)]*\)`)
	stepTime    = regexp.MustCompile(`(?m)[0-9.]+ s$`)
	logTime     = regexp.MustCompile(`(?m)^[0-9]{4}/[0-9/]+ [0-9:]{8} `)
)

// conceal is the opposite of expand, and hides what the machine is like.
func (r *refuser) conceal(s string) string {
	s = strings.NewReplacer(r.dir, "DIR", r.root, "ROOT", r.image, "sha256:SMALL", r.torn, "sha256:TORN", r.bin, "BIN").Replace(s)
	s = hostMemory.ReplaceAllString(s, "more than the SIZE that")
	s = hostRelease.ReplaceAllString(s, "the host's own (RELEASE)")
	s = stepTime.ReplaceAllString(s, "N s")
	s = logTime.ReplaceAllString(s, "TIME ")
	return storeHas.ReplaceAllString(s, "(it has: RELEASES)")
}

func (r *refuser) declaration(name string) string {
	return filepath.Join(r.root, "etc/clawvm/vms", name+".yaml")
}

// configure writes the host's settings for this test.
func (r *refuser) configure(t *testing.T, text string) {
	t.Helper()
	file := filepath.Join(r.root, "etc/clawvm/clawvm.yaml")
	mkdir(t, filepath.Dir(file), 0o755)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, []byte(refuseHost), 0o644); err != nil {
			t.Error(err)
		}
	})
}

// everything is the snapshot of the host, with what is declared and stored, and
// without the program's processes there being any.
func (r *refuser) everything(t *testing.T) map[string][]string {
	t.Helper()
	shot := r.snapshot(t)
	for _, dir := range []string{"etc", "var/lib/clawvm/store/images", "var/lib/clawvm/store/names", "var/lib/clawvm/store/tmp"} {
		top := filepath.Join(r.root, dir)
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil {
				shot["files"] = append(shot["files"], d.Type().String()+" "+path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"vm", "other"} {
		for kind, pids := range r.processes(t, name) {
			shot["processes"] = append(shot["processes"], fmt.Sprint(kind, pids))
		}
	}
	if shot["processes"] == nil {
		shot["processes"] = []string{"none"}
	}
	return shot
}

func mkdir(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(path, mode); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Error(err)
	}
}
