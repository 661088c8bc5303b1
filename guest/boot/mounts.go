package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/clawvm/clawvm/guest"
	"golang.org/x/sys/unix"
)

// kernelMount is a file system of the kernel's, which needs no device.
type kernelMount struct {
	kind, target string
	flags        uintptr
	options      string
}

const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// kernelMounts are mounted first, in this order, and move into the new root with their parents.
var kernelMounts = []kernelMount{
	{"proc", "/proc", quiet, ""},
	{"sysfs", "/sys", quiet, ""},
	{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
	{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"cgroup2", cgroupRoot, quiet, ""},
}

// movedMounts are what moves into the new root.
var movedMounts = []string{"/proc", "/sys", "/dev", "/run"}

func mountKernel() error {
	for _, m := range kernelMounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.options)
		if errors.Is(err, unix.EBUSY) { // the kernel mounted /dev itself
			err = nil
		}
		if err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.target, err)
		}
	}
	for name, target := range devLinks {
		if err := os.Symlink(target, filepath.Join("/dev", name)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// Where the parts of the root are mounted in the initramfs.
const (
	lowerDir = "/clawvm/lower"
	upperDir = "/clawvm/upper"
	rootDir  = "/clawvm/root"
)

// mountRoot mounts the overlay at rootDir.
func mountRoot(r guest.Root) error {
	for _, dir := range []string{lowerDir, upperDir, rootDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := mountLower(r.Lower); err != nil {
		return fmt.Errorf("cannot mount the image: %w", err)
	}
	var err error
	if r.Upper.Disk == "" {
		err = unix.Mount("tmpfs", upperDir, "tmpfs", 0, fmt.Sprintf("mode=0755,size=%d", r.Upper.Tmpfs))
	} else {
		err = mountDisk(r.Upper.Disk, upperDir, "ext4", 0)
	}
	if err != nil {
		return fmt.Errorf("cannot mount the overlay's writable layer: %w", err)
	}
	upper, work := filepath.Join(upperDir, "upper"), filepath.Join(upperDir, "work")
	for _, dir := range []string{upper, work} {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cannot prepare the overlay's writable layer: %w", err)
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lowerDir, upper, work)
	if err := unix.Mount("overlay", rootDir, "overlay", 0, options); err != nil {
		return fmt.Errorf("cannot mount the overlay: %w", err)
	}
	return nil
}

func mountLower(l guest.Lower) error {
	if l.Share != "" {
		return unix.Mount(l.Share, lowerDir, "virtiofs", unix.MS_RDONLY, "")
	}
	return mountDisk(l.Disk, lowerDir, l.Type, unix.MS_RDONLY)
}

// switchRoot makes the overlay the root of this process and of all that it starts. The initramfs stays mounted below it, with this
// program in it; what it held besides is removed, because it is memory.
func switchRoot() error {
	for _, m := range movedMounts {
		to := rootDir + m
		if err := os.MkdirAll(to, 0o755); err != nil {
			return fmt.Errorf("cannot prepare the new root: %w", err)
		}
		if err := unix.Mount(m, to, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("cannot move %s into the new root: %w", m, err)
		}
	}
	if err := os.Chdir(rootDir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot switch to the new root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("cannot switch to the new root: %w", err)
	}
	return os.Chdir("/")
}

// mountAll mounts what the document declares, within the new root.
func mountAll(mounts []guest.Mount) error {
	for _, m := range mounts {
		if err := mountOne(m); err != nil {
			return fmt.Errorf("cannot mount the %s %s at %s: %w", m.Kind, m.Source, m.Target, err)
		}
	}
	return nil
}

func mountOne(m guest.Mount) error {
	if err := os.MkdirAll(m.Target, 0o755); err != nil {
		return err
	}
	flags := mountFlags(m)
	if m.Kind != guest.MountVolume {
		return unix.Mount(m.Source, m.Target, "virtiofs", flags, "")
	}
	if err := mountDisk(m.Source, m.Target, "ext4", flags); err != nil {
		return err
	}
	return ownFresh(m)
}

func mountFlags(m guest.Mount) (flags uintptr) {
	if m.Kind == guest.MountSecrets {
		return unix.MS_RDONLY | quiet
	}
	for _, f := range []struct {
		set  bool
		flag uintptr
	}{{m.ReadOnly, unix.MS_RDONLY}, {m.NoSUID, unix.MS_NOSUID}, {m.NoDev, unix.MS_NODEV}, {m.NoExec, unix.MS_NOEXEC}} {
		if f.set {
			flags |= f.flag
		}
	}
	return flags
}

// ownFresh gives a volume to its declared owner when nobody has used it: it is root's and has nothing in it.
func ownFresh(m guest.Mount) error {
	if m.ReadOnly || m.Owner == nil && m.Mode == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(m.Target, &st); err != nil {
		return err
	}
	entries, err := os.ReadDir(m.Target)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != "lost+found" {
			return nil
		}
	}
	if st.Uid != 0 || st.Gid != 0 {
		return nil
	}
	if m.Owner != nil {
		if err := unix.Chown(m.Target, m.Owner.UID, m.Owner.GID); err != nil {
			return err
		}
	}
	if m.Mode != 0 {
		return unix.Chmod(m.Target, m.Mode)
	}
	return nil
}

// diskTime is how long a disk may take to appear after its driver was loaded.
const diskTime = 5 * time.Second

// mountDisk mounts the disk with the serial.
func mountDisk(serial, target, kind string, flags uintptr) error {
	var dev string
	err := waitFor(diskTime, func() (err error) {
		dev, err = findDisk("/sys/block", serial)
		return err
	})
	if err != nil {
		return err
	}
	if err := unix.Mount(dev, target, kind, flags, ""); err != nil {
		return fmt.Errorf("disk %s (%s) as %s: %w", serial, dev, kind, err)
	}
	return nil
}

// findDisk returns the device of the disk with the serial.
func findDisk(sys, serial string) (string, error) {
	files, err := filepath.Glob(sys + "/*/serial")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		if strings.TrimSpace(string(data)) == serial {
			return "/dev/" + filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", fmt.Errorf("there is no disk with the serial %s", serial)
}

// waitFor tries again until f succeeds or the time is over; its last error is returned then.
func waitFor(limit time.Duration, f func() error) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		err := f()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}
