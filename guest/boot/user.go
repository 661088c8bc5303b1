package boot

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// maxAccounts bounds what is read of the image's passwd and group, in bytes.
const maxAccounts = 4 << 20

// defaultPath is the PATH of a program, as Debian's login sets it for a user, with the directories for root in it.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// account is who a program runs as.
type account struct {
	Name   string
	UID    int
	GID    int
	Groups []int // supplementary
	Home   string
	Shell  string
}

// environment is what a login would set.
func (a *account) environment() map[string]string {
	return map[string]string{"HOME": a.Home, "USER": a.Name, "LOGNAME": a.Name, "SHELL": a.Shell, "PATH": defaultPath}
}

// lookupAccount finds name, uid, name:group or uid:gid in the passwd and group files below root. A number needs no entry. An
// explicit group is the only one; else the user's supplementary groups belong to it.
func lookupAccount(etc, spec string) (*account, error) {
	userPart, groupPart, explicit := strings.Cut(spec, ":")
	if userPart == "" {
		userPart = "root"
	}
	a := &account{Name: userPart, Home: "/", Shell: "/bin/sh"}
	uid, numberErr := strconv.ParseUint(userPart, 10, 32)
	found := false
	err := eachEntry(etc+"/passwd", 7, func(f []string) error {
		id, err := strconv.ParseUint(f[2], 10, 32)
		if found || err != nil || f[0] != userPart && (numberErr != nil || id != uid) {
			return nil
		}
		gid, err := strconv.ParseUint(f[3], 10, 32)
		if err != nil {
			return nil
		}
		found = true
		a.Name, a.UID, a.GID = f[0], int(id), int(gid)
		if f[5] != "" {
			a.Home = f[5]
		}
		if f[6] != "" {
			a.Shell = f[6]
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	switch {
	case found:
	case numberErr == nil:
		a.UID = int(uid)
	case userPart == "root": // an image without passwd
		a.Home = "/root"
	default:
		return nil, fmt.Errorf("the image has no user %q", userPart)
	}
	if explicit {
		return a, a.setGroup(etc, groupPart)
	}
	err = eachEntry(etc+"/group", 4, func(f []string) error {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err == nil && slices.Contains(strings.Split(f[3], ","), a.Name) {
			a.Groups = append(a.Groups, int(gid))
		}
		return nil
	})
	return a, err
}

func (a *account) setGroup(etc, spec string) error {
	gid, numberErr := strconv.ParseUint(spec, 10, 32)
	if numberErr == nil {
		a.GID = int(gid)
		return nil
	}
	found := false
	err := eachEntry(etc+"/group", 4, func(f []string) error {
		if id, err := strconv.ParseUint(f[2], 10, 32); err == nil && f[0] == spec && !found {
			found, a.GID = true, int(id)
		}
		return nil
	})
	if err == nil && !found {
		err = fmt.Errorf("the image has no group %q", spec)
	}
	return err
}

// eachEntry calls each with the fields of every line that has so many; a file that isn't there has none.
func eachEntry(path string, fields int, each func([]string) error) (err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	lines := bufio.NewScanner(io.LimitReader(f, maxAccounts))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if parts := strings.Split(lines.Text(), ":"); len(parts) == fields && parts[0] != "" {
			if err := each(parts); err != nil {
				return err
			}
		}
	}
	return lines.Err()
}
