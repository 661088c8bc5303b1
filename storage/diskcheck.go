package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// checkLimit bounds a disk's check. A full check of a disk with a million
// files takes about a minute; it happens after the guest's kernel found an error.
const checkLimit = 5 * time.Minute

// Of ext4's superblock (Documentation/filesystems/ext4/super.rst), which is
// at byte 1024.
const (
	superblockOffset  = 1024
	superblockSize    = 1024
	sbBlocksLow       = 0x04
	sbLogBlockSize    = 0x18
	sbMagic           = 0x38
	sbFeatureIncompat = 0x60
	sbBlocksHigh      = 0x150

	ext4Magic          = 0xef53
	incompatRecover    = 0x4  // the journal has what isn't written to its place yet
	incompat64bit      = 0x80 // sbBlocksHigh counts
	maxLogBlockSize    = 6    // 64 KiB
	e2fsckFixed        = 1    // exit status: errors were corrected
	e2fsckFixedReboot  = 2    // the same, and the system should be rebooted
	e2fsckUncorrected  = 4    // exit status: errors are left
	e2fsckOperational  = 8    // exit status: it couldn't work; without ext4 in it, for example
	journalOnlyOptions = "journal_only"
)

// CheckDisk looks whether the disk can be mounted, as the user uid:gid, to
// whom it is handed over first: e2fsck reads what a guest wrote, so it never
// runs with root's rights. A journal that wasn't emptied (the VM was killed) is
// replayed, which is what the guest's kernel would do at the mount; nothing
// else is changed. Then e2fsck judges as at a machine's start: a file system
// that was left in order is taken for good, one in which the guest's kernel
// found an error is read in full. Damage is ErrCorruptDisk, and the message has
// the command that repairs it.
func CheckDisk(ctx context.Context, d Disk, uid, gid int) (err error) {
	if uid <= 0 || gid <= 0 {
		return fmt.Errorf("cannot check the disk %s: %d:%d would check it as root", d.Path, uid, gid)
	}
	if err := HandOver(d, uid, gid); err != nil {
		return err
	}
	f, err := openDisk(d, os.O_RDWR)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	dirty, wrong, err := readSuperblock(f)
	if err != nil {
		return fmt.Errorf("cannot check the disk %s: %w", d.Path, err)
	}
	if wrong != "" {
		return damaged(d, uid, gid, wrong)
	}
	program, err := findProgram("e2fsck", "e2fsprogs")
	if err != nil {
		return fmt.Errorf("cannot check the disk %s: %w", d.Path, err)
	}
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	if dirty {
		// -p: what it wouldn't do without asking, it leaves.
		if err := fsck(ctx, f, d, uid, gid, program, "-p", "-E", journalOnlyOptions); err != nil {
			return err
		}
	}
	return fsck(ctx, f, d, uid, gid, program, "-n")
}

// readSuperblock says whether the journal must be replayed, and what is
// plainly wrong.
func readSuperblock(f *os.File) (dirty bool, wrong string, err error) {
	sb := make([]byte, superblockSize)
	if _, err := f.ReadAt(sb, superblockOffset); err == io.EOF {
		return false, "it was cut off", nil
	} else if err != nil {
		return false, "", err
	}
	if binary.LittleEndian.Uint16(sb[sbMagic:]) != ext4Magic {
		return false, "there is no ext4 file system on it any more", nil
	}
	incompat := binary.LittleEndian.Uint32(sb[sbFeatureIncompat:])
	blocks := uint64(binary.LittleEndian.Uint32(sb[sbBlocksLow:]))
	if incompat&incompat64bit != 0 {
		blocks |= uint64(binary.LittleEndian.Uint32(sb[sbBlocksHigh:])) << 32
	}
	shift := binary.LittleEndian.Uint32(sb[sbLogBlockSize:])
	info, err := f.Stat()
	if err != nil {
		return false, "", err
	}
	if shift > maxLogBlockSize || blocks > uint64(info.Size())>>(10+shift) {
		return false, "its file system is larger than the disk, which was cut off or overwritten", nil
	}
	return incompat&incompatRecover != 0, "", nil
}

// fsck runs e2fsck on an open disk. The descriptor leads to the file although
// the user can't pass the directories above it.
func fsck(ctx context.Context, f *os.File, d Disk, uid, gid int, program string, args ...string) error {
	const inherited = "/proc/self/fd/3"
	cmd := exec.CommandContext(ctx, program, append(args, inherited)...)
	cmd.ExtraFiles = []*os.File{f}
	asUser(cmd, uid, gid)
	output, err := runShort(ctx, cmd)
	if err == nil {
		return nil
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("cannot check the disk %s: e2fsck took more than %s; check it by hand: %s", d.Path, checkLimit, repairCommand(d, uid, gid))
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("cannot check the disk %s: %w", d.Path, err)
	}
	if exit.ExitCode() > 0 && exit.ExitCode()&^(e2fsckFixed|e2fsckFixedReboot) == 0 {
		return nil // what the journal's replay counts as a correction
	}
	if exit.ExitCode()&(e2fsckUncorrected|e2fsckOperational) != 0 || !exit.Exited() {
		return damaged(d, uid, gid, "e2fsck: "+excerpt(output))
	}
	return fmt.Errorf("cannot check the disk %s: e2fsck: %w: %s", d.Path, err, excerpt(output))
}

func damaged(d Disk, uid, gid int, wrong string) error {
	return fmt.Errorf("the disk %s: its %w: %s; copy the file first, then repair it as its user with `%s`, or remove it with all that is on it",
		d.Path, ErrCorruptDisk, wrong, repairCommand(d, uid, gid))
}

// repairCommand is what an administrator types. The shell opens the disk with
// root's rights, the repair runs without them.
func repairCommand(d Disk, uid, gid int) string {
	return fmt.Sprintf("setpriv --reuid=%d --regid=%d --clear-groups e2fsck -f -y /proc/self/fd/3 3<>%s", uid, gid, d.Path)
}
