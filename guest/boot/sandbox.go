package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// sandbox holds the namespaces that the workload, and what is executed as it, live in: one view of the file system and of System
// V's shared memory, made once and entered by each of them.
type sandbox struct {
	mounts *os.File // the mount namespace
	ipc    *os.File // the IPC namespace
}

// sealed are the directories that the workload sees read-only, with all that is mounted below them. What is a symbolic link (a
// merged /usr) or missing is skipped.
var sealed = []string{"/usr", "/boot", "/etc", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/sys"}

// sealedProc are the parts of /proc that root can write without any capability.
var sealedProc = []string{"sys", "irq", "bus", "fs", "sysrq-trigger", "acpi", "mtrr"}

// hiddenProc are the parts of /proc that tell about the kernel's memory.
var hiddenProc = []string{"kcore", "keys", "kallsyms", "timer_list", "kmsg"}

// devices are all that the workload has in /dev, with the kernel's numbers for them.
var devices = []struct {
	name         string
	major, minor uint32
}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}

// devLinks are the usual names for a process' own files.
var devLinks = map[string]string{
	"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
}

// newSandbox makes the namespaces. The thread that makes them ends with its goroutine, so nothing else of the process is in them.
func newSandbox() (*sandbox, error) {
	type result struct {
		s   *sandbox
		err error
	}
	c := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread must not be used again
		s, err := buildSandbox()
		c <- result{s, err}
	}()
	r := <-c
	if r.err != nil {
		return nil, fmt.Errorf("cannot make the workload's sandbox: %w", r.err)
	}
	return r.s, nil
}

func buildSandbox() (s *sandbox, err error) {
	// CLONE_FS: the thread must not share its root and working directory, else it can't have a mount namespace of its own.
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWIPC); err != nil {
		return nil, fmt.Errorf("no namespaces: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("cannot make the mounts private: %w", err)
	}
	for _, step := range []func() error{sealDirectories, ownTemporary, ownProc, ownDevices} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	s = &sandbox{}
	if s.mounts, err = os.Open("/proc/thread-self/ns/mnt"); err != nil {
		return nil, err
	}
	if s.ipc, err = os.Open("/proc/thread-self/ns/ipc"); err != nil {
		return nil, errors.Join(err, s.mounts.Close())
	}
	return s, nil
}

func (s *sandbox) close() error { return errors.Join(s.mounts.Close(), s.ipc.Close()) }

func sealDirectories() error {
	for _, dir := range sealed {
		info, err := os.Lstat(dir)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
			continue
		}
		if err == nil {
			err = seal(dir)
		}
		if err != nil {
			return fmt.Errorf("cannot make %s read-only: %w", dir, err)
		}
	}
	return nil
}

// seal makes a directory or file, and all mounts below it, read-only. Without CAP_SYS_ADMIN nothing undoes it.
func seal(path string) error {
	if err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	return unix.MountSetattr(unix.AT_FDCWD, path, unix.AT_RECURSIVE, &attr)
}

func ownTemporary() error {
	if err := os.MkdirAll("/tmp", 0o1777); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
		return fmt.Errorf("cannot mount /tmp: %w", err)
	}
	return nil
}

// ownProc mounts a /proc in which a user sees its own processes only.
func ownProc() error {
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "hidepid=invisible"); err != nil {
		return fmt.Errorf("cannot mount /proc: %w", err)
	}
	for _, name := range sealedProc {
		if err := seal("/proc/" + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot make /proc/%s read-only: %w", name, err)
		}
	}
	for _, name := range hiddenProc {
		if err := unix.Mount("/dev/null", "/proc/"+name, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot hide /proc/%s: %w", name, err)
		}
	}
	return nil
}

// ownDevices mounts a /dev with the harmless devices, the terminals and the shared memory, and nothing of the machine's.
func ownDevices() (err error) {
	dev, err := os.MkdirTemp("/tmp", "dev-") // the new /tmp; it is moved from there
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dev, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755,size=64k"); err != nil {
		return fmt.Errorf("cannot mount the workload's /dev: %w", err)
	}
	for _, d := range devices {
		p := filepath.Join(dev, d.name)
		if err := unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("cannot make %s: %w", p, err)
		}
		if err := os.Chmod(p, 0o666); err != nil { // past the umask
			return err
		}
	}
	for name, target := range devLinks {
		if err := os.Symlink(target, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	for _, name := range []string{"pts", "shm"} {
		p := filepath.Join(dev, name)
		if err := os.Mkdir(p, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("/dev/"+name, p, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cannot pass on /dev/%s: %w", name, err)
		}
	}
	if err := unix.Mount("", dev, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("cannot make the workload's /dev read-only: %w", err)
	}
	if err := unix.Mount(dev, "/dev", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot mount the workload's /dev: %w", err)
	}
	return os.Remove(dev)
}
