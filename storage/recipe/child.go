package recipe

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// RunChild makes this process a build step if Build started it as one, and
// doesn't return then; else it returns at once. It must be the first thing
// that main (and TestMain of a test that builds images) calls.
func RunChild() {
	if len(os.Args) == 0 || os.Args[0] != childName {
		return
	}
	code, err := runStep()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		if code == 0 {
			code = 1
		}
	}
	os.Exit(code)
}

// runStep is PID 1 of the step's namespaces: whenever it ends, the kernel ends
// whatever the step started.
func runStep() (int, error) {
	pipe := os.NewFile(stepFD, "step")
	unix.CloseOnExec(stepFD)
	lines := bufio.NewReader(pipe)
	data, err := lines.ReadBytes('\n')
	if err != nil {
		return 1, fmt.Errorf("cannot read the step: %w", err)
	}
	var s step
	if err := json.Unmarshal(data, &s); err != nil {
		return 1, fmt.Errorf("cannot read the step: %w", err)
	}
	for i := range s.Mounts {
		unix.CloseOnExec(mountsFD + i)
	}
	go endWith(lines)
	if err := unix.Sethostname([]byte("image-build")); err != nil {
		return 1, fmt.Errorf("cannot set the host name: %w", err)
	}
	if !s.Network {
		if err := loopbackUp(); err != nil {
			return 1, err
		}
	}
	unix.Umask(0o022)
	if s.Image {
		err = enterImage(s.Mounts)
	} else {
		err = hideHost(s.Mounts)
	}
	if err != nil {
		return 1, err
	}
	if s.Layout != nil {
		if err := s.Layout.apply(); err != nil {
			return 1, err
		}
	}
	if len(s.Argv) > 0 {
		if code, err := runCommand(&s); code != 0 || err != nil {
			return code, err
		}
	}
	if s.Finish != nil {
		if err := s.Finish.apply(); err != nil {
			return 1, err
		}
	}
	return 0, nil
}

// endWith ends this process when the builder has ended, however it did: then
// the kernel closes its end of the pipe.
func endWith(pipe io.Reader) {
	if _, err := io.Copy(io.Discard, pipe); err != nil {
		fmt.Fprintln(os.Stderr, "cannot watch the builder:", err)
	}
	os.Exit(1)
}

func runCommand(s *step) (int, error) {
	for _, pair := range s.Env {
		// exec looks its program up in this process's PATH.
		if path, ok := strings.CutPrefix(pair, "PATH="); ok {
			if err := os.Setenv("PATH", path); err != nil {
				return 1, fmt.Errorf("cannot set PATH: %w", err)
			}
		}
	}
	if s.Confined {
		// It holds for a thread, and a child inherits from the thread that
		// starts it: this one, which Go may not change in between.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return 1, fmt.Errorf("cannot forbid new privileges: %w", err)
		}
	}
	cmd := exec.Command(s.Argv[0], s.Argv[1:]...)
	cmd.Env, cmd.Dir = s.Env, s.Dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(s.UID), Gid: uint32(s.GID)}}
	if err := cmd.Start(); err != nil {
		return 1, fmt.Errorf("cannot start %s: %w", s.Argv[0], err)
	}
	var err error
	if s.Until != nil {
		err = s.Until.wait(cmd)
	} else {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), fmt.Errorf("%s: %w", s.Argv[0], err)
	}
	if err != nil {
		return 1, fmt.Errorf("%s: %w", s.Argv[0], err)
	}
	return 0, nil
}

// loopbackUp is all the network that a step without network has.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot bring the loopback interface up: %w", err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("cannot bring the loopback interface up: %w", err)
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("cannot bring the loopback interface up: %w", err)
	}
	return nil
}

// workMount is where steps that see the host's files find the build's own.
const workMount = "/tmp"

// hideHost makes the host's files read-only and lays an empty /tmp and /run
// over the host's: there is nothing that a package's script could change, and
// no socket that it could talk to.
func hideHost(mounts []mount) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make the mounts private: %w", err)
	}
	// /etc/resolv.conf is often a link into /run.
	resolver, err := os.ReadFile(resolvConf)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot read the resolver's configuration: %w", err)
	}
	readOnly := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, readOnly); err != nil {
		return fmt.Errorf("cannot make the host's files read-only: %w", err)
	}
	for _, dir := range []string{"/run", "/tmp"} {
		if err := mountTmpfs(dir, 0o755); err != nil {
			return err
		}
	}
	if err := mountProc("/proc"); err != nil {
		return err
	}
	for i, m := range mounts {
		if err := attach(mountsFD+i, m, m.Path); err != nil {
			return err
		}
	}
	return restoreResolver(resolver)
}

const resolvConf = "/etc/resolv.conf"

// restoreResolver puts the resolver's configuration back where the link
// /etc/resolv.conf points to, if that was below /run.
func restoreResolver(content []byte) error {
	target, err := os.Readlink(resolvConf)
	if err != nil {
		return nil // a plain file, or none: nothing was hidden
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join("/etc", target)
	}
	if _, below := strings.CutPrefix(filepath.Clean(target), "/run/"); !below {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return fmt.Errorf("cannot restore %s: %w", resolvConf, err)
	}
	if err := os.WriteFile(target, content, 0o644); err != nil {
		return fmt.Errorf("cannot restore %s: %w", resolvConf, err)
	}
	return nil
}

// enterImage makes the first mount the root and lets go of the host's files.
func enterImage(mounts []mount) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make the mounts private: %w", err)
	}
	if err := mountTmpfs("/tmp", 0o755); err != nil {
		return err
	}
	const root = "/tmp/root"
	if err := os.Mkdir(root, 0o755); err != nil {
		return fmt.Errorf("cannot make the mount point: %w", err)
	}
	for i, m := range mounts {
		if err := attach(mountsFD+i, m, root+m.Path); err != nil {
			return err
		}
	}
	if err := mountSystem(root); err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return fmt.Errorf("cannot enter the image: %w", err)
	}
	// With both names the same the old root lies over the new one and can
	// be let go: pivot_root(2).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot enter the image: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot let go of the host's files: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return fmt.Errorf("cannot enter the image: %w", err)
	}
	return nil
}

func attach(fd int, m mount, path string) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("cannot make the mount point %s: %w", path, err)
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("cannot mount %s: %w", path, err)
	}
	if !m.ReadOnly {
		return nil
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, path, 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("cannot make %s read-only: %w", path, err)
	}
	return nil
}

// mountSystem gives an image what every program expects. Device nodes can't be
// made in a user namespace, so the host's harmless ones are bound.
func mountSystem(root string) error {
	for _, dir := range []string{"/proc", "/dev", "/run", "/tmp"} {
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			return fmt.Errorf("cannot make %s: %w", dir, err)
		}
	}
	if err := mountProc(root + "/proc"); err != nil {
		return err
	}
	if err := mountTmpfs(root+"/tmp", 0o1777); err != nil {
		return err
	}
	if err := mountTmpfs(root+"/run", 0o755); err != nil {
		return err
	}
	if err := mountTmpfs(root+"/dev", 0o755); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		path := root + "/dev/" + name
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			return fmt.Errorf("cannot make %s: %w", path, err)
		}
		if err := unix.Mount("/dev/"+name, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cannot bind /dev/%s: %w", name, err)
		}
	}
	if err := os.Mkdir(root+"/dev/shm", 0o1777); err != nil {
		return fmt.Errorf("cannot make /dev/shm: %w", err)
	}
	if err := os.Chmod(root+"/dev/shm", os.ModeSticky|0o777); err != nil {
		return fmt.Errorf("cannot make /dev/shm: %w", err)
	}
	links := [][2]string{{"/proc/self/fd", "fd"}, {"fd/0", "stdin"}, {"fd/1", "stdout"}, {"fd/2", "stderr"}}
	for _, l := range links {
		if err := os.Symlink(l[0], root+"/dev/"+l[1]); err != nil {
			return fmt.Errorf("cannot make /dev/%s: %w", l[1], err)
		}
	}
	return nil
}

func mountTmpfs(path string, mode uint32) error {
	data := fmt.Sprintf("mode=%o", mode)
	if err := unix.Mount("tmpfs", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
		return fmt.Errorf("cannot mount a tmpfs on %s: %w", path, err)
	}
	return nil
}

func mountProc(path string) error {
	if err := unix.Mount("proc", path, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("cannot mount proc (in a container that hides parts of /proc it can't be): %w", err)
	}
	return nil
}
