package doctor

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

func number(s string) (uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return n, err == nil
}

func readLines(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	return strings.Split(string(b), "\n"), err
}

func size(bytes uint64) string { return humanize.IBytes(bytes) }

// checkMemory compares what the declared VMs may use with what the host has.
func checkMemory(_ context.Context, k *look) []Finding {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return []Finding{broken("memory", Unknown, err)}
	}
	total, available, err := meminfo(string(b))
	if err != nil {
		return []Finding{broken("memory", Unknown, err)}
	}
	u := use{vms: len(k.vms), total: total, available: available}
	for _, d := range k.vms {
		if d.vm != nil {
			u.all += uint64(d.vm.Memory)
			if !d.running {
				u.down += uint64(d.vm.Memory)
			}
		}
	}
	return u.judge()
}

// use is the memory, in bytes, that the declared VMs may use, of those that are down, and the host's.
type use struct {
	vms              int
	all, down        uint64
	total, available uint64
}

func (u use) judge() []Finding {
	const do = "declare less `memory:`, or fewer VMs; a host without memory kills one of them"
	switch {
	case u.vms == 0:
		return found("memory", OK, "", "%s of %s are left", size(u.available), size(u.total))
	case u.all > u.total:
		return found("memory", Warning, do, "declared VMs: %d, which may use %s, and the host has %s", u.vms, size(u.all), size(u.total))
	case u.down > u.available:
		return found("memory", Warning, do, "the VMs that are down may use %s, and %s of %s are left", size(u.down), size(u.available), size(u.total))
	}
	return found("memory", OK, "", "declared VMs: %d, which may use %s of %s; %s are left", u.vms, size(u.all), size(u.total), size(u.available))
}

// meminfo reads the total and the available memory, in bytes, of /proc/meminfo.
func meminfo(text string) (total, available uint64, err error) {
	have := map[string]uint64{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err == nil {
			have[key] = n * 1024
		}
	}
	total, ok1 := have["MemTotal"]
	available, ok2 := have["MemAvailable"]
	if !ok1 || !ok2 {
		return 0, 0, fmt.Errorf("/proc/meminfo does not say MemTotal and MemAvailable")
	}
	return total, available, nil
}

// checkSpace looks what is left where clawvm writes.
func checkSpace(_ context.Context, k *look) []Finding {
	var all []Finding
	for _, p := range []struct{ name, path string }{
		{"space-store", k.Layout.Store()}, {"space-disks", k.Layout.StateRoot()},
		{"space-run", k.Layout.RunRoot()}, {"space-log", filepath.Dir(k.Layout.VM("x").Log)},
	} {
		dir := nearest(p.path)
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			all = append(all, broken(p.name, Unknown, fmt.Errorf("cannot look at %s: %w", dir, err)))
			continue
		}
		unit := uint64(st.Bsize)
		all = append(all, room{p.name, p.path, st.Bavail * unit, st.Blocks * unit, st.Ffree, st.Files, st.Flags&unix.ST_RDONLY != 0}.judge())
	}
	return append(all, growth(k)...)
}

// nearest is the directory at path, or the next one above it that is there.
func nearest(path string) string {
	for path != "/" {
		if _, err := os.Stat(path); err == nil {
			return path
		}
		path = filepath.Dir(path)
	}
	return path
}

// Limits of what is left of a file system, in bytes and percent: below the first two a start fails soon; below the others it is time to
// make room. A start writes some 50 MiB of initramfs.
const (
	roomNone        = 64 << 20
	roomLittle      = 2 << 30
	roomLittlePart  = 5 // percent
	inodesLittle    = 10_000
	inodesNone      = 100
	roomNotMeasured = 0 // Files of a file system that makes inodes as it needs them (btrfs)
)

// room is what is left of the file system that a path is on.
type room struct {
	name, path  string
	free, total uint64 // bytes
	inodes      uint64 // free ones
	allInodes   uint64
	readOnly    bool
}

func (r room) judge() Finding {
	f := Finding{Check: r.name, Severity: OK, Seen: fmt.Sprintf("%s of %s are left for %s", size(r.free), size(r.total), r.path)}
	do := "remove what is not needed (`clawvm image ls`, `clawvm rm`, old logs), or make the file system larger"
	if r.name == "space-run" {
		do = "mount -o remount,size=… the tmpfs that it is on"
	}
	little := r.free < roomLittle && r.free < r.total*roomLittlePart/100
	fewInodes := r.allInodes != roomNotMeasured && r.inodes < inodesLittle && r.inodes < r.allInodes*roomLittlePart/100
	switch {
	case r.readOnly:
		f.Severity, f.Seen, f.Do = Error, fmt.Sprintf("%s is on a file system that is read-only", r.path), "`dmesg` says whether the kernel made it so after an error; else mount it read-write"
	case r.free < roomNone, r.allInodes != roomNotMeasured && r.inodes < inodesNone:
		f.Severity, f.Do = Error, do
	case little, fewInodes:
		f.Severity, f.Do = Warning, do
	}
	if f.Severity != OK && r.allInodes != roomNotMeasured && (r.inodes < inodesNone || fewInodes) && !r.readOnly {
		f.Seen += fmt.Sprintf(", and %d of %d inodes", r.inodes, r.allInodes)
	}
	return f
}

// growth compares what the VMs' disks may still grow by with what is left: they are sparse, so that more can be declared than there is.
func growth(k *look) []Finding {
	var may uint64
	for _, d := range k.vms {
		if d.vm == nil {
			continue
		}
		for _, disk := range k.Layout.Disks(d.vm) {
			used := uint64(0)
			var st unix.Stat_t
			if unix.Lstat(disk.Path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
				used = uint64(st.Blocks) * 512 // stat(2)
			}
			if declared := uint64(disk.Size); declared > used {
				may += declared - used
			}
		}
	}
	var st unix.Statfs_t
	if unix.Statfs(nearest(k.Layout.StateRoot()), &st) != nil || may <= st.Bavail*uint64(st.Bsize) {
		return nil
	}
	return found("disk-growth", Note, "a guest gets errors of its disk when the host's is full; declare smaller disks, or watch this",
		"the declared disks may grow by %s, and %s are left", size(may), size(st.Bavail*uint64(st.Bsize)))
}

// Of adjtimex(2).
const clockUnsynchronised = 0x40 // STA_UNSYNC

// plausibleYears are those that a clock shows which is set: from the year in which this was written.
const firstYear, lastYear = 2025, 2100

func checkClock(context.Context, *look) []Finding {
	var t unix.Timex
	if _, err := unix.Adjtimex(&t); err != nil {
		return []Finding{broken("clock", Unknown, fmt.Errorf("cannot ask for the clock's state: %w", err))}
	}
	return clock(time.Now(), t.Status&clockUnsynchronised == 0)
}

// clock judges the time, and whether something keeps it right.
func clock(now time.Time, synchronised bool) []Finding {
	const set = "timedatectl set-ntp true, or install chrony"
	if y := now.Year(); y < firstYear || y > lastYear {
		return found("clock", Error, set, "it shows %s; no certificate is valid then", now.UTC().Format(time.RFC3339))
	}
	if !synchronised {
		return found("clock", Warning, set, "nothing keeps it right (the kernel calls it not synchronised); guests take their time from it")
	}
	return found("clock", OK, "", "synchronised")
}

// owned is a directory or file of clawvm's, and the mode bits that it must not have.
type owned struct {
	path   string
	never  fs.FileMode
	reason string
}

// checkPermissions looks whether somebody else may change or read what is root's.
func checkPermissions(_ context.Context, k *look) []Finding {
	const changed, read = "others may change it", "others may read it"
	list := []owned{
		{filepath.Dir(k.Layout.HostConfig()), 0o022, changed}, {k.Layout.HostConfig(), 0o022, changed}, {k.Layout.Declarations(), 0o022, changed},
		{k.Layout.Store(), 0o077, "others may reach its setuid files"}, {k.Layout.StateRoot(), 0o022, changed}, {k.Layout.BootCache(), 0o022, changed},
		{k.Layout.Leases(), 0o022, changed}, {k.Layout.RunRoot(), 0o022, changed}, {filepath.Dir(k.Layout.VM("x").Log), 0o022, changed},
	}
	for _, d := range k.vms {
		p := k.Layout.VM(d.name)
		if file, err := k.Layout.Declaration(d.name); err == nil {
			list = append(list, owned{file, 0o022, changed})
		}
		list = append(list, owned{p.State, 0o022, changed}, owned{p.KeptSecrets(), 0o077, read}, owned{p.Run, 0o022, changed})
	}
	return permissions(list)
}

func permissions(list []owned) []Finding {
	var all []Finding
	for _, o := range list {
		info, err := os.Stat(o.path)
		switch {
		case os.IsNotExist(err):
			continue
		case err != nil:
			all = append(all, broken("permissions", Unknown, err))
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(o.path, &st); err != nil {
			all = append(all, broken("permissions", Unknown, err))
			continue
		}
		if st.Uid != 0 {
			all = append(all, Finding{Check: "permissions", Severity: Error, Seen: fmt.Sprintf("%s belongs to uid %d and not to root", o.path, st.Uid), Do: "chown root " + o.path})
		}
		if mode := info.Mode().Perm(); mode&o.never != 0 {
			all = append(all, Finding{Check: "permissions", Severity: Error, Seen: fmt.Sprintf("%s has mode %04o: %s", o.path, mode, o.reason),
				Do: fmt.Sprintf("chmod %04o %s", mode&^o.never, o.path)})
		}
	}
	if len(all) == 0 {
		return found("permissions", OK, "", "clawvm's directories are root's alone")
	}
	return all
}
