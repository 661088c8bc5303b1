package recipe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/clawvm/clawvm/storage"
)

// Steps that run in namespaces need root; images from the network need
// mmdebstrap as well.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a user namespace with 65536 ids")
	}
}

// testBuild is a build in a directory of its own, and a root owned by the
// namespace's root in it.
func testBuild(t *testing.T) (*build, string) {
	t.Helper()
	needRoot(t)
	var log bytes.Buffer
	b := &build{host: host{uidBase: DefaultUIDBase, log: &log}, options: Options{UIDBase: DefaultUIDBase}, work: t.TempDir()}
	root, err := b.workDir("root")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the steps said:\n%s", log.String())
		}
	})
	return b, root
}

func (b *build) output(t *testing.T, s step) string {
	t.Helper()
	var out bytes.Buffer
	if err := b.host.run(t.Context(), s, nil, &out); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestStepIsRootOfItsOwnNamespaceOnly(t *testing.T) {
	b, root := testBuild(t)
	out := b.output(t, step{
		Mounts: []mount{{Source: root, Path: debianRoot}},
		Argv:   []string{"/bin/sh", "-c", "id -u; cat /proc/self/uid_map /proc/self/gid_map; echo $$; cd " + debianRoot + " && touch mine && ls -n mine"},
		Env:    tarEnvironment,
	})
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 5 {
		t.Fatalf("got %q", out)
	}
	if lines[0] != "0" {
		t.Errorf("the step's uid is %s, want 0", lines[0])
	}
	for _, line := range lines[1:3] {
		if got, want := strings.Join(strings.Fields(line), " "), fmt.Sprintf("0 %d %d", DefaultUIDBase, idCount); got != want {
			t.Errorf("id map is %q, want %q", got, want)
		}
	}
	if fields := strings.Fields(lines[4]); len(fields) < 4 || fields[2] != "0" || fields[3] != "0" {
		t.Errorf("inside, the file's owner isn't root: %s", lines[4])
	}
	info, err := os.Stat(filepath.Join(root, "mine"))
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid != DefaultUIDBase {
		t.Errorf("outside, the file's owner is %d, want %d", uid, DefaultUIDBase)
	}
}

func TestHostsFilesCannotBeChanged(t *testing.T) {
	b, _ := testBuild(t)
	// /var/tmp is everybody's to write on every host, unless it is read-only.
	probe := fmt.Sprintf("/var/tmp/clawvm-recipe-test-%d", os.Getpid())
	t.Cleanup(func() {
		if err := os.Remove(probe); err == nil {
			t.Errorf("the step made %s on the host", probe)
		}
	})
	out := b.output(t, step{
		Argv: []string{"/bin/sh", "-c", "echo x > " + probe + " && echo written; ls -A /run /tmp; mount -o remount,rw / && echo remounted; true"},
		Env:  tarEnvironment,
	})
	if strings.Contains(out, "written") || strings.Contains(out, "remounted") {
		t.Errorf("the step could write to the host: %q", out)
	}
	if strings.Contains(out, "sock") {
		t.Errorf("the step sees the host's sockets: %q", out)
	}
}

// imageWithBusybox copies the host's busybox or skips.
func imageWithBusybox(t *testing.T, root string) {
	t.Helper()
	for _, name := range []string{"/bin/busybox", "/usr/bin/busybox", "/usr/lib/initramfs-tools/bin/busybox"} {
		// A dynamic one would need its libraries.
		out, err := exec.Command("ldd", name).CombinedOutput()
		if _, statErr := os.Stat(name); statErr != nil || err == nil || !strings.Contains(string(out), "not a dynamic") {
			continue
		}
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(root, "bin"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "bin/busybox"), data, 0o755); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Skip("needs a static busybox on this machine (Debian's busybox-static)")
}

func TestCommandSeesTheImageAndNoNetwork(t *testing.T) {
	b, root := testBuild(t)
	imageWithBusybox(t, root)
	out := b.output(t, step{
		Image: true, Mounts: []mount{{Source: root}}, UID: 20001, GID: 20001, Confined: true, Dir: "/",
		Argv: []string{"/bin/busybox", "sh", "-c", `B=/bin/busybox
$B echo id $($B id -u) $($B id -g) $($B id -G)
$B echo root $($B ls /)
$B echo links $($B ls /proc/self/net/dev_snmp6 2>/dev/null; $B awk -F: 'NR>2 {print $1}' /proc/net/dev)
$B echo loopback $($B ip address show lo | $B grep -c 127.0.0.1)
$B grep NoNewPrivs /proc/self/status
$B grep CapEff /proc/self/status
$B echo first $($B cat /proc/1/comm)
$B echo x > /dev/null && $B echo null works
`},
		Env: []string{"A=b"},
	})
	for _, want := range []string{
		"id 20001 20001 20001\n", "root bin dev proc run tmp\n", "loopback 1\n",
		"NoNewPrivs:\t1\n", "CapEff:\t0000000000000000\n", "null works\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q isn't in\n%s", want, out)
		}
	}
	for line := range strings.Lines(out) {
		if links, ok := strings.CutPrefix(line, "links "); ok {
			for _, name := range strings.Fields(links) {
				// sit0 and its like are made by the kernel in every new namespace, down.
				if name != "lo" && !strings.HasSuffix(name, "0") {
					t.Errorf("the command sees the link %s", name)
				}
			}
		}
	}
}

func TestFailedCommandTellsWhatItSaid(t *testing.T) {
	b, root := testBuild(t)
	imageWithBusybox(t, root)
	err := b.host.run(t.Context(), step{Image: true, Mounts: []mount{{Source: root}}, Dir: "/",
		Argv: []string{"/bin/busybox", "sh", "-c", "echo this is why >&2; exit 7"}}, nil, nil)
	if err == nil || !strings.Contains(err.Error(), "this is why") || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("got %v, want the status and the output", err)
	}
}

func TestServiceIsStoppedOnceItAnswers(t *testing.T) {
	b, root := testBuild(t)
	imageWithBusybox(t, root)
	run := func(argv []string, u Until) error {
		return b.host.run(t.Context(), step{Image: true, Mounts: []mount{{Source: root}}, Dir: "/", Until: &u, Argv: argv}, nil, nil)
	}
	serve := []string{"/bin/busybox", "httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/tmp"}
	withFile := []string{"/bin/busybox", "sh", "-c", "/bin/busybox echo ok > /tmp/ready; exec /bin/busybox httpd -f -p 127.0.0.1:8080 -h /tmp"}
	if err := run(withFile, Until{Port: 8080, Path: "/ready", Timeout: time.Minute}); err != nil {
		t.Errorf("a service that answers: %v", err)
	}
	err := run(serve, Until{Port: 8080, Path: "/ready", Timeout: time.Second})
	if err == nil || !strings.Contains(err.Error(), "did not answer within 1s: 404") {
		t.Errorf("a service that says 404: %v", err)
	}
	err = run([]string{"/bin/busybox", "true"}, Until{Port: 8080, Path: "/ready", Timeout: time.Minute})
	if err == nil || !strings.Contains(err.Error(), "ended before it answered") {
		t.Errorf("a service that ends: %v", err)
	}
}

func TestUsersFilesAndRemovals(t *testing.T) {
	b, root := testBuild(t)
	layout := &layout{
		Users: []User{{Name: "app", UID: 20001, Home: "/home/app", Shell: "/bin/sh"}},
		Files: []ownedFile{
			{File{Path: "/etc/passwd", Content: "root:x:0:0:root:/root:/bin/sh\n"}, 0},
			{File{Path: "/srv/tool", Content: "x", Mode: "4755"}, 20001},
			{File{Path: "/etc/link", Link: "passwd"}, 0},
			{File{Path: "/srv/cache", Directory: true, Mode: "1777"}, 20001},
			{File{Path: "/var/log/a/b", Content: "x"}, 0},
			{File{Path: "/etc/resolv.conf", Content: "the host's"}, 0},
			{File{Path: "/etc/x-", Content: "x"}, 0},
		},
	}
	last := &finish{Remove: []string{"/etc/*-", "/not/there"}, RemoveContent: []string{"/var/log", "/not/there"},
		Stamp: &Stamp{Recipe: "x", Digest: "sha256:0"}}
	if err := b.host.run(t.Context(), step{Image: true, Mounts: []mount{{Source: root}}, Layout: layout, Finish: last}, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.host.run(t.Context(), step{Image: true, Mounts: []mount{{Source: root}}, Layout: &layout2}, nil, nil); err == nil ||
		!strings.Contains(err.Error(), "/etc/group has that name already") {
		t.Errorf("a user of a name that is taken: %v", err)
	}
	golden(t, "tree.txt", listTree(t, root))
	for name, want := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\napp:x:20001:20001::/home/app:/bin/sh\n",
		"etc/group":  "app:x:20001:\n",
	} {
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if string(data) != want {
			t.Errorf("%s is %q, want %q", name, data, want)
		}
	}
}

var layout2 = layout{Users: []User{{Name: "app", UID: 20002, Home: "/home/app", Shell: "/bin/sh"}}}

// listTree has one line for each entry: mode, owner inside, path.
func listTree(t *testing.T, root string) string {
	t.Helper()
	var list strings.Builder
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		status := info.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&list, "%s %d %d .%s\n", info.Mode(), status.Uid-DefaultUIDBase, status.Gid-DefaultUIDBase, strings.TrimPrefix(path, root))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list.String()
}

// A link in the image to a place of the host leads to a place of the image.
func TestLinksOfAnImageStayInIt(t *testing.T) {
	b, root := testBuild(t)
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(root, "etc")); err != nil {
		t.Fatal(err)
	}
	err := b.host.run(t.Context(), step{Image: true, Mounts: []mount{{Source: root}},
		Layout: &layout{Files: []ownedFile{{File{Path: "/etc/x", Content: "x"}, 0}}}}, nil, nil)
	if err == nil {
		t.Error("a file was written through a link that leads nowhere")
	}
	left, err := os.ReadDir(outside)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("the step wrote %s outside the image", left[0].Name())
	}
}

func TestStepEndsWithItsContext(t *testing.T) {
	b, root := testBuild(t)
	imageWithBusybox(t, root)
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- b.host.run(ctx, step{Image: true, Mounts: []mount{{Source: root}}, Dir: "/",
			Argv: []string{"/bin/busybox", "sh", "-c", "echo started; exec /bin/busybox sleep 1000"}}, nil, signalWriter(started))
	}()
	<-started
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the step didn't end")
	}
}

// signalWriter closes itself at the first write.
type signalWriter chan struct{}

func (w signalWriter) Write(p []byte) (int, error) {
	select {
	case <-w:
	default:
		close(w)
	}
	return len(p), nil
}

func TestSweepRemovesDeadBuildsOnly(t *testing.T) {
	tmp := t.TempDir()
	for _, name := range []string{workPrefix + "dead-1", workPrefix + "alive-1", "other"} {
		if err := os.MkdirAll(filepath.Join(tmp, name, "root"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	held, err := lockDir(filepath.Join(tmp, workPrefix+"alive-1"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := sweep(tmp); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(tmp, "*"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{filepath.Join(tmp, workPrefix+"alive-1"), filepath.Join(tmp, "other")}
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}

func TestLockIsWaitedFor(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	waits := 0
	waiting := func() { waits++ }
	first, err := waitForLock(t.Context(), name, waiting)
	if err != nil {
		t.Fatal(err)
	}
	if waits != 0 {
		t.Error("the first one was told to wait")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*lockInterval)
	defer cancel()
	if _, err := waitForLock(ctx, name, waiting); !errors.Is(err, context.DeadlineExceeded) || waits != 1 {
		t.Errorf("a second lock: %v, told %d times; want to wait for the first, told once", err, waits)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := waitForLock(t.Context(), name, waiting)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestTailOfAnOutput(t *testing.T) {
	w := &tailWriter{}
	for i := range 1000 {
		if _, err := fmt.Fprintln(w, "line", i); err != nil {
			t.Fatal(err)
		}
	}
	got := strings.Split(w.quote(), "\n\t")
	if len(got) != tailLines+1 || got[len(got)-1] != "line 999" || got[1] != "line 985" {
		t.Errorf("got %q", got)
	}
}

// buildForTest builds a bundled recipe; downloads are kept between runs where
// CLAWVM_TEST_CACHE names a directory.
func buildForTest(t *testing.T, name string) (*storage.Store, *storage.Image, Options) {
	t.Helper()
	needRoot(t)
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Skip("needs mmdebstrap")
	}
	r, err := Builtin(name)
	if err != nil {
		t.Fatal(err)
	}
	s := &storage.Store{Dir: filepath.Join(t.TempDir(), "store")}
	var log bytes.Buffer
	o := Options{CacheDir: os.Getenv("CLAWVM_TEST_CACHE"), Log: &log}
	if o.CacheDir == "" {
		o.CacheDir = filepath.Join(t.TempDir(), "cache")
	}
	var steps []string
	o.Progress = func(p Progress) {
		if p.Done == 0 && p.Note == "" {
			steps = append(steps, fmt.Sprintf("%d/%d %s", p.Index, p.Steps, p.Step))
		}
	}
	image, err := Build(t.Context(), s, r, o)
	if err != nil {
		t.Fatalf("%v\nthe tools said:\n%s", err, log.String())
	}
	t.Logf("%d files, %d bytes; steps: %s", image.Files, image.Size, strings.Join(steps, ", "))
	left, err := os.ReadDir(filepath.Join(s.Dir, "tmp"))
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("the build left %s", left[0].Name())
	}
	return s, image, o
}

func TestBuildTiny(t *testing.T) {
	s, image, o := buildForTest(t, "tiny")
	r, err := Builtin("tiny")
	if err != nil {
		t.Fatal(err)
	}
	uid, gid, home, err := image.LookupUser("app")
	if err != nil || uid != 20001 || gid != 20001 || home != "/home/app" {
		t.Errorf("app is %d:%d in %q, %v", uid, gid, home, err)
	}
	for name, want := range map[string]uint32{"home/app": 20001, "usr/bin/busybox": 0, "etc/passwd": 0} {
		info, err := os.Lstat(filepath.Join(image.Root, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if got := info.Sys().(*syscall.Stat_t).Uid; got != want {
			t.Errorf("%s belongs to %d, want %d", name, got, want)
		}
	}
	for _, name := range []string{"etc/resolv.conf", "etc/hostname", "var/lib/dpkg", "etc/apt"} {
		if _, err := os.Lstat(filepath.Join(image.Root, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is in the image (%v)", name, err)
		}
	}
	digest, err := r.Digest()
	if err != nil {
		t.Fatal(err)
	}
	stamp, err := ReadStamp(image)
	if err != nil || stamp == nil || stamp.Recipe != "tiny" || stamp.Digest != digest {
		t.Errorf("the stamp is %+v, %v", stamp, err)
	}

	// What is there isn't built again; what has another recipe is.
	o.Progress = func(p Progress) { t.Errorf("the second build does %s", p.Step) }
	again, err := Build(t.Context(), s, r, o)
	if err != nil || again.Digest != image.Digest {
		t.Errorf("the second build made %v, %v", again, err)
	}
	built := false
	o.Progress = func(Progress) { built = true }
	r.Files = append(r.Files, File{Path: "/etc/motd", Content: "hello\n"})
	other, err := Build(t.Context(), s, r, o)
	if err != nil {
		t.Fatal(err)
	}
	if !built || other.Digest == image.Digest {
		t.Error("another recipe of the same name wasn't built")
	}
}

func TestBuildThatFailsOrIsStoppedLeavesNothing(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Skip("needs mmdebstrap")
	}
	r, err := Builtin("tiny")
	if err != nil {
		t.Fatal(err)
	}
	s := &storage.Store{Dir: filepath.Join(t.TempDir(), "store")}
	o := Options{CacheDir: filepath.Join(t.TempDir(), "cache")}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o.Progress = func(Progress) { cancel() } // as the first step begins
	if _, err := Build(ctx, s, r, o); !errors.Is(err, context.Canceled) {
		t.Errorf("a stopped build: %v, want context.Canceled", err)
	}
	o.Progress = nil
	r.Debian.Packages = []string{"no-such-package-anywhere"}
	_, err = Build(t.Context(), s, r, o)
	if err == nil || !strings.Contains(err.Error(), "no-such-package-anywhere") || !strings.Contains(err.Error(), "Debian trixie") {
		t.Errorf("a package that doesn't exist: %v, want the step and the package", err)
	}
	left, err := os.ReadDir(filepath.Join(s.Dir, "tmp"))
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("the builds left %s", left[0].Name())
	}
	if images, err := s.List(); err != nil || len(images) > 0 {
		t.Errorf("the store has %d images, %v", len(images), err)
	}
}

func TestBuildOpenclaw(t *testing.T) {
	if os.Getenv("CLAWVM_TEST_OPENCLAW") != "1" {
		t.Skip("downloads 400 MB and takes minutes: set CLAWVM_TEST_OPENCLAW=1")
	}
	_, image, _ := buildForTest(t, "openclaw")
	stamp, err := ReadStamp(image)
	if err != nil || stamp == nil {
		t.Fatalf("no stamp: %v", err)
	}
	cache := filepath.Join(image.Root, stamp.Environment["NODE_COMPILE_CACHE"])
	warm := 0
	err = filepath.WalkDir(cache, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			warm++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if warm < 1000 {
		t.Errorf("the compile cache has %d files, want thousands", warm)
	}
	state, err := os.ReadDir(filepath.Join(image.Root, "var/lib/openclaw"))
	if err != nil {
		t.Fatal(err)
	}
	if len(state) > 0 {
		t.Errorf("the warm-up left %s in the gateway's home", state[0].Name())
	}
	if uid, _, _, err := image.LookupUser("openclaw"); err != nil || uid != 20001 {
		t.Errorf("openclaw is %d, %v", uid, err)
	}
}
