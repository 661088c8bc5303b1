package agent

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
)

// frameKind is the first byte of a frame on an exec connection or in a log.
type frameKind byte

const (
	frameStdin  frameKind = 1 + iota // to the guest: input, never more than its credit
	frameStdout                      // to the host
	frameStderr                      // to the host
	frameResize                      // to the guest: rows, columns; two bytes each
	frameSignal                      // to the guest: the number, one byte
	frameExit                        // to the host: the exit code, one byte; the last frame
	frameEOF                         // to the guest: no more input
	frameCredit                      // to the host: so many bytes of input were taken, four bytes
	frameLost                        // to the host, in a log: so many bytes are no longer kept, eight bytes
)

// maxFrame bounds a frame's payload in bytes: one read of a pipe.
const maxFrame = 32 << 10

// stdinCredit is how many bytes of input may be on their way to a program that doesn't read them. More of it stays with the
// sender, so that signals and window sizes are never stuck behind input.
const stdinCredit = 64 << 10

// frameHeader is kind and length: 1 + 4 bytes, big endian.
const frameHeader = 5

type frame struct {
	kind    frameKind
	payload []byte
}

// fixedPayload holds the exact payload lengths of the frames that have one.
var fixedPayload = map[frameKind]int{frameResize: 4, frameSignal: 1, frameExit: 1, frameEOF: 0, frameCredit: 4, frameLost: 8}

// readFrame reads one frame into buf, which must hold maxFrame bytes; the payload is valid until the next call. io.EOF means that
// the other end closed between two frames.
func readFrame(r io.Reader, buf []byte) (frame, error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return frame{}, err
	}
	f := frame{kind: frameKind(h[0])}
	n := binary.BigEndian.Uint32(h[1:])
	if f.kind < frameStdin || f.kind > frameLost {
		return frame{}, fmt.Errorf("a frame of unknown kind %d", h[0])
	}
	if n > maxFrame {
		return frame{}, fmt.Errorf("a frame of %d bytes, at most %d are allowed", n, maxFrame)
	}
	if want, ok := fixedPayload[f.kind]; ok && int(n) != want {
		return frame{}, fmt.Errorf("a frame of kind %d with %d bytes instead of %d", f.kind, n, want)
	}
	f.payload = buf[:n]
	if _, err := io.ReadFull(r, f.payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	return f, nil
}

// appendFrame appends a frame's bytes to b.
func appendFrame(b []byte, kind frameKind, payload []byte) []byte {
	b = append(b, byte(kind))
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// frameWriter writes whole frames, from any goroutine.
type frameWriter struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

// write sends payload as one frame, or as several when it is long.
func (w *frameWriter) write(kind frameKind, payload []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for first := true; first || len(payload) > 0; first = false {
		n := min(len(payload), maxFrame)
		w.buf = appendFrame(w.buf[:0], kind, payload[:n])
		if _, err := w.w.Write(w.buf); err != nil {
			return err
		}
		payload = payload[n:]
	}
	return nil
}
