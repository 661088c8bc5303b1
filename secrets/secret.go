// Package secrets brings secrets from their sources to where a guest reads them: files in a tmpfs, which the caller mounts
// and shares. What a secret holds is in no error, log, argument or environment; on the way it is a value that prints as "***"
// and that is wiped after its use.
package secrets

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
)

// Secret is a declared secret with its one source: File, Credential, Generate or Stdin.
type Secret struct {
	VM   string // whose it is, for messages
	Name string
	File string // absolute path of a file on the host
	// Credential is the name of a file in Credentials, where a service manager put it. Credentials is empty where none
	// did. Awaited: one will, before the VM starts, so that there is nothing to look at yet.
	Credential  string
	Credentials string // absolute
	Awaited     bool

	Generate int  // bytes of entropy; kept, and the same at every start
	Stdin    bool // what Set kept
	UID, GID int  // who may read it in the guest
	Mode     os.FileMode
}

// Limits of what a secret may be.
const (
	MaxSize     = 1 << 20 // bytes; a key, a certificate or a credentials file has some KiB
	MinGenerate = 16      // bytes: 128 bits
	MaxGenerate = 1024
	maxName     = 64
)

// namePattern leaves no way to another directory, and no hidden file: those are the ones that Write is at work on.
var namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*$`)

func checkName(name string) error {
	if len(name) > maxName || !namePattern.MatchString(name) {
		return fmt.Errorf("%q is no name for a secret: a letter or digit, then letters, digits, ., _ and -, %d at most", name[:min(len(name), maxName)], maxName)
	}
	return nil
}

// Value is what a secret holds. It prints as "***".
type Value struct {
	bytes []byte
}

const hidden = "***"

// String is always "***".
func (Value) String() string { return hidden }

// GoString is always "***".
func (Value) GoString() string { return hidden }

// Format prints "***" for every verb.
func (Value) Format(f fmt.State, _ rune) {
	if _, err := f.Write([]byte(hidden)); err != nil {
		return // fmt keeps the error of its writer itself
	}
}

// MarshalJSON is always "***".
func (Value) MarshalJSON() ([]byte, error) { return []byte(`"` + hidden + `"`), nil }

// MarshalText is always "***".
func (Value) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// wipe overwrites the value. It can't reach copies that the kernel holds.
func (v *Value) wipe() {
	if v != nil {
		clear(v.bytes[:cap(v.bytes)])
		v.bytes = nil
	}
}

// Directories below the VM's own, with the values that nobody else keeps.
const (
	generatedDir = "generated"
	stdinDir     = "stdin"
)

// source is the path of the file that the secret is read from.
func (s Secret) Source(keep string) string {
	switch {
	case s.File != "":
		return s.File
	case s.Credential != "":
		return filepath.Join(s.Credentials, s.Credential)
	case s.Generate > 0:
		return filepath.Join(keep, generatedDir, s.Name)
	default:
		return filepath.Join(keep, stdinDir, s.Name)
	}
}

// describe is the source as a person declared it.
func (s Secret) describe() string {
	switch {
	case s.File != "":
		return s.File
	case s.Credential != "":
		return "credential " + s.Credential
	case s.Generate > 0:
		return fmt.Sprintf("generated, %d bytes", s.Generate)
	default:
		return "standard input"
	}
}

// check refuses a secret that no declaration makes.
func (s Secret) check() error {
	if err := checkName(s.Name); err != nil {
		return err
	}
	sources := 0
	for _, there := range []bool{s.File != "", s.Credential != "", s.Generate != 0, s.Stdin} {
		if there {
			sources++
		}
	}
	switch {
	case sources != 1:
		return fmt.Errorf("cannot use secret %s: it has %d sources: one of file, credential, generate and stdin", s.Name, sources)
	case s.File != "" && !filepath.IsAbs(s.File):
		return fmt.Errorf("cannot use secret %s: %s isn't an absolute path", s.Name, s.File)
	case s.Credential != "" && s.Credentials == "" && !s.Awaited:
		return fmt.Errorf("cannot use secret %s: %w: systemd gives them to the unit clawvm@%s, and this is no start of it; start the VM by systemd, or declare another source", s.Name, ErrNoCredentials, s.VM)
	case s.Generate != 0 && (s.Generate < MinGenerate || s.Generate > MaxGenerate):
		return fmt.Errorf("cannot use secret %s: %d bytes of entropy: from %d to %d", s.Name, s.Generate, MinGenerate, MaxGenerate)
	}
	return nil
}
