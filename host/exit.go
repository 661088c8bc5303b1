package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// The exit codes of clawvm. Those of exec are the program's own, as docker's are.
const (
	ExitOK          = 0
	ExitFailed      = 1   // what was asked for did not work
	ExitUsage       = 2   // the command line is wrong
	ExitNotRunning  = 3   // the VM is down (systemctl status says it so)
	ExitNoSuchVM    = 4   // nothing declares the VM (as systemctl status)
	ExitNoPerm      = 77  // not root (EX_NOPERM)
	ExitDeclaration = 78  // the declaration, or what it names, is wrong: starting again does not help (EX_CONFIG)
	ExitTimeout     = 124 // not ready in time (as timeout(1))
	ExitExec        = 125 // clawvm exec itself failed, and not the program (as docker)
)

// CodedError is an error with the exit code that the command ends with.
type CodedError struct {
	Code int
	Err  error
}

func (e *CodedError) Error() string { return e.Err.Error() }
func (e *CodedError) Unwrap() error { return e.Err }

// coded gives err an exit code, unless it has one.
func coded(code int, err error) error {
	var have *CodedError
	if err == nil || errors.As(err, &have) {
		return err
	}
	return &CodedError{code, err}
}

// ExitCode is the exit code that err stands for.
func ExitCode(err error) int {
	var c *CodedError
	var missing *NotDeclaredError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &c):
		return c.Code
	case errors.As(err, &missing):
		return ExitNoSuchVM
	}
	return ExitFailed
}

// End is how a VM ended, kept for `ls` and `status` until the next start.
type End struct {
	Time time.Time `json:"time"`
	// Reason is a sentence without a stop; empty for an end that was asked for.
	Reason string `json:"reason,omitempty"`
	Code   int    `json:"code"`
}

// Failed says whether the VM ended otherwise than it should.
func (e *End) Failed() bool { return e != nil && e.Code != 0 }

func writeEnd(file string, e End) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return writeAtomic(file, append(b, '\n'), 0o600)
}

// readEnd returns nil when no end is recorded.
func readEnd(file string) (*End, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read how the VM ended: %w", err)
	}
	var e End
	if err := json.Unmarshal(b, &e); err != nil {
		return nil, fmt.Errorf("cannot read how the VM ended: %s: %w", file, err)
	}
	return &e, nil
}

// writeAtomic replaces file so that after a crash it holds the old content or the
// new one: temporary file, fsync, rename, fsync of the directory.
func writeAtomic(file string, content []byte, mode os.FileMode) (err error) {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(file)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	_, werr := tmp.Write(content)
	if err := errors.Join(werr, tmp.Chmod(mode), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil // renamed: only the durability of the name is not known
	}
	return errors.Join(d.Sync(), d.Close())
}
