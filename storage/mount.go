package storage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrMounted means that something is mounted already where a mount was to go.
var ErrMounted = errors.New("something is mounted there already")

// TmpfsSource is what the list of mounts names as the source of a tmpfs of ours.
const TmpfsSource = "clawvm"

// MountTmpfs mounts a RAM file system of at most size bytes on an existing
// directory, its root with the given permission bits: no setuid, no devices,
// no programs, and, where the kernel knows how (6.4), never in swap.
func MountTmpfs(dir string, size int64, mode os.FileMode) error {
	fail := func(err error) error { return fmt.Errorf("cannot mount a tmpfs on %s: %w", dir, err) }
	d, err := openDir(dir)
	if err != nil {
		return fail(err)
	}
	defer d.Close()
	if mounted, err := isMountRoot(d); err != nil {
		return fail(err)
	} else if mounted {
		return fail(ErrMounted)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME
	options := fmt.Sprintf("size=%d,mode=%04o", size, mode.Perm())
	target := descriptorPath(d)
	err = unix.Mount(TmpfsSource, target, "tmpfs", flags, options+",noswap")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount(TmpfsSource, target, "tmpfs", flags, options)
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// BindReadOnly shows the tree at source, with what is mounted below it, at
// the existing directory target, read-only for everyone, without setuid
// programs and devices. It is never writable, not even for a moment.
func BindReadOnly(source, target string) error {
	fail := func(err error) error { return fmt.Errorf("cannot bind %s read-only to %s: %w", source, target, err) }
	d, err := openDir(target)
	if err != nil {
		return fail(err)
	}
	defer d.Close()
	if mounted, err := isMountRoot(d); err != nil {
		return fail(err)
	} else if mounted {
		return fail(ErrMounted)
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(tree)
	attributes := &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV,
		Propagation: unix.MS_PRIVATE,
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, attributes); err != nil {
		return fail(err)
	}
	if err := unix.MoveMount(tree, "", int(d.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fail(err)
	}
	return nil
}

// Unmount takes away what is mounted on a directory; nothing being there, or
// no directory, is good. What still uses it keeps it until it ends, but nobody
// finds it any more.
func Unmount(dir string) error {
	err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if err == unix.EBUSY {
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("cannot unmount %s: %w", dir, err)
	}
	return nil
}

// isMountRoot says whether an open directory is where something is mounted.
func isMountRoot(d *os.File) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(d.Fd()), "", unix.AT_EMPTY_PATH, 0, &st); err != nil {
		return false, err
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

func descriptorPath(f *os.File) string {
	return filepath.Join("/proc/self/fd", strconv.Itoa(int(f.Fd())))
}
