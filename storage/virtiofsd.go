package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// VirtiofsdVariable names the environment variable that says which virtiofsd
// to use, instead of the usual places.
const VirtiofsdVariable = "CLAWVM_VIRTIOFSD"

// ErrNoVirtiofsd means that the host has no virtiofsd that clawvm can use.
var ErrNoVirtiofsd = errors.New("cannot find a virtiofsd")

// Where distributions put it: Debian 13, Ubuntu and Fedora; Arch; Debian 12,
// where QEMU 7 brings its own.
var virtiofsdPaths = []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"}

// What versions of the Rust virtiofsd can do.
var (
	oldestRust     = version{1, 10, 0} // the first with all the options that are always given
	readonlySince  = version{1, 13, 0} // --readonly
	translateSince = version{1, 13, 0} // --translate-uid
	oldestLegacy   = version{7, 0, 0}  // QEMU's, in C, which ended with 7.2
)

// versionLimit bounds how long `virtiofsd --version` may take.
const versionLimit = 10 * time.Second

type version [3]int

func (v version) atLeast(o version) bool {
	for i := range v {
		if v[i] != o[i] {
			return v[i] > o[i]
		}
	}
	return true
}

func (v version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// Virtiofsd is a virtiofsd program.
type Virtiofsd struct {
	Path    string
	Version string // "1.13.2"
	Legacy  bool   // QEMU 7's, written in C: no writable shares, read-only by a mount
	version version
}

// versionPattern matches "virtiofsd 1.13.2", "virtiofsd backend 1.10.0" and
// "virtiofsd version 7.2.22 (Debian ...)", the last being QEMU's.
var versionPattern = regexp.MustCompile(`(?m)^virtiofsd (version |backend )?(\d+)\.(\d+)(?:\.(\d+))?`)

// parseVersion reads what `virtiofsd --version` printed.
func parseVersion(path, output string) (*Virtiofsd, error) {
	m := versionPattern.FindStringSubmatch(output)
	if m == nil {
		return nil, fmt.Errorf("%s, which doesn't say which version it is: %q", path, excerpt(output))
	}
	var v version
	for i, s := range m[2:] {
		if s == "" {
			continue
		}
		n, err := strconv.Atoi(s)
		if err != nil {
			return nil, fmt.Errorf("%s, which says an impossible version: %q", path, excerpt(output))
		}
		v[i] = n
	}
	d := &Virtiofsd{Path: path, Version: v.String(), Legacy: m[1] == "version ", version: v}
	oldest := oldestRust
	if d.Legacy {
		oldest = oldestLegacy
	}
	if !v.atLeast(oldest) {
		return nil, fmt.Errorf("%s, which is version %s, older than %s", path, v, oldest)
	}
	return d, nil
}

// FindVirtiofsd finds the host's virtiofsd: what CLAWVM_VIRTIOFSD names, and
// only that, when it is set; else the first good one in the usual places and on
// the PATH, Rust's before QEMU's. ErrNoVirtiofsd says what to install.
func FindVirtiofsd(ctx context.Context) (*Virtiofsd, error) {
	if path := os.Getenv(VirtiofsdVariable); path != "" {
		d, err := askVersion(ctx, path)
		if err != nil {
			return nil, fmt.Errorf("%w: %s names %w; correct it, or unset it for the host's own", ErrNoVirtiofsd, VirtiofsdVariable, err)
		}
		return d, nil
	}
	candidates := virtiofsdPaths
	if path, err := exec.LookPath("virtiofsd"); err == nil {
		candidates = append([]string{path}, candidates...)
	}
	var found *Virtiofsd
	var why []string
	for _, path := range candidates {
		if unix.Access(path, unix.X_OK) != nil {
			continue
		}
		d, err := askVersion(ctx, path)
		if couldNotLook(err) {
			return nil, fmt.Errorf("cannot find out which virtiofsd there is: %w", err)
		}
		if err != nil {
			why = append(why, err.Error())
			continue
		}
		if !d.Legacy {
			return d, nil
		}
		if found == nil {
			found = d
		}
	}
	if found != nil {
		return found, nil
	}
	if len(why) > 0 {
		why[0] = "there is only " + why[0]
	} else {
		why = []string{"none is in " + strings.Join(virtiofsdPaths, ", ") + " or on the PATH"}
	}
	return nil, fmt.Errorf("%w: %s; install the package virtiofsd (Debian 13, Ubuntu 24.04, Fedora) or qemu-system-common (Debian 12), or let %s name one",
		ErrNoVirtiofsd, strings.Join(why, " and "), VirtiofsdVariable)
}

// couldNotLook says whether a program was not asked because the host had nothing
// left to ask it with, which says nothing about the program.
func couldNotLook(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EAGAIN} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// bare is what an error of the system says beside the path, which the message
// names already.
func bare(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

func askVersion(ctx context.Context, path string) (*Virtiofsd, error) {
	ctx, cancel := context.WithTimeout(ctx, versionLimit)
	defer cancel()
	output, err := runShort(ctx, exec.CommandContext(ctx, path, "--version"))
	if err != nil && output == "" {
		return nil, fmt.Errorf("%s, which can't be run: %w", path, bare(err))
	}
	if err != nil {
		return nil, fmt.Errorf("%s, which doesn't say its version (%w): %s", path, err, excerpt(output))
	}
	return parseVersion(path, output)
}
