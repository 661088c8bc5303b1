package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/clawvm/clawvm/internal/durable"
)

// The exit codes of clawvm. Those of exec are the program's own, as docker's are.
const (
	ExitOK          = 0
	ExitFailed      = 1   // what was asked for did not work
	ExitUsage       = 2   // the command line is wrong
	ExitNotRunning  = 3   // the VM is down (systemctl status says it so)
	ExitNoSuchVM    = 4   // nothing declares the VM (as systemctl status)
	ExitWarnings    = 10  // doctor found nothing worse than warnings
	ExitCrashLoop   = 75  // the VM failed again and again, and is not started any more (EX_TEMPFAIL)
	ExitNoPerm      = 77  // not root (EX_NOPERM)
	ExitDeclaration = 78  // the declaration, or what it names, is wrong: starting again does not help (EX_CONFIG)
	ExitForGood     = 79  // run, under a service manager: the VM ended, and its restart policy does not start it again
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

// coded gives err an exit code, unless it has one. What the host has run out of is
// no fault of a declaration, whatever step found it: starting again may help.
func coded(code int, err error) error {
	var have *CodedError
	if err == nil || errors.As(err, &have) {
		return err
	}
	if code == ExitDeclaration && exhausted(err) {
		code = ExitFailed
	}
	return &CodedError{code, err}
}

// exhausted says whether err is about what a host can run out of for a time: room
// on a disk, memory, descriptors, processes; or a disk that was made read-only.
func exhausted(err error) bool {
	for _, e := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.EAGAIN, syscall.EROFS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
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

// EndKind is why a VM, or one life of it, ended, for machines. What is recorded by
// another version may be a kind that is not among these, or none.
type EndKind string

// The kinds of ends.
const (
	EndByOwner     EndKind = "owner"             // asked for: down, SIGTERM
	EndPowerOff    EndKind = "poweroff"          // by the guest
	EndReboot      EndKind = "reboot"            // by the guest; the next life follows
	EndWorkload    EndKind = "workload"          // the workload ended, and its policy does not start it again
	EndOutOfMemory EndKind = "out-of-memory"     // so it did, killed by the guest's kernel for want of memory
	EndUnhealthy   EndKind = "unhealthy"         // so it did, stopped because its health check failed
	EndPanic       EndKind = "panic"             // the guest's kernel
	EndGuestSetup  EndKind = "guest-setup"       // the guest's init could not set it up
	EndAgent       EndKind = "agent-lost"        // the guest's init was not heard of any more
	EndVMM         EndKind = "vmm-failed"        // the VMM ended by itself
	EndVMMKilled   EndKind = "vmm-killed"        // somebody, or the host's kernel for want of memory, killed the VMM
	EndShare       EndKind = "share-lost"        // a virtiofsd ended
	EndGate        EndKind = "gate-lost"         // the gate ended
	EndNotReady    EndKind = "not-ready"         // the guest or its workload was not ready in time
	EndDeclaration EndKind = "declaration"       // it is wrong, or what it names
	EndHost        EndKind = "host"              // a step of the start or of the way down failed on the host
	EndSupervisor  EndKind = "supervisor-killed" // the supervisor ended without a word; or the host did
)

// End is how a VM ended, kept for `ls` and `status` until the next start.
type End struct {
	Time time.Time `json:"time"`
	// Started is when its supervisor started, which tells this end from an
	// earlier one's; zero in what an older clawvm wrote.
	Started time.Time `json:"started,omitzero"`
	Kind    EndKind   `json:"kind,omitempty"`
	// Reason is a sentence without a stop; empty for an end that was asked for.
	Reason string `json:"reason,omitempty"`
	Code   int    `json:"code"`
	// Left: something could not be taken down, which the reason names.
	Left bool `json:"left,omitempty"`
	// Faults are the last ones that the supervisor saw, oldest first, this end
	// included where it is one.
	Faults []Fault `json:"faults,omitempty"`
	// CrashLoop: the start limit was reached, and so it is not started again.
	CrashLoop bool `json:"crashLoop,omitempty"`
}

// leftError is the error of an end that left something behind.
type leftError struct{ error }

func (e leftError) Unwrap() error { return e.error }

// LastEnd is how the VM ended last; nil when no end is recorded.
func LastEnd(l Layout, name string) (*End, error) { return readEnd(l.VM(name).LastEnd()) }

// Since says whether e was recorded after before was read; either may be nil. It
// looks at no clock, which may have been set in between.
func (e *End) Since(before *End) bool {
	return e != nil && (before == nil || !e.Time.Equal(before.Time))
}

// endOf is how the supervisor with this status ended; nil when it ended without
// a word, because it was killed or could not write.
func endOf(l Layout, st Status) (*End, error) {
	e, err := readEnd(l.VM(st.Name).LastEnd())
	if err != nil || e == nil || !e.Started.IsZero() && !e.Started.Equal(st.Started) || e.Kind == EndSupervisor {
		return nil, err
	}
	return e, nil
}

// String is the end in one line: when, the kind, the exit code, why.
func (e *End) String() string {
	kind := ""
	if e.Kind != "" {
		kind = " " + string(e.Kind) + ","
	}
	return fmt.Sprintf("%s%s exit code %d: %s", e.Time.Local().Format(time.DateTime), kind, e.Code, e.why())
}

// Failed says whether the VM ended otherwise than it should.
func (e *End) Failed() bool { return e != nil && e.Code != 0 }

func writeEnd(file string, e End) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("cannot keep how the VM ended: %w", err)
	}
	if err := durable.WriteFile(file, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("cannot keep how the VM ended: %w", err)
	}
	return nil
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
