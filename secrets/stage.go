package secrets

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Check looks at all sources before anything is started, and reports all that is wrong, each with the secret's name, its source
// and what to do. A secret that is generated at the first start is no problem. What a source holds isn't read.
func Check(keep string, all []Secret) error {
	var problems []error
	seen := map[string]bool{}
	for _, s := range all {
		switch err := s.problem(keep); {
		case err != nil:
			problems = append(problems, err)
		case seen[s.Name]:
			problems = append(problems, fmt.Errorf("cannot use secret %s: it is declared twice", s.Name))
		}
		seen[s.Name] = true
	}
	return errors.Join(problems...)
}

func (s Secret) problem(keep string) error {
	if err := s.check(); err != nil {
		return err
	}
	if s.Awaited {
		return nil
	}
	f, _, err := s.openSource(keep)
	if err == nil {
		err = closed(f)
	}
	if errors.Is(err, ErrMissing) && s.Generate > 0 {
		return nil
	}
	return s.explain(keep, err)
}

// explain says whose source fails, and for standard input how to give it.
func (s Secret) explain(keep string, err error) error {
	switch {
	case err == nil:
		return nil
	case s.Stdin && errors.Is(err, ErrMissing):
		return fmt.Errorf("cannot use secret %s: it was never given; `clawvm secret set %s %s` reads it from standard input (%s: %w)", s.Name, s.VM, s.Name, s.Source(keep), err)
	case s.Credential != "" && errors.Is(err, ErrMissing):
		return fmt.Errorf("cannot use secret %s: there is no credential %s in %s; add `LoadCredential=%s:/path/of/its/file` to the unit: `systemctl edit clawvm@%s`", s.Name, s.Credential, s.Credentials, s.Credential, s.VM)
	case s.File != "" && errors.Is(err, ErrMissing):
		return fmt.Errorf("cannot use secret %s: %s: %w; write the secret there (mode 0600), or declare another source", s.Name, s.File, err)
	case s.File != "" && errors.Is(err, ErrEmpty):
		return fmt.Errorf("cannot use secret %s: %s: %w; write the secret there", s.Name, s.File, err)
	default:
		return fmt.Errorf("cannot use secret %s: %s: %w", s.Name, s.Source(keep), err)
	}
}

// Stage is where a VM's secrets lie for its guest.
type Stage struct {
	Dir  string // a mounted tmpfs, root's, 0711; everything in it is ours
	Keep string // the VM's own directory, where what is generated or given is kept
}

// Write brings the stage to what is declared: it makes, replaces and removes files, each in one step, and leaves alone what is
// right already. It generates what isn't there yet. Where a source fails, its secret stays as it is staged, the others are
// written, and the error names each that failed.
func (s Stage) Write(all []Secret) (err error) {
	dir, err := os.Open(s.Dir)
	if err != nil {
		return fmt.Errorf("cannot stage secrets: %w", err)
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	var problems []error
	for _, secret := range all {
		if err := s.writeOne(int(dir.Fd()), secret); err != nil {
			problems = append(problems, err)
		}
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return errors.Join(append(problems, fmt.Errorf("cannot list staged secrets: %w", err))...)
	}
	for _, name := range names {
		if slices.ContainsFunc(all, func(s Secret) bool { return s.Name == name }) {
			continue
		}
		if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			problems = append(problems, fmt.Errorf("cannot remove the secret %s, which isn't declared any more: %w", name, err))
		}
	}
	return errors.Join(problems...)
}

func (s Stage) writeOne(dir int, secret Secret) error {
	if err := secret.check(); err != nil {
		return err
	}
	if secret.Generate > 0 {
		if err := generate(s.Keep, secret); err != nil {
			return err
		}
	}
	v, err := secret.load(s.Keep)
	if err != nil {
		return secret.explain(s.Keep, err)
	}
	defer v.wipe()
	if staged(dir, secret, v) {
		return nil
	}
	if err := replaceAt(dir, secret.Name, v.bytes, secret.Mode, secret.UID, secret.GID, false); err != nil {
		return fmt.Errorf("cannot stage secret %s: %w", secret.Name, err)
	}
	return nil
}

// staged tells whether the file is there with this content, owner and mode.
func staged(dir int, secret Secret, v *Value) bool {
	fd, err := unix.Openat(dir, secret.Name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), secret.Name)
	var stat unix.Stat_t
	same := unix.Fstat(fd, &stat) == nil && stat.Mode == unix.S_IFREG|uint32(secret.Mode.Perm()) &&
		int(stat.Uid) == secret.UID && int(stat.Gid) == secret.GID && stat.Nlink == 1 && stat.Size == int64(len(v.bytes))
	if same {
		there, err := readAll(f, int(stat.Size))
		same = err == nil && bytes.Equal(there.bytes, v.bytes)
		there.wipe()
	}
	return f.Close() == nil && same
}

// Status is what may be said of a secret: all but its content.
type Status struct {
	Name     string
	Source   string // the path of a file, or how it is made
	Present  bool
	Modified time.Time // of the source; zero where there is none
	Problem  string    // why the source can't be used; empty: it can
}

// List gives the status of each secret, by name.
func List(keep string, all []Secret) []Status {
	var list []Status
	for _, s := range all {
		status := Status{Name: s.Name, Source: s.describe()}
		if info, err := os.Lstat(s.Source(keep)); err == nil {
			status.Present, status.Modified = true, info.ModTime()
		} else if !errors.Is(err, fs.ErrNotExist) {
			status.Problem = err.Error()
		}
		if err := s.problem(keep); err != nil {
			status.Problem = err.Error()
		}
		list = append(list, status)
	}
	slices.SortFunc(list, func(a, b Status) int { return strings.Compare(a.Name, b.Name) })
	return list
}
