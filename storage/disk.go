package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/internal/durable"
)

var (
	// ErrFull means that the file system that a disk is on is full.
	ErrFull = errors.New("no space left on the host")
	// ErrNotDisk means that what is at a disk's path isn't a regular file
	// of its own: a symbolic link, a device, or a file with several names.
	ErrNotDisk = errors.New("not a disk of clawvm's")
	// ErrDiskSize means that a disk has another size than was declared.
	ErrDiskSize = errors.New("has another size than declared")
	// ErrCorruptDisk means that a disk's file system is damaged.
	ErrCorruptDisk = errors.New("file system is damaged")
)

// MinDiskSize is the smallest disk: below it ext4 with a journal has hardly
// any room for files.
const MinDiskSize = 16 << 20

// maxLabel is the length of an ext4 label.
const maxLabel = 16

// mke2fsArgs are the options of a server's small disk. The features are named
// one by one, so that neither the host's mke2fs.conf nor the version of
// e2fsprogs makes a disk that an older guest kernel can't mount: all of them
// are known since Linux 4.4 and e2fsprogs 1.43. Tables and journal are
// initialised by the guest when it has time (they are holes, so zero, as it
// is), and nothing is reserved for root: what fills the disk is one program.
func mke2fsArgs(d Disk, file string) []string {
	return []string{
		"-q", "-F", "-t", "ext4",
		"-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
		"-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
		"-L", d.Label,
		file, strconv.FormatInt(d.Size/1024, 10) + "k",
	}
}

// HalfMade is what a disk's name ends with until the disk is whole.
const HalfMade = ".new"

// Disk is a raw image file with an ext4 file system on it.
type Disk struct {
	Path  string
	Size  int64  // bytes, a multiple of 4096
	Label string // of the file system, 16 bytes at most
}

// EnsureDisk makes the disk if there is none: sparse, 0600, root's, whole or
// not at all. A disk that is there is left alone; one of another size is
// ErrDiskSize, since neither growing nor shrinking what a guest wrote is root's
// work. Other errors: ErrFull, ErrNotDisk.
func EnsureDisk(ctx context.Context, d Disk) (created bool, err error) {
	if d.Size < MinDiskSize || d.Size%4096 != 0 {
		return false, fmt.Errorf("cannot make the disk %s: its size %d isn't a multiple of 4096 of at least %s", d.Path, d.Size, humanize.IBytes(MinDiskSize))
	}
	if len(d.Label) > maxLabel {
		return false, fmt.Errorf("cannot make the disk %s: its label %q is longer than %d bytes", d.Path, d.Label, maxLabel)
	}
	f, err := openDisk(d, os.O_RDONLY)
	if err == nil {
		info, err := f.Stat()
		if err := errors.Join(err, f.Close()); err != nil {
			return false, err
		}
		if info.Size() != d.Size {
			return false, wrongSize(d, info.Size())
		}
		return false, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := makeDisk(ctx, d); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = fmt.Errorf("%w in %s: %w", ErrFull, filepath.Dir(d.Path), err)
		}
		return false, fmt.Errorf("cannot make the disk %s: %w", d.Path, err)
	}
	return true, nil
}

func wrongSize(d Disk, has int64) error {
	return fmt.Errorf("the disk %s %w: it has %s, declared are %s; declare the size that it has, or remove the disk with all that is on it",
		d.Path, ErrDiskSize, exactSize(has), exactSize(d.Size))
}

// exactSize shows a size in the unit that loses nothing.
func exactSize(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for ; n != 0 && n%1024 == 0 && i < len(units)-1; i++ {
		n /= 1024
	}
	return strconv.FormatInt(n, 10) + units[i]
}

// openDisk opens a disk's file, and nothing else.
func openDisk(d Disk, flags int) (*os.File, error) {
	f, err := os.OpenFile(d.Path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is %w: it is a symbolic link", d.Path, ErrNotDisk)
	}
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%s is %w: it is no regular file", d.Path, ErrNotDisk)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the disk: %w", err)
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = fmt.Errorf("%s is %w: it is no regular file", d.Path, ErrNotDisk)
	case st.Nlink != 1:
		err = fmt.Errorf("%s is %w: the file has %d names", d.Path, ErrNotDisk, st.Nlink)
	default:
		return f, nil
	}
	return nil, errors.Join(err, f.Close())
}

func makeDisk(ctx context.Context, d Disk) (err error) {
	half := d.Path + HalfMade
	if err := os.Remove(half); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(half, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			if rerr := os.Remove(half); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
		}
	}()
	if err := f.Truncate(d.Size); err != nil {
		return err
	}
	program, err := findProgram("mke2fs", "e2fsprogs")
	if err != nil {
		return err
	}
	output, err := runShort(ctx, exec.CommandContext(ctx, program, mke2fsArgs(d, half)...))
	if err != nil {
		var st unix.Statfs_t
		if unix.Fstatfs(int(f.Fd()), &st) == nil && st.Bavail < mkfsRoom/uint64(st.Bsize) {
			return fmt.Errorf("%w: mke2fs: %s", unix.ENOSPC, excerpt(output))
		}
		return fmt.Errorf("mke2fs: %w: %s", err, excerpt(output))
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return durable.Rename(half, d.Path)
}

// mkfsRoom is more than mke2fs leaves free when it fails for lack of space,
// which it says in prose only.
const mkfsRoom = 1 << 20

// findProgram looks where system programs are, whatever PATH the caller has.
func findProgram(name, pkg string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/run/current-system/sw/bin"} {
		path := filepath.Join(dir, name)
		if unix.Access(path, unix.X_OK) == nil {
			return path, nil
		}
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return "", fmt.Errorf("%s isn't installed: install the package %s", name, pkg)
}

// HandOver gives the disk to the VMM's user, 0600.
func HandOver(d Disk, uid, gid int) error {
	f, err := openDisk(d, os.O_RDONLY)
	if err != nil {
		return err
	}
	err = f.Chown(uid, gid)
	if err == nil {
		err = f.Chmod(0o600)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cannot give the disk %s to %d:%d: %w", d.Path, uid, gid, err)
	}
	return nil
}

// asUser makes a command run without any of root's rights and without a network.
func asUser(cmd *exec.Cmd, uid, gid int) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
	}
}
