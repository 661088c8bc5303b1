package gate

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/guest/agent"
)

// Message is what supervisor and gate tell each other, one a packet, as JSON of
// at most [messageMax] bytes.
type Message struct {
	Kind Kind `json:"kind"`
	// Code is the workload's exit code, of WorkloadEnded and Ending.
	Code int `json:"code,omitempty"`
	// Again says of WorkloadEnded that the workload is started once more.
	Again bool `json:"again,omitempty"`
	// Cause is what ended the workload, of WorkloadEnded: one of the Cause
	// constants, or nothing when it ended by itself.
	Cause string `json:"cause,omitempty"`
	// Failures counts the health checks that failed in a row, of Checked;
	// Unhealthy says that they are too many.
	Failures  int  `json:"failures,omitempty"`
	Unhealthy bool `json:"unhealthy,omitempty"`
	// Detail is text for the owner; from the gate it is bounded and printable.
	Detail string `json:"detail,omitempty"`
	// Grace is how long, in milliseconds, Shutdown may take.
	Grace int64 `json:"grace,omitempty"`
	// Port is Publish's and Unpublish's.
	Port *Forward `json:"port,omitempty"`
	// Pin is Pin's and Pinned's.
	Pin *PinRequest `json:"pin,omitempty"`
}

// PinRequest asks for addresses of a name to be reached for a time, or answers that
// by its ID.
type PinRequest struct {
	ID        uint64       `json:"id"`
	Name      string       `json:"name,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Seconds   int          `json:"seconds,omitempty"`
}

// Kind is what a message is about.
type Kind string

// What the gate says.
const (
	Connected     Kind = "connected"      // the guest's agent is there
	Progress      Kind = "progress"       // Detail: how far the guest is
	Ready         Kind = "ready"          // the workload answers
	WorkloadEnded Kind = "workload-ended" // and is started again, or not: Detail
	Checked       Kind = "checked"        // the workload's health; Detail: the wrong answer
	Ending        Kind = "ending"         // the guest is about to end; Detail is one of the End constants
	Lost          Kind = "lost"           // the agent's connection broke
	Answers       Kind = "answers"        // the guest's agent did just now; while the VM is not paused, every AnswersEvery
	Pin           Kind = "pin"            // by FilePins alone: let the VM reach addresses of a name
	ClockSet      Kind = "clock-set"      // the answer to Resumed; Detail is why the clock could not be set
)

// What the supervisor says.
const (
	Shutdown Kind = "shutdown" // ask the guest to end within Grace
	// Publish a port: Port says which, and the message carries its listening socket;
	// without one, a published port leads elsewhere.
	Publish   Kind = "publish"
	Unpublish Kind = "unpublish" // end Port, and its connections
	// Resolve: answer queries, and explain refusals, by the Naming in the file that the message carries.
	Resolve Kind = "resolve"
	Pinned  Kind = "pinned"  // by FilePins alone: a Pin is done, or Detail is why not
	Paused  Kind = "paused"  // the VM stands still: nobody can be let in
	Resumed Kind = "resumed" // it goes on: set its clock
)

// Why a guest ends, as Ending's Detail.
const (
	EndPowerOff = "poweroff"
	EndReboot   = "reboot"
	EndWorkload = "workload" // it ended, for good
	EndFailed   = "failed"   // the guest could not be set up
)

// What ended a workload, as WorkloadEnded's Cause.
const (
	CauseMemory = agent.CauseMemory // the guest's kernel killed it for want of memory
	CauseHealth = agent.CauseHealth // its health check failed, and it was stopped for that
)

const (
	messageMax = 4096
	detailMax  = 512
)

// Pair makes the two ends of the connection between supervisor and gate.
func Pair() (supervisor *Conn, gate *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make the gate's connection: %w", err)
	}
	gate = os.NewFile(uintptr(fds[1]), "gate")
	supervisor, err = Open(os.NewFile(uintptr(fds[0]), "supervisor"))
	if err != nil {
		return nil, nil, errors.Join(err, gate.Close())
	}
	return supervisor, gate, nil
}

// Conn is an end of the connection between supervisor and gate.
type Conn struct {
	conn *net.UnixConn
	mu   sync.Mutex // held while sending
	buf  [messageMax + 1]byte
}

// Open makes a Conn of a descriptor, which it closes.
func Open(f *os.File) (*Conn, error) {
	c, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("cannot use the connection between supervisor and gate: %w", err)
	}
	return &Conn{conn: c.(*net.UnixConn)}, nil
}

// Send sends m. It may be called by several at once.
func (c *Conn) Send(m Message) error { return c.SendFile(m, nil) }

// SendFile sends m, and with it a descriptor of file, which stays the caller's;
// nil is none.
func (c *Conn) SendFile(m Message, file *os.File) error {
	m.Detail = Printable(m.Detail, detailMax)
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if file == nil {
		_, err = c.conn.Write(b)
	} else {
		_, _, err = c.conn.WriteMsgUnix(b, unix.UnixRights(int(file.Fd())), nil)
	}
	if errors.Is(err, syscall.EPIPE) {
		return errPeerGone
	}
	return err
}

// errPeerGone is Send's error when the other side has ended.
var errPeerGone = errors.New("the other side of the connection between supervisor and gate has ended")

// Receive waits for a message. Only one may wait. io.EOF says that the other
// side has ended; a message that is none is an error. A descriptor that comes with
// it is closed.
func (c *Conn) Receive() (Message, error) {
	// Without room for it, the kernel closes it.
	n, err := c.conn.Read(c.buf[:])
	return c.decode(n, err)
}

// ReceiveFile is Receive for who takes a descriptor with a message; the file is
// nil when there was none, and the caller's to close.
func (c *Conn) ReceiveFile() (Message, *os.File, error) {
	room := make([]byte, unix.CmsgSpace(4))
	n, got, _, _, err := c.conn.ReadMsgUnix(c.buf[:], room)
	if err == nil && n == 0 {
		err = io.EOF
	}
	var file *os.File
	if err == nil && got > 0 {
		file, err = descriptor(room[:got])
	}
	m, err := c.decode(n, err)
	if err != nil && file != nil {
		err = errors.Join(err, file.Close())
		file = nil
	}
	return m, file, err
}

// descriptor is the one that a control message holds.
func descriptor(control []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // another kind
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			return os.NewFile(uintptr(fd), "passed"), nil
		}
	}
	return nil, nil
}

func (c *Conn) decode(n int, err error) (Message, error) {
	switch {
	case errors.Is(err, net.ErrClosed), errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), err == nil && n == 0:
		return Message{}, io.EOF
	case err != nil:
		return Message{}, err
	case n > messageMax:
		return Message{}, fmt.Errorf("a message is longer than %d bytes", messageMax)
	}
	var m Message
	if err := json.Unmarshal(c.buf[:n], &m); err != nil {
		return Message{}, fmt.Errorf("a message is not understood: %w", err)
	}
	m.Detail = Printable(m.Detail, detailMax)
	return m, nil
}

// Close ends the connection; the other side receives io.EOF.
func (c *Conn) Close() error { return c.conn.Close() }

// Printable is s without control characters and what is no text, cut to max
// bytes: what a guest made may go to a terminal.
func Printable(s string, max int) string {
	out := make([]rune, 0, min(len(s), max))
	size := 0
	for _, r := range s {
		if r == '\t' {
			r = ' '
		}
		if r == unicode.ReplacementChar || unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			r = '?'
		}
		if size += len(string(r)); size > max {
			break
		}
		out = append(out, r)
	}
	return string(out)
}
