package agent

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/yamux"
)

// maxWrite bounds one write of a stream in bytes, so that no stream keeps the others waiting for long.
const maxWrite = 32 << 10

// muxHeader is the length of yamux's header.
const muxHeader = 12

// maxStreams bounds the streams that a host has open to a guest: with a window of 256 KiB each, 16 MiB of memory at the worst.
const maxStreams = 64

// stuckWrite is how long a write may make no progress until the session is given up. An emulated guest can be stopped for long
// under load, and a broken one is found by Ping.
const stuckWrite = 10 * time.Minute

// muxConfig is the same at both ends. Each stream has a window of its own, so a slow reader stops its own stream alone. Nothing is
// sent to keep a session alive: Ping is for that, and an emulated guest's clock runs at its own pace.
func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = stuckWrite
	c.StreamOpenTimeout = 0 // would close the session; whoever opens a stream has a time limit of its own
	c.StreamCloseTimeout = time.Minute
	c.AcceptBacklog = maxStreams
	c.LogOutput = io.Discard // what happens is in the errors, and a hostile guest would fill a log
	return c
}

// hostGuard stands between a guest and the host's multiplexer and lets only through what an honest guest's multiplexer sends:
// data and window updates for streams that the host opened, and a goodbye. Pings and streams opened by the guest would make the
// host hold a goroutine or a buffer each.
type hostGuard struct {
	io.ReadWriteCloser
	header [muxHeader]byte
	have   int    // bytes of the header that were read
	given  int    // bytes of the header that were passed on
	body   uint32 // bytes of the payload still to come
	err    error
}

// Message types and flags of yamux's protocol, version 0.
const (
	muxData   = 0
	muxWindow = 1
	muxGoAway = 3
	muxSYN    = 1
)

func (g *hostGuard) Read(p []byte) (int, error) {
	if g.err != nil || len(p) == 0 {
		return 0, g.err
	}
	if g.body > 0 {
		n, err := g.ReadWriteCloser.Read(p[:min(uint32(len(p)), g.body)])
		g.body -= uint32(n)
		return n, err
	}
	if g.given == 0 {
		for g.have < muxHeader {
			n, err := g.ReadWriteCloser.Read(g.header[g.have:])
			g.have += n
			if err != nil && g.have < muxHeader {
				return 0, err
			}
		}
		if g.err = g.check(); g.err != nil {
			return 0, g.err
		}
	}
	n := copy(p, g.header[g.given:])
	if g.given += n; g.given == muxHeader {
		g.have, g.given = 0, 0
		if g.header[1] == muxData {
			g.body = binary.BigEndian.Uint32(g.header[8:])
		}
	}
	return n, nil
}

func (g *hostGuard) check() error {
	kind, flags, stream, length := g.header[1], binary.BigEndian.Uint16(g.header[2:]), binary.BigEndian.Uint32(g.header[4:]), binary.BigEndian.Uint32(g.header[8:])
	switch {
	case g.header[0] != 0:
		return fmt.Errorf("the guest's agent broke the protocol: version %d", g.header[0])
	case kind != muxData && kind != muxWindow && kind != muxGoAway:
		return fmt.Errorf("the guest's agent broke the protocol: a message of type %d", kind)
	case flags&muxSYN != 0 || kind != muxGoAway && stream%2 == 0:
		return fmt.Errorf("the guest's agent broke the protocol: stream %d isn't the host's", stream)
	case kind == muxData && length > 256<<10:
		return fmt.Errorf("the guest's agent broke the protocol: %d bytes at once", length)
	}
	return nil
}

// stream is a multiplexer's stream whose writes are cut into pieces of maxWrite bytes.
type stream struct{ net.Conn }

func (s stream) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		m, err := s.Conn.Write(p[:min(len(p), maxWrite)])
		n += m
		if err != nil {
			return n, err
		}
		p = p[m:]
	}
	return n, nil
}

// streams makes the streams that a host opens a listener for the guest's HTTP server.
type streams struct{ *yamux.Session }

func (l streams) Accept() (net.Conn, error) {
	c, err := l.Session.AcceptStream()
	if err != nil {
		return nil, err
	}
	return stream{c}, nil
}
