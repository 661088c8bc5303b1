package emuhost

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// The network block device protocol, as much of it as QEMU needs: "fixed newstyle" negotiation, simple replies
// (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
const (
	nbdMagic       = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOption      = 0x49484156454f5054 // "IHAVEOPT"
	nbdOptionReply = 0x0003e889045565a9
	nbdRequest     = 0x25609513
	nbdReply       = 0x67446698

	nbdFixedNewstyle = 1 << 0 // of both handshake flags
	nbdNoZeroes      = 1 << 1

	nbdOptAbort = 2
	nbdOptGo    = 7
	nbdAck      = 1
	nbdInfo     = 3
	nbdUnknown  = 1<<31 | 1

	nbdExport    = 0      // what an nbdInfo is about
	nbdHasFlags  = 1 << 0 // of an export
	nbdSendFlush = 1 << 2

	nbdRead       = 0
	nbdWrite      = 1
	nbdDisconnect = 2
	nbdFlush      = 3
	nbdEIO        = 5
	nbdEINVAL     = 22

	// nbdMost is the most bytes of a request, which is QEMU's own limit.
	nbdMost = 32 << 20
)

// block is what an NBD client reads and writes.
type block interface {
	readAt(p []byte, off int64) error
	writeAt(p []byte, off int64) error
	flush() error
}

// serveNBD is the server of one client, and returns when that hangs up.
func serveNBD(conn net.Conn, size int64, b block) error {
	r, w := bufio.NewReader(conn), bufio.NewWriter(conn)
	if err := negotiate(r, w, size); err != nil {
		return fmt.Errorf("QEMU and its disk don't agree: %w", err)
	}
	var buffer []byte
	for {
		var q struct {
			Magic       uint32
			Flags, Type uint16
			Cookie      uint64
			Offset      uint64
			Length      uint32
		}
		if err := binary.Read(r, binary.BigEndian, &q); err != nil {
			return err
		}
		if q.Magic != nbdRequest || q.Length > nbdMost {
			return fmt.Errorf("QEMU asks its disk for something odd: %+v", q)
		}
		buffer = append(buffer[:0], make([]byte, q.Length)...)
		var err error
		code, answer := uint32(0), []byte(nil)
		within := q.Offset <= uint64(size) && uint64(q.Length) <= uint64(size)-q.Offset
		switch {
		case q.Type == nbdDisconnect:
			return nil
		case q.Type == nbdFlush:
			err = b.flush()
		case q.Type == nbdWrite:
			if _, err := io.ReadFull(r, buffer); err != nil {
				return err
			}
			if within {
				err = b.writeAt(buffer, int64(q.Offset))
			}
		case q.Type == nbdRead && within:
			err = b.readAt(buffer, int64(q.Offset))
			answer = buffer
		default:
			code = nbdEINVAL
		}
		if err != nil {
			code, answer = nbdEIO, nil
		} else if q.Type == nbdWrite && !within {
			code = nbdEINVAL
		}
		if werr := writeAll(w, uint32(nbdReply), code, q.Cookie, answer); werr != nil {
			return werr
		}
		if err != nil {
			return err
		}
	}
}

// negotiate tells the client of the one disk that there is.
func negotiate(r io.Reader, w *bufio.Writer, size int64) error {
	if err := writeAll(w, uint64(nbdMagic), uint64(nbdOption), uint16(nbdFixedNewstyle|nbdNoZeroes)); err != nil {
		return err
	}
	var flags uint32
	if err := binary.Read(r, binary.BigEndian, &flags); err != nil {
		return err
	}
	for {
		var o struct {
			Magic          uint64
			Option, Length uint32
		}
		if err := binary.Read(r, binary.BigEndian, &o); err != nil {
			return err
		}
		if o.Magic != nbdOption || o.Length > 64<<10 {
			return fmt.Errorf("an option of magic %#x and %d bytes", o.Magic, o.Length)
		}
		if _, err := io.CopyN(io.Discard, r, int64(o.Length)); err != nil {
			return err
		}
		reply := func(kind uint32, data ...any) error {
			length := 0
			for _, d := range data {
				length += binary.Size(d)
			}
			return writeAll(w, append([]any{uint64(nbdOptionReply), o.Option, kind, uint32(length)}, data...)...)
		}
		switch o.Option {
		case nbdOptGo:
			if err := reply(nbdInfo, uint16(nbdExport), uint64(size), uint16(nbdHasFlags|nbdSendFlush)); err != nil {
				return err
			}
			return reply(nbdAck)
		case nbdOptAbort:
			return io.EOF
		default:
			if err := reply(nbdUnknown); err != nil {
				return err
			}
		}
	}
}

// writeAll writes numbers in the protocol's order, and bytes as they are.
func writeAll(w *bufio.Writer, values ...any) error {
	for _, v := range values {
		if err := binary.Write(w, binary.BigEndian, v); err != nil {
			return err
		}
	}
	return w.Flush()
}
