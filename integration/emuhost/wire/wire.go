// Package wire is what a test and the emulated host say to each other over a virtio-serial port: a smux session in
// which every stream runs one command. A stream begins with the test's Request as one frame; after it frames go
// both ways until the host's Exit, which is the last one.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/xtaci/smux"
)

// PortName is the virtio-serial port's name in the host.
const PortName = "emuhost"

// Hello is what the host says first, before the session begins: it runs, and the port is open.
const Hello = "emuhost ready\n"

// maxFrame is the largest payload of a frame: a pipe's worth, so that one stream doesn't hold up the others.
const maxFrame = 64 << 10

// Kind says what a frame carries.
type Kind byte

// The kinds of frames.
const (
	Start  Kind = iota + 1 // a Request, as JSON
	Stdin                  // standard input; empty: its end
	Stdout                 // standard output
	Stderr                 // standard error
	Exited                 // an Exit, as JSON
)

// Request is a command to run.
type Request struct {
	Argv []string
	Dir  string   // "" is /root
	Env  []string // further variables, over PATH, HOME and LANG
}

// Exit is how a command ended.
type Exit struct {
	Code  int    // 128 + the signal's number when a signal ended it
	Error string // why it could not be started, or ""
}

// Config is the session's: no keep-alive, because an emulated host can be silent for long, and stream
// buffers (protocol version 2) so that a command whose output nobody reads blocks only itself.
func Config() *smux.Config {
	c := smux.DefaultConfig()
	c.Version = 2
	c.KeepAliveDisabled = true
	c.MaxReceiveBuffer = 8 << 20
	c.MaxStreamBuffer = 1 << 20
	return c
}

// Write writes one frame. Callers on the same stream take turns.
func Write(w io.Writer, kind Kind, payload []byte) error {
	if len(payload) > maxFrame {
		return fmt.Errorf("frame of %d bytes, at most %d", len(payload), maxFrame)
	}
	frame := make([]byte, 5, 5+len(payload))
	frame[0] = byte(kind)
	binary.BigEndian.PutUint32(frame[1:], uint32(len(payload)))
	_, err := w.Write(append(frame, payload...))
	return err
}

// WriteJSON writes one frame that holds v.
func WriteJSON(w io.Writer, kind Kind, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return Write(w, kind, b)
}

// Read reads one frame.
func Read(r io.Reader) (Kind, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("frame of %d bytes, at most %d", n, maxFrame)
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return Kind(head[0]), payload, nil
}

// Copy sends all of r as frames of one kind; it ends at r's end.
func Copy(send func(Kind, []byte) error, kind Kind, r io.Reader) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if werr := send(kind, buf[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
