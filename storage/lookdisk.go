package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// More of ext4's superblock.
const (
	sbState    = 0x3a
	stateError = 2 // the guest's kernel found an error
)

// DiskState is what a look at a disk shows.
type DiskState struct {
	// Unfinished: the journal has what isn't written to its place yet. So it is while the disk is mounted, and after a kill; the
	// next start brings it to its place.
	Unfinished bool
	// Errors: the guest's kernel found an error; the next start reads the file system in full.
	Errors bool
}

// LookDisk reads a disk's superblock, without the check of the file system that CheckDisk makes of it, and changes nothing. A disk that
// isn't there is fs.ErrNotExist; other errors are ErrDiskSize, ErrNotDisk, and ErrCorruptDisk for what is plainly wrong.
func LookDisk(d Disk) (s DiskState, err error) {
	f, err := openDisk(d, os.O_RDONLY)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return s, err
	}
	if info.Size() != d.Size {
		return s, wrongSize(d, info.Size())
	}
	dirty, wrong, err := readSuperblock(f)
	if err != nil {
		return s, fmt.Errorf("cannot look at the disk %s: %w", d.Path, err)
	}
	if wrong != "" {
		return s, fmt.Errorf("the disk %s: its %w: %s; restore it from a copy, or remove it with all that is on it", d.Path, ErrCorruptDisk, wrong)
	}
	state := make([]byte, 2)
	if _, err := f.ReadAt(state, superblockOffset+sbState); err != nil {
		return s, fmt.Errorf("cannot look at the disk %s: %w", d.Path, err)
	}
	return DiskState{Unfinished: dirty, Errors: binary.LittleEndian.Uint16(state)&stateError != 0}, nil
}

// CheckPrograms says which program that makes or checks disks isn't installed.
func CheckPrograms() error {
	var errs []error
	for _, name := range []string{"mke2fs", "e2fsck"} {
		_, err := findProgram(name, "e2fsprogs")
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
