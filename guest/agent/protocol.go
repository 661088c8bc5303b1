// Package agent is the conversation between a host and its guest, all three ends of it: the guest's (Server), the host's
// (Client, which runs in the VM's unprivileged gate) and the command line's (Exec, which reaches the guest through the gate).
//
// The guest opens one byte stream: a virtio-serial port, or a vsock connection. Over it runs yamux, whose streams the host alone
// opens, and over each stream HTTP/1.1: the guest serves, the host asks. A guest is hostile to its host: whatever it sends is
// bounded in size, and a lie is an error of the Client, never a panic or memory without an end.
package agent

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/clawvm/clawvm/guest"
)

// ProtocolVersion is the version of the endpoints below; both ends must speak the same.
const ProtocolVersion = 1

// The endpoints of a guest.
const (
	pathHello    = "/v1/hello"    // GET: Hello
	pathPing     = "/v1/ping"     // GET: 204
	pathEvents   = "/v1/events"   // GET: Events as JSON lines, the present state first, then as they come
	pathLog      = "/v1/log"      // GET: frames of what the workload wrote, from the oldest that is kept, then as it comes
	pathExec     = "/v1/exec"     // POST, upgraded: frames both ways
	pathClock    = "/v1/clock"    // POST: clockRequest
	pathShutdown = "/v1/shutdown" // POST: shutdownRequest
)

// execUpgrade is the protocol that a connection to pathExec is upgraded to.
const execUpgrade = "clawvm-exec/1"

// Bounds on what the other end may send.
const (
	maxHeader  = 16 << 10 // bytes of a request's or answer's header
	maxAnswer  = 64 << 10 // bytes of an answer's body that isn't a stream
	maxLine    = 16 << 10 // bytes of an event's line
	maxText    = 1 << 10  // bytes of a text in a hello or event
	maxRequest = 4 << 20  // bytes of an exec request: the kernel takes about 2 MiB of arguments and environment
)

// Hello is a guest's introduction.
type Hello struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"` // of the init, as its build says
	Name     string `json:"name"`    // the VM's name by its boot document
	Boot     string `json:"boot"`    // the kernel's boot id: another one means that the guest was restarted
	Kernel   string `json:"kernel"`  // its release
}

func (h *Hello) check() error {
	if h.Protocol != ProtocolVersion {
		return fmt.Errorf("the guest's agent speaks version %d, this host version %d: restart the VM", h.Protocol, ProtocolVersion)
	}
	h.Version, h.Name, h.Boot, h.Kernel = clean(h.Version), clean(h.Name), clean(h.Boot), clean(h.Kernel)
	return nil
}

// EventKind says what happened in a guest.
type EventKind string

// The kinds of events.
const (
	WorkloadStarted EventKind = "workload-started" // the workload's program runs
	Ready           EventKind = "ready"            // it is ready, by the declaration's probe
	NotReady        EventKind = "not-ready"        // the probe's time limit has passed; Detail is the last answer. The probe goes on
	WorkloadExited  EventKind = "workload-exited"  // it ended, or could not be started: Code, Signal, Detail; Next says when it is started again
	HealthChecked   EventKind = "health-checked"   // a look at a workload that was ready: Failures in a row, Unhealthy, Detail. Of looks that find it well only the first of a row is told
	Ending          EventKind = "ending"           // the guest is about to end: Reason, Code
)

// Reasons of an Ending.
const (
	ReasonPowerOff = "poweroff"      // asked for, by the host or inside the guest
	ReasonReboot   = "reboot"        // asked for inside the guest
	ReasonExit     = "workload-exit" // the workload ended and isn't to be started again; Code is its exit code
	ReasonFailed   = "failed"        // the guest could not be set up; Detail says why
)

// Causes of a WorkloadExited, beside the workload itself.
const (
	CauseMemory = "out-of-memory" // the guest's kernel killed it for want of memory
	CauseHealth = "unhealthy"     // it was stopped because it was unhealthy
)

// Event is one thing that happened in a guest.
type Event struct {
	Kind     EventKind `json:"kind"`
	Uptime   float64   `json:"uptime"`             // seconds since the guest's kernel started, by the guest's clock
	Code     int       `json:"code,omitempty"`     // exit code, 128+n for signal n
	Signal   int       `json:"signal,omitempty"`   // the signal that ended it, 0: none
	Restarts int       `json:"restarts,omitempty"` // how often it has been started again since the guest's start
	Next     float64   `json:"next,omitempty"`     // seconds until it is started again
	Final    bool      `json:"final,omitempty"`    // it isn't started again
	Reason   string    `json:"reason,omitempty"`
	Cause    string    `json:"cause,omitempty"`  // of a WorkloadExited
	Detail   string    `json:"detail,omitempty"` // from the guest; without control characters

	Failures  int  `json:"failures,omitempty"`  // of a HealthChecked: in a row, 0 when it is well
	Unhealthy bool `json:"unhealthy,omitempty"` // so many that the workload counts as unhealthy
}

// check refuses what no honest guest says, and makes the rest fit to be shown.
func (e *Event) check() error {
	switch e.Kind {
	case WorkloadStarted, Ready, NotReady, HealthChecked:
	case WorkloadExited:
		switch e.Cause {
		case "", CauseMemory, CauseHealth:
		default:
			return fmt.Errorf("an unknown cause %q", clean(e.Cause))
		}
	case Ending:
		switch e.Reason {
		case ReasonPowerOff, ReasonReboot, ReasonExit, ReasonFailed:
		default:
			return fmt.Errorf("an unknown reason %q", clean(e.Reason))
		}
	default:
		return fmt.Errorf("an unknown event %q", clean(string(e.Kind)))
	}
	if e.Code < 0 || e.Code > 255 || e.Signal < 0 || e.Signal > 64 || e.Restarts < 0 || e.Next < 0 || e.Next > 3600 || e.Uptime < 0 || e.Failures < 0 || e.Failures > maxFailures {
		return fmt.Errorf("impossible numbers in a %s event", e.Kind)
	}
	e.Reason, e.Detail = clean(e.Reason), clean(e.Detail)
	return nil
}

// maxFailures bounds the failures that an honest guest can count: one a second, for a century.
const maxFailures = 100 * 366 * 24 * 60 * 60

// clean bounds a text of the other end and takes out what a terminal would act on.
func clean(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
		for len(s) > 0 && !utf8.ValidString(s[len(s)-1:]) { // not in the middle of a letter
			s = s[:len(s)-1]
		}
	}
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// ExecRequest is a command to run in a guest.
type ExecRequest struct {
	Argv []string          `json:"argv"`           // Argv[0] without a slash is looked for on the guest's PATH
	Env  map[string]string `json:"env,omitempty"`  // over the workload's environment
	User string            `json:"user,omitempty"` // name, uid, name:group or uid:gid; "": the workload's (root's with Root)
	Cwd  string            `json:"cwd,omitempty"`  // "": the workload's
	Root bool              `json:"root,omitempty"` // as root of the guest, outside the workload's sandbox
	TTY  bool              `json:"tty,omitempty"`  // on a terminal of its own, of Rows times Columns
	Rows uint16            `json:"rows,omitempty"`
	Cols uint16            `json:"cols,omitempty"`
	Copy *CopyRequest      `json:"copy,omitempty"` // instead of Argv: carry files, as the command would be run
}

// CopyRequest asks for files of a guest, as a tar stream on the command's output, or for files to be made of one that is its input.
type CopyRequest struct {
	Path   string `json:"path"`             // absolute; what to send, or where to put it, as package tree does
	Into   bool   `json:"into,omitempty"`   // into the guest
	Name   string `json:"name,omitempty"`   // with Into: the name of the stream's top; "": a stream with any names
	Follow bool   `json:"follow,omitempty"` // without Into: send what a symbolic link leads to
	Owners bool   `json:"owners,omitempty"` // with Into: owners and special bits as in the stream
}

// CopyIncomplete is the exit code of a copy out of a guest that left out, or could not read all of, what its standard error names.
const CopyIncomplete = 2

func (r *ExecRequest) check() error {
	if r.Copy != nil {
		if len(r.Argv) > 0 || r.TTY {
			return errors.New("cannot copy: a copy has neither arguments nor a terminal")
		}
		if err := guest.CheckCommand([]string{r.Copy.Path, r.Copy.Name}, r.Env, r.User, r.Cwd); err != nil {
			return fmt.Errorf("cannot copy: %w", err)
		}
		if !strings.HasPrefix(r.Copy.Path, "/") {
			return fmt.Errorf("cannot copy: %q isn't an absolute path", clean(r.Copy.Path))
		}
		return nil
	}
	if err := guest.CheckCommand(r.Argv, r.Env, r.User, r.Cwd); err != nil {
		return fmt.Errorf("cannot run the command: %w", err)
	}
	return nil
}

type clockRequest struct {
	Time time.Time `json:"time"`
}

type shutdownRequest struct {
	Grace float64 `json:"grace"` // seconds for the workload to end; 0: as the boot document says
}
