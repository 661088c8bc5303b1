package storage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
)

// ErrShare means that a share isn't possible as it was declared.
var ErrShare = errors.New("cannot share")

// Values of Share.Cache: how long the guest may believe what it has read.
const (
	CacheAlways = "always" // for trees that never change: the store
	CacheAuto   = "auto"   // a second
	CacheNever  = "never"  // each open asks: secrets, which are replaced while the guest runs
)

// Share is a directory of the host that a guest mounts.
type Share struct {
	Tag      string // the name that the guest mounts it by; for messages
	Source   string // the directory, absolute
	Socket   string // where the VMM connects, 107 bytes at most; made by Serve in a directory that only root may write to
	ReadOnly bool
	Cache    string // CacheAlways, CacheAuto or CacheNever
	XAttr    bool   // offer extended attributes (Image.XAttrs)

	// A writable share has one owner on the host, never root, and one in
	// the guest: whatever the guest writes belongs to OwnerUID there, and
	// what belongs to OwnerUID appears as GuestUID's. virtiofsd runs as this
	// owner, so that the guest can do no more than the owner could.
	SquashUID, SquashGID int
	GuestUID, GuestGID   int

	OwnerUID, OwnerGID int      // the VMM's, who may connect to the socket
	Log                *os.File // virtiofsd's messages; nil: nowhere

	// Spawn starts the process in a way that it dies with this one; nil
	// means (*exec.Cmd).Start.
	Spawn func(*exec.Cmd) error
}

// listenFD is the number of the listening socket in virtiofsd: the first
// descriptor after the standard ones.
const listenFD = 3

// What a share of a given kind needs of root's rights. Reading files of all
// owners is one capability; changing anything isn't possible without others.
const readOnlyCapabilities = "+dac_read_search:-dac_override:-chown:-fowner:-fsetid:-setgid:-setuid:-mknod:-setfcap"

// maxID is the number of ids there are; the last stands for "none".
const maxID = 1<<32 - 1

// bindNeeded says whether the share is made read-only by a mount.
func (v *Virtiofsd) bindNeeded(s Share) bool {
	return s.ReadOnly && (v.Legacy || !v.version.atLeast(readonlySince))
}

// checkShare refuses what this virtiofsd can't do safely.
func (v *Virtiofsd) checkShare(s Share) error {
	switch s.Cache {
	case CacheAlways, CacheAuto, CacheNever:
	default:
		return fmt.Errorf("%w %s: unknown cache mode %q", ErrShare, s.Source, s.Cache)
	}
	if s.ReadOnly {
		return nil
	}
	if v.Legacy || !v.version.atLeast(translateSince) {
		return fmt.Errorf("%w %s writable: virtiofsd %s (%s) would let the guest write as the host's root; install virtiofsd %s or newer, or declare `readonly: true`",
			ErrShare, s.Source, v.Version, v.Path, translateSince)
	}
	if s.SquashUID <= 0 || s.SquashGID <= 0 {
		return fmt.Errorf("%w %s writable: it belongs to root or root's group, as whom no guest writes; give it to a user (`chown USER:GROUP %s`) or declare `readonly: true`",
			ErrShare, s.Source, s.Source)
	}
	return nil
}

// args returns virtiofsd's command line for a share of source, with at most
// nofile descriptors, or as many as it may have anyway when that is 0.
func (v *Virtiofsd) args(s Share, source string, nofile uint64) []string {
	if v.Legacy {
		return legacyArgs(s, source, nofile)
	}
	a := []string{
		"--fd=" + strconv.Itoa(listenFD),
		"--shared-dir=" + source,
		"--cache=" + s.Cache,
		"--sandbox=namespace",
		"--seccomp=kill",
		"--thread-pool-size=0", // one thread is quicker than four for small files, and smaller
		"--rlimit-nofile=" + strconv.FormatUint(nofile, 10),
		"--log-level=warn",
	}
	if s.XAttr {
		a = append(a, "--xattr")
	}
	if !s.ReadOnly {
		return append(a,
			"--inode-file-handles=never", // the owner may not open by handle
			fmt.Sprintf("--translate-uid=squash-guest:0:%d:%d", s.SquashUID, uint64(maxID)),
			fmt.Sprintf("--translate-uid=squash-host:%d:%d:1", s.SquashUID, s.GuestUID),
			fmt.Sprintf("--translate-gid=squash-guest:0:%d:%d", s.SquashGID, uint64(maxID)),
			fmt.Sprintf("--translate-gid=squash-host:%d:%d:1", s.SquashGID, s.GuestGID))
	}
	// Handles keep the number of descriptors small however many files the
	// guest knows, but opening by one reaches the whole file system: only
	// the tree that clawvm itself made gets them.
	handles := "never"
	if s.Cache == CacheAlways {
		handles = "prefer"
	}
	a = append(a,
		"--inode-file-handles="+handles,
		"--modcaps="+readOnlyCapabilities)
	if v.version.atLeast(readonlySince) {
		a = append(a, "--readonly")
	}
	return a
}

// legacyArgs is the command line of QEMU 7's virtiofsd, which makes a
// read-only share of a read-only mount and nothing else for us. Its seccomp
// filter has no switch: it is on, and kills.
func legacyArgs(s Share, source string, nofile uint64) []string {
	cache := s.Cache
	if cache == CacheNever {
		cache = "none"
	}
	xattr := "no_xattr"
	if s.XAttr {
		xattr = "xattr"
	}
	return []string{
		"-f",
		"--fd=" + strconv.Itoa(listenFD),
		"--thread-pool-size=0",
		"--rlimit-nofile=" + strconv.FormatUint(nofile, 10),
		"-o", "source=" + legacyEscape(source),
		"-o", "cache=" + cache,
		"-o", "sandbox=namespace",
		"-o", xattr,
		"-o", "modcaps=" + readOnlyCapabilities,
		"-o", "log_level=warn",
	}
}

// legacyEscape protects what FUSE's option parser would take for itself.
func legacyEscape(path string) string {
	b := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		if path[i] == ',' || path[i] == '\\' {
			b = append(b, '\\')
		}
		b = append(b, path[i])
	}
	return string(b)
}
