package recipe

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// layout is what is written into an image before its commands run. It is
// applied by a process that has the image as its root, so that a link in it
// leads nowhere else.
type layout struct {
	Users []User
	Files []ownedFile
}

type ownedFile struct {
	File
	UID int
}

func (l *layout) apply() error {
	for _, f := range l.Files {
		if err := f.write(); err != nil {
			return fmt.Errorf("cannot write %s: %w", f.Path, err)
		}
	}
	// After the files, which may be /etc/passwd itself.
	for _, u := range l.Users {
		if err := addUser(u); err != nil {
			return fmt.Errorf("cannot add the user %s: %w", u.Name, err)
		}
	}
	return nil
}

// addUser writes what adduser would: no image needs that package for it.
func addUser(u User) error {
	id := strconv.Itoa(u.UID)
	lines := []struct {
		file string
		mode os.FileMode
		line string
	}{
		{"/etc/group", 0o644, u.Name + ":x:" + id + ":"},
		{"/etc/gshadow", 0o640, u.Name + ":!::"},
		{"/etc/passwd", 0o644, strings.Join([]string{u.Name, "x", id, id, "", u.Home, u.Shell}, ":")},
		{"/etc/shadow", 0o640, u.Name + ":!:19000:0:99999:7:::"},
	}
	for _, l := range lines {
		if err := appendLine(l.file, l.mode, u.Name, l.line); err != nil {
			return err
		}
	}
	return ownedFile{File{Path: u.Home, Directory: true, Mode: "0750"}, u.UID}.write()
}

// appendLine adds a user's line to one of the account files, which a tiny image
// may not have yet.
func appendLine(file string, mode os.FileMode, name, line string) error {
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(path.Dir(file), 0o755); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	for old := range strings.Lines(string(data)) {
		if strings.HasPrefix(old, name+":") {
			return fmt.Errorf("%s has that name already", file)
		}
	}
	f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}

func (f ownedFile) write() error {
	mode, err := f.mode()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(path.Dir(f.Path), 0o755); err != nil {
		return err
	}
	if f.Directory {
		if err := os.MkdirAll(f.Path, 0o755); err != nil {
			return err
		}
	} else {
		if err := os.Remove(f.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	switch {
	case f.Link != "":
		if err := os.Symlink(f.Link, f.Path); err != nil {
			return err
		}
		return os.Lchown(f.Path, f.UID, f.UID)
	case !f.Directory:
		if err := os.WriteFile(f.Path, []byte(f.Content), 0o600); err != nil {
			return err
		}
	}
	if err := os.Lchown(f.Path, f.UID, f.UID); err != nil {
		return err
	}
	return chmod(f.Path, mode)
}

// chmod sets an octal mode: Go's os.FileMode has the special bits elsewhere.
func chmod(name string, octal uint32) error {
	mode := os.FileMode(octal & 0o777)
	for _, bit := range []struct {
		octal uint32
		mode  os.FileMode
	}{{0o4000, os.ModeSetuid}, {0o2000, os.ModeSetgid}, {0o1000, os.ModeSticky}} {
		if octal&bit.octal != 0 {
			mode |= bit.mode
		}
	}
	return os.Chmod(name, mode)
}

// finish is what happens to an image at the end.
type finish struct {
	Remove        []string
	RemoveContent []string
	Stamp         *Stamp
}

// StampPath is where an image says what it was built from.
const StampPath = "/etc/clawvm/image.json"

// Stamp is the content of the file at StampPath.
type Stamp struct {
	Recipe string `json:"recipe"` // the recipe's name
	Digest string `json:"digest"` // the recipe's digest, see Recipe.Digest
	// Environment is the recipe's, with which its commands ran.
	Environment map[string]string `json:"environment,omitempty"`
}

// notTheImages are files that mmdebstrap copies from the host. In a VM they
// are the VM's.
var notTheImages = []string{"/etc/hostname", "/etc/resolv.conf"}

func (f *finish) apply() error {
	for _, dir := range f.RemoveContent {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("cannot empty %s: %w", dir, err)
		}
		for _, e := range entries {
			if err := os.RemoveAll(path.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("cannot empty %s: %w", dir, err)
			}
		}
	}
	for _, pattern := range slices.Concat(notTheImages, f.Remove) {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return fmt.Errorf("cannot look for %s: %w", pattern, err)
		}
		for _, name := range found {
			if err := os.RemoveAll(name); err != nil {
				return fmt.Errorf("cannot remove %s: %w", name, err)
			}
		}
	}
	if f.Stamp == nil {
		return nil
	}
	data, err := json.MarshalIndent(f.Stamp, "", "  ")
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", StampPath, err)
	}
	if err := (ownedFile{File{Path: StampPath, Content: string(data) + "\n"}, 0}).write(); err != nil {
		return fmt.Errorf("cannot write %s: %w", StampPath, err)
	}
	return nil
}
