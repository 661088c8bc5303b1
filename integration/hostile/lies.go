package main

import (
	"archive/tar"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path"
	"strings"

	"github.com/clawvm/clawvm/guest/agent"
)

// outside is a directory of the host's that the lies aim at; the test makes it.
const outside = "/run/outside"

// The kinds of the frames of an exec connection.
const (
	frameStdout = 2
	frameStderr = 3
	frameExit   = 6
	frameCredit = 8
)

func frame(kind byte, payload []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(payload))), payload...)
}

// output writes what is written to it as frames.
type output struct {
	conn net.Conn
	kind byte
}

func (o output) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		m := min(len(p), 32<<10)
		if _, err := o.conn.Write(frame(o.kind, p[:m])); err != nil {
			return n, err
		}
		n, p = n+m, p[m:]
	}
	return n, nil
}

// exec answers a command or a copy with a lie.
func exec(w http.ResponseWriter, r *http.Request) {
	var req agent.ExecRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		return
	}
	if len(req.Argv) > 0 && req.Argv[0] == "long-refusal" {
		w.WriteHeader(http.StatusBadRequest)
		for line := []byte(strings.Repeat("no \x1b[2J", 1000)); ; {
			if _, err := w.Write(line); err != nil {
				return
			}
		}
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	if len(req.Argv) > 0 && req.Argv[0] == "long-header" {
		for line := []byte("HTTP/1.1 101 Switching Protocols\r\nX: " + strings.Repeat("x", 1000)); ; {
			if _, err := conn.Write(line); err != nil {
				return
			}
		}
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: clawvm-exec/1\r\n\r\n"); err != nil {
		return
	}
	if req.Copy != nil {
		lieInACopy(conn, path.Base(req.Copy.Path))
	} else {
		lieInACommand(conn, req.Argv[0])
	}
}

// lieInACommand breaks the protocol of an exec in the way that the command names.
func lieInACommand(conn net.Conn, name string) {
	switch name {
	case "flood":
		beginFlood()
		for out := frame(frameStdout, make([]byte, 32<<10)); ; {
			if _, err := conn.Write(out); err != nil {
				return
			}
		}
	case "huge-frame":
		conn.Write([]byte{frameStdout, 0xff, 0xff, 0xff, 0xff})
	case "unknown-frame":
		conn.Write(frame(99, []byte("x")))
	case "credit":
		for range 3 {
			conn.Write(frame(frameCredit, []byte{0xff, 0xff, 0xff, 0xff}))
		}
	case "long-exit":
		conn.Write(frame(frameExit, make([]byte, 100)))
	case "early": // closes without a word
		return
	case "half-a-frame":
		conn.Write(frame(frameStdout, make([]byte, 100))[:50])
		return
	case "after-the-end":
		conn.Write(append(frame(frameExit, []byte{3}), frame(frameStdout, []byte("more"))...))
	}
	io.Copy(io.Discard, conn) // until the host closes
}

// lieInACopy sends the archive that its name describes.
func lieInACopy(conn net.Conn, name string) {
	out := output{conn, frameStdout}
	top := tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}
	file := func(at string) tar.Header {
		return tar.Header{Typeflag: tar.TypeReg, Name: at, Mode: 0o644, Size: 4}
	}
	link := func(at, target string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: at, Linkname: target}
	}
	hard := func(at, target string) tar.Header {
		return tar.Header{Typeflag: tar.TypeLink, Name: at, Linkname: target}
	}
	up := strings.Repeat("../", 20) + outside[1:]
	switch name {
	case "dots":
		archive(out, top, file(name+"/"+up+"/file"))
	case "dots-first":
		archive(out, file(up+"/file"))
	case "absolute":
		archive(out, top, file(outside+"/file"))
	case "through-a-link":
		archive(out, top, link(name+"/l", outside), file(name+"/l/file"))
	case "through-a-link-up":
		archive(out, top, link(name+"/l", up), file(name+"/l/file"))
	case "through-the-top":
		archive(out, link(name, outside), file(name+"/file"))
	case "directory-over-a-link":
		archive(out, top, link(name+"/l", outside), tar.Header{Typeflag: tar.TypeDir, Name: name + "/l/", Mode: 0o777})
	case "file-over-a-link": // taken: the file takes the link's place
		archive(out, top, link(name+"/l", outside+"/file"), file(name+"/l"))
	case "hard-link":
		archive(out, top, hard(name+"/h", outside+"/file"), file(name+"/h"))
	case "hard-link-up":
		archive(out, top, hard(name+"/h", up+"/file"))
	case "device":
		archive(out, top, tar.Header{Typeflag: tar.TypeBlock, Name: name + "/disk", Devmajor: 8, Mode: 0o666})
	case "pipe":
		archive(out, top, tar.Header{Typeflag: tar.TypeFifo, Name: name + "/pipe", Mode: 0o666})
	case "setuid": // taken, without the bit
		su := file(name + "/su")
		su.Mode = 0o6755
		archive(out, top, su)
	case "other-name":
		archive(out, file("passwd"))
	case "terminal":
		archive(out, top, file(name+"/\x1b]0;owned\x07\x1b[2J/../x"))
	case "huge":
		h := file(name)
		h.Size = 1 << 62
		archive(out, h)
		pour(out)
	case "endless-bytes":
		endless(out, top, 4<<20) // fits, each for itself
	case "endless-files":
		endless(out, top, 0)
	case "endless-header": // one of a name that goes on and on
		h := make([]byte, 512)
		copy(h, name)
		copy(h[100:], "0000644\x000000000\x000000000\x0077777777777\x0000000000000\x00")
		copy(h[148:], "        ")
		h[156] = tar.TypeGNULongName
		copy(h[257:], "ustar  \x00")
		sum := 0
		for _, b := range h {
			sum += int(b)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		if _, err := out.Write(h); err != nil {
			return
		}
		pour(out)
	case "no-archive":
		out.Write([]byte(strings.Repeat("no archive ", 10_000)))
		conn.Write(frame(frameExit, []byte{0}))
	case "nothing":
		conn.Write(frame(frameExit, []byte{0}))
	case "early":
		half := file(name)
		half.Size = 1 << 20
		archive(out, half)
		return
	case "words": // a flood of what is for people
		err := output{conn, frameStderr}
		for range 1000 {
			if _, e := err.Write([]byte(strings.Repeat("\x1b[2J owned \n", 1000))); e != nil {
				return
			}
		}
		conn.Write(frame(frameExit, []byte{1}))
	}
	conn.Write(frame(frameExit, []byte{0}))
	io.Copy(io.Discard, conn)
}

// archive writes entries, with four bytes in each that has any; the one that
// promises more stays short.
func archive(w io.Writer, entries ...tar.Header) {
	t := tar.NewWriter(w)
	for _, h := range entries {
		if err := t.WriteHeader(&h); err != nil {
			fmt.Println("hostile: cannot forge", h.Name, err)
			return
		}
		if h.Size > 0 {
			if _, err := t.Write([]byte("evil")); err != nil {
				return
			}
		}
		if h.Size > 4 {
			return // what follows is what was promised
		}
	}
	t.Close()
}

// endless writes an archive of files of one size, without an end.
func endless(w io.Writer, top tar.Header, size int64) {
	t := tar.NewWriter(w)
	if t.WriteHeader(&top) != nil {
		return
	}
	for i := 0; ; i++ {
		if t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s%d", top.Name, i), Mode: 0o644, Size: size}) != nil {
			return
		}
		if _, err := io.CopyN(t, zeros{}, size); err != nil {
			return
		}
	}
}

// pour writes without an end.
func pour(w io.Writer) {
	for p := make([]byte, 32<<10); ; {
		if _, err := w.Write(p); err != nil {
			return
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
