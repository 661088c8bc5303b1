package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"time"
)

// A virtio-serial port is a byte stream without connections: what an earlier reader or writer left in it is still there, and
// neither end sees the other come and go. So the two find each other by a handshake before the multiplexer starts:
//
//	host:  a pad of 0xFF, as long as the longest write of a multiplexer, which ends an earlier session of the guest
//	host:  SYNC token, every syncInterval until it is acknowledged
//	guest: ACK token, once for each new token; anything else is skipped
//	host:  GO token; then both start the multiplexer

// syncMagic starts each message of the handshake. Its first byte occurs nowhere else in it, which makes searching for it simple,
// and is no version of the multiplexer's protocol.
var syncMagic = []byte("\xfeclawvm\x01")

const (
	syncMark byte = 'S'
	syncAck  byte = 'A'
	syncGo   byte = 'G'
)

type syncToken [16]byte

// syncInterval is the time between two marks. About 110 ms of it were seen until a multiplexer ran.
const syncInterval = 100 * time.Millisecond

// maxNoise bounds what the host skips, in bytes, while it waits for an acknowledgement: the rest of a session that it wasn't in.
const maxNoise = 16 << 20

// padSize is longer than any single write of the host's multiplexer: header and payload.
const padSize = maxWrite + muxHeader

func syncMessage(kind byte, t syncToken) []byte {
	return append(append(bytes.Clone(syncMagic), kind), t[:]...)
}

// nextSync skips up to limit bytes (0: any number) until a message of the handshake and returns it.
func nextSync(r io.ByteReader, limit int) (kind byte, t syncToken, err error) {
	matched := 0
	for n := 0; ; n++ {
		if limit > 0 && n > limit {
			return 0, t, fmt.Errorf("%d bytes and no handshake in them", n)
		}
		b, err := r.ReadByte()
		if err != nil {
			return 0, t, err
		}
		switch {
		case b == syncMagic[matched]:
			matched++
		case b == syncMagic[0]:
			matched = 1
		default:
			matched = 0
		}
		if matched < len(syncMagic) {
			continue
		}
		if kind, err = r.ReadByte(); err != nil {
			return 0, t, err
		}
		for i := range t {
			if t[i], err = r.ReadByte(); err != nil {
				return 0, t, err
			}
		}
		return kind, t, nil
	}
}

// syncHost makes the guest on the other end of f start a new session. It ends with the context, by closing f.
func syncHost(ctx context.Context, f io.ReadWriteCloser) (err error) {
	var token syncToken
	if _, err := rand.Read(token[:]); err != nil {
		return err
	}
	defer func() {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}()
	stopClose := context.AfterFunc(ctx, func() { closeQuietly(f) })
	defer stopClose()

	acked := make(chan struct{})
	written := make(chan error, 1)
	go func() { written <- writeMarks(f, token, acked) }()
	marks, ok := f.(io.ByteReader)
	if !ok {
		marks = byteReader{f}
	}
	readErr := waitAck(marks, token)
	close(acked)
	if readErr != nil {
		closeQuietly(f) // a mark may be stuck in a pipe that nobody reads
	}
	if err := errors.Join(readErr, <-written); err != nil {
		return err
	}
	if _, err = f.Write(syncMessage(syncGo, token)); err != nil {
		return err
	}
	if !stopClose() {
		return context.Cause(ctx)
	}
	return nil
}

// closeQuietly closes what is given up; the error that made us do so is the one to report.
func closeQuietly(c io.Closer) {
	if err := c.Close(); err != nil {
		return
	}
}

func writeMarks(w io.Writer, token syncToken, acked <-chan struct{}) error {
	if _, err := w.Write(bytes.Repeat([]byte{0xFF}, padSize)); err != nil {
		return err
	}
	mark := syncMessage(syncMark, token)
	tick := time.NewTicker(syncInterval)
	defer tick.Stop()
	for {
		if _, err := w.Write(mark); err != nil {
			return err
		}
		select {
		case <-acked:
			return nil
		case <-tick.C:
		}
	}
}

func waitAck(r io.ByteReader, token syncToken) error {
	for {
		kind, t, err := nextSync(r, maxNoise)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		if kind == syncAck && t == token {
			return nil
		}
	}
}

// byteReader reads single bytes, no more than asked for: what follows the handshake belongs to the multiplexer.
type byteReader struct{ r io.Reader }

func (b byteReader) ReadByte() (byte, error) {
	var one [1]byte
	_, err := io.ReadFull(b.r, one[:])
	return one[0], err
}

// syncGuest waits until a host has started a session on the port.
func syncGuest(r io.ByteReader, w io.Writer) error {
	var acked syncToken
	for {
		kind, t, err := nextSync(r, 0)
		if err != nil {
			return err
		}
		switch {
		case kind == syncMark && t != acked:
			if _, err := w.Write(syncMessage(syncAck, t)); err != nil {
				return err
			}
			acked = t
		case kind == syncGo && t == acked:
			return nil
		}
	}
}
