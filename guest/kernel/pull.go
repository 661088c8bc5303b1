package kernel

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/internal/durable"
)

// DefaultPackage is the package whose newest dependency Pull brings where no other is asked for: Debian's kernel for
// virtual machines, which has the drivers of one and little else.
var DefaultPackage = "linux-image-cloud-" + runtime.GOARCH

// maxUnpacked bounds what a kernel package may hold: Debian's full one is around 500 MB.
const maxUnpacked = 4 << 30

// packageName is what apt takes for one (Debian Policy 5.6.1), which also can't be mistaken for an option.
var packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)

// Pull downloads a kernel package of the distribution by apt, which verifies it, and puts kernel and modules into the
// store; nothing is installed and none of the package's scripts run. pkg is an image package, or one that depends on
// the newest, as DefaultPackage, which "" means. apt and dpkg run as an unprivileged user where there is one. Each
// step is a line to progress. A kernel that the store has already is returned as it is.
func Pull(ctx context.Context, storeDir, pkg string, progress io.Writer) (*Kernel, error) {
	pkg = cmp.Or(pkg, DefaultPackage)
	k, err := pull(ctx, storeDir, pkg, progress)
	if err != nil {
		return nil, fmt.Errorf("cannot pull kernel %s: %w", pkg, err)
	}
	return k, nil
}

func pull(ctx context.Context, storeDir, pkg string, progress io.Writer) (k *Kernel, err error) {
	if !packageName.MatchString(pkg) {
		return nil, fmt.Errorf("%q is no package's name", pkg)
	}
	for _, tool := range []string{"apt-get", "apt-cache", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("this host has no %s: declare a kernel with `kernel: PATH`, the host's own for one", tool)
		}
	}
	dir := filepath.Join(storeDir, kernelsDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lockCache(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer unlock()

	// Outside the store, which the unprivileged user can't see into.
	work, err := os.MkdirTemp("", "clawvm-kernel-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	apt, err := newApt(work)
	if err != nil {
		return nil, err
	}
	p, err := apt.newest(ctx, pkg)
	if err == nil {
		if k := stored(dir, p.release()); isDir(filepath.Join(dir, p.release())) {
			return &k, say(progress, "%s is in the store already", k.Release)
		}
		err = apt.download(ctx, p, progress)
	}
	if err != nil && ctx.Err() == nil {
		// The host's lists don't know the package, or know one that is superseded and gone: ask anew, without changing them.
		if err := say(progress, "the host's package lists don't serve (%s); reading new ones", firstLine(err)); err != nil {
			return nil, err
		}
		if err := apt.ownLists(ctx); err != nil {
			return nil, err
		}
		if p, err = apt.newest(ctx, pkg); err != nil {
			return nil, err
		}
		err = apt.download(ctx, p, progress)
	}
	if err != nil {
		return nil, err
	}
	if err := apt.unpack(ctx, p, dir); err != nil {
		return nil, err
	}
	got := stored(dir, p.release())
	return &got, say(progress, "kernel %s is in the store", got.Release)
}

func say(w io.Writer, format string, args ...any) error {
	if w == nil {
		return nil
	}
	_, err := fmt.Fprintf(w, format+"\n", args...)
	return err
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// apt runs apt's and dpkg's programs in a directory of their own.
type apt struct {
	dir     string
	user    string // "" when they run as the caller
	cred    *syscall.Credential
	options []string
}

// unprivileged are users that may run apt for root: apt's own comes first, for it can be let out by a firewall.
var unprivileged = []string{"_apt", "nobody"}

func newApt(dir string) (*apt, error) {
	a := &apt{dir: dir}
	if os.Getuid() != 0 {
		return a, nil
	}
	for _, name := range unprivileged {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("user %s: %w", name, err)
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("user %s: %w", name, err)
		}
		a.user = name
		a.cred = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		return a, os.Chown(dir, int(uid), int(gid))
	}
	return a, nil
}

// command makes a command that talks English and asks nothing.
func (a *apt) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if strings.HasPrefix(name, "apt-") {
		args = append(append([]string{}, a.options...), args...)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "HOME="+a.dir, "TMPDIR="+a.dir, "DEBIAN_FRONTEND=noninteractive")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: a.cred}
	return cmd
}

// run runs a command and returns what it printed; the error has what it complained of.
func (a *apt) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := a.command(ctx, name, args...)
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(complaints.String()))
	}
	return out.Bytes(), nil
}

// ownLists reads the package lists anew, into apt's directory of this pull.
func (a *apt) ownLists(ctx context.Context) error {
	lists, cache := filepath.Join(a.dir, "lists"), filepath.Join(a.dir, "cache")
	for _, d := range []string{lists, filepath.Join(lists, "partial"), cache, filepath.Join(cache, "archives"), filepath.Join(cache, "archives/partial")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
		if a.cred != nil {
			if err := os.Chown(d, int(a.cred.Uid), int(a.cred.Gid)); err != nil {
				return err
			}
		}
	}
	a.options = []string{"-o", "Dir::State::Lists=" + lists, "-o", "Dir::Cache=" + cache}
	_, err := a.run(ctx, "apt-get", "-q", "update")
	return err
}

// aptPackage is what the lists say of a package.
type aptPackage struct {
	Name, Version string
	Size          int64
	Depends       string
}

const imagePrefix = "linux-image-"

// release is the kernel release that an image package's name holds.
func (p aptPackage) release() string { return strings.TrimPrefix(p.Name, imagePrefix) }

// imageDependency finds the image package that a metapackage depends on.
var imageDependency = regexp.MustCompile(`(?:^|[ ,|])(linux-image-[0-9][a-z0-9+.-]*)`)

// newest finds the image package that pkg is, or that it depends on.
func (a *apt) newest(ctx context.Context, pkg string) (aptPackage, error) {
	p, err := a.show(ctx, pkg)
	if err != nil {
		return p, err
	}
	image, err := p.image()
	if err != nil || image == p.Name {
		return p, err
	}
	if p, err = a.show(ctx, image); err != nil {
		return p, err
	}
	if !imageName.MatchString(p.Name) {
		return p, fmt.Errorf("apt-cache shows %s for %s", p.Name, image)
	}
	return p, nil
}

// imageName is an image package's name; what follows the prefix is the kernel's release, which names its directory in the
// store.
var imageName = regexp.MustCompile(`^` + imagePrefix + `[0-9][a-z0-9+.-]*$`)

// image is the name of the image package that p depends on, or that p is.
func (p aptPackage) image() (string, error) {
	if m := imageDependency.FindStringSubmatch(p.Depends); m != nil {
		return m[1], nil
	}
	if !imageName.MatchString(p.Name) {
		return "", fmt.Errorf("package %s is no kernel and depends on none", p.Name)
	}
	return p.Name, nil
}

func (a *apt) show(ctx context.Context, pkg string) (aptPackage, error) {
	out, err := a.run(ctx, "apt-cache", "show", "--no-all-versions", pkg)
	if err != nil {
		return aptPackage{}, err
	}
	return parsePackage(out)
}

// parsePackage reads the first record of what `apt-cache show` prints.
func parsePackage(out []byte) (aptPackage, error) {
	var p aptPackage
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\n")
		if line == "" {
			break
		}
		key, value, _ := strings.Cut(line, ": ")
		switch key {
		case "Package":
			p.Name = value
		case "Version":
			p.Version = value
		case "Depends":
			p.Depends = value
		case "Size":
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return p, fmt.Errorf("apt-cache: size %q: %w", value, err)
			}
			p.Size = n
		}
	}
	if !packageName.MatchString(p.Name) {
		return p, fmt.Errorf("apt-cache: it shows no package")
	}
	return p, nil
}

// download fetches the package's file into apt's directory.
func (a *apt) download(ctx context.Context, p aptPackage, progress io.Writer) error {
	as := ""
	if a.user != "" {
		as = ", as user " + a.user
	}
	if err := say(progress, "downloading %s %s (%.1f MB) by apt-get%s", p.Name, p.Version, float64(p.Size)/1e6, as); err != nil {
		return err
	}
	_, err := a.run(ctx, "apt-get", "-q", "download", p.Name+"="+p.Version)
	return err
}

// unpack takes image and modules out of the downloaded package and puts them into dir, all or nothing.
func (a *apt) unpack(ctx context.Context, p aptPackage, dir string) (err error) {
	debs, err := filepath.Glob(filepath.Join(a.dir, p.Name+"_*.deb"))
	if err != nil {
		return err
	}
	if len(debs) != 1 {
		return fmt.Errorf("apt-get left %d files of %s", len(debs), p.Name)
	}
	temp, err := os.MkdirTemp(dir, newPrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(temp))
		}
	}()
	if err := os.Chmod(temp, 0o755); err != nil {
		return err
	}
	// As a stream, so that nothing but what is wanted is ever written, and dpkg needs to write nowhere.
	cmd := a.command(ctx, "dpkg-deb", "--fsys-tarfile", debs[0])
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	stream, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	unpackErr := unpackKernel(stream, temp, p.release())
	if unpackErr != nil {
		// It may still be writing to the pipe that nobody reads any more.
		unpackErr = errors.Join(unpackErr, stream.Close())
	}
	if err := cmd.Wait(); err != nil && unpackErr == nil {
		return fmt.Errorf("dpkg-deb: %w: %s", err, strings.TrimSpace(complaints.String()))
	}
	if unpackErr != nil {
		return unpackErr
	}
	// One call for the file system instead of one for each of 4,000 modules.
	if err := syncFS(temp); err != nil {
		return fmt.Errorf("cannot write it to the disk: %w", err)
	}
	return durable.Rename(temp, filepath.Join(dir, p.release()))
}

// unpackKernel writes of a package's files the image and the modules, as the store lays them out: vmlinuz and
// lib/modules/RELEASE.
func unpackKernel(stream io.Reader, dir, release string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	modules := "lib/modules/" + release + "/"
	image := false
	var total int64
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("damaged package: %w", err)
		}
		name := strings.TrimPrefix(filepath.Clean("/"+h.Name), "/")
		name = strings.TrimPrefix(name, "usr/") // where newer packages have lib
		switch {
		case name == "boot/vmlinuz-"+release:
			name, image = "vmlinuz", true
		case !strings.HasPrefix(name, modules) || h.Typeflag != tar.TypeReg:
			continue
		}
		if total += h.Size; total > maxUnpacked {
			return fmt.Errorf("the package holds more than %d GiB", maxUnpacked>>30)
		}
		if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := writeFrom(root, name, r); err != nil {
			return err
		}
	}
	if !image {
		return fmt.Errorf("the package has no boot/vmlinuz-%s", release)
	}
	if _, err := root.Stat(modules + "kernel"); err != nil {
		return fmt.Errorf("the package has no modules in %s", modules)
	}
	return nil
}

// syncFS writes the file system of a directory to its disk.
func syncFS(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}

func writeFrom(root *os.Root, name string, r io.Reader) error {
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
