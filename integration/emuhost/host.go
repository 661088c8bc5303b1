package emuhost

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost/wire"
	"github.com/xtaci/smux"
)

// Host is a running emulated server. Its methods may be called by several goroutines.
type Host struct {
	work    string
	process *os.Process
	conn    net.Conn
	session *smux.Session
	console *tail
	stderr  *tail
	disk    *writeCache // nil without Options.Loss
	loss    *rand.Rand

	done   chan struct{} // closed when QEMU has ended
	waited error         // how; after done
	clean  sync.Once
}

// Command is a command to run in the host, as root.
type Command struct {
	Argv   []string
	Dir    string    // "": /root
	Env    []string  // over PATH, HOME and LANG
	Stdin  io.Reader // nil: empty
	Stdout io.Writer // nil: dropped
	Stderr io.Writer // nil: dropped
}

// Run runs a command and returns what it wrote and its exit code (128 + n when signal n ended it). The error says
// that it could not be run, or that ctx ended first; then it is killed.
func (h *Host) Run(ctx context.Context, argv ...string) (stdout, stderr string, code int, err error) {
	var out, errs bytes.Buffer
	code, err = h.Exec(ctx, Command{Argv: argv, Stdout: &out, Stderr: &errs})
	return out.String(), errs.String(), code, err
}

// Script runs a shell script, like Run; it ends with its first command that fails.
func (h *Host) Script(ctx context.Context, script string) (stdout, stderr string, code int, err error) {
	return h.Run(ctx, "bash", "-euo", "pipefail", "-c", script)
}

// Exec runs a command with its streams connected.
func (h *Host) Exec(ctx context.Context, c Command) (code int, err error) {
	stream, err := h.session.OpenStream()
	if err != nil {
		return 0, fmt.Errorf("cannot reach the emulated host: %w", err)
	}
	defer stream.Close()
	stop := context.AfterFunc(ctx, func() { stream.Close() })
	defer stop()
	if err := wire.WriteJSON(stream, wire.Start, wire.Request{Argv: c.Argv, Dir: c.Dir, Env: c.Env}); err != nil {
		return 0, h.broken(ctx, c, err)
	}
	fed := make(chan error, 1)
	go func() {
		err := feed(stream, c.Stdin)
		fed <- err
		if err != nil {
			stream.Close() // or the command would wait for the rest of its input
		}
	}()
	for {
		kind, payload, err := wire.Read(stream)
		if err != nil {
			return 0, errors.Join(h.broken(ctx, c, err), notRead(c, fed))
		}
		switch kind {
		case wire.Stdout:
			err = writeTo(c.Stdout, payload)
		case wire.Stderr:
			err = writeTo(c.Stderr, payload)
		case wire.Exited:
			return exited(c, payload, fed)
		}
		if err != nil {
			return 0, fmt.Errorf("cannot take the output of %q: %w", c.Argv[0], err)
		}
	}
}

func writeTo(w io.Writer, p []byte) error {
	if w == nil {
		return nil
	}
	_, err := w.Write(p)
	return err
}

func feed(w io.Writer, stdin io.Reader) error {
	send := func(kind wire.Kind, b []byte) error { return wire.Write(w, kind, b) }
	if stdin != nil {
		if err := wire.Copy(send, wire.Stdin, stdin); err != nil {
			return err
		}
	}
	return send(wire.Stdin, nil)
}

// exited reads the last frame. An input that could not be read is an error even when the command did not mind.
func exited(c Command, payload []byte, fed <-chan error) (int, error) {
	var exit wire.Exit
	if err := json.Unmarshal(payload, &exit); err != nil {
		return 0, fmt.Errorf("the emulated host said something odd: %w", err)
	}
	if exit.Error != "" {
		return exit.Code, fmt.Errorf("cannot run %q in the emulated host: %s", c.Argv[0], exit.Error)
	}
	return exit.Code, notRead(c, fed)
}

// notRead says why the command's input could not be read; that the command ended before it was sent is no error.
func notRead(c Command, fed <-chan error) error {
	select {
	case err := <-fed:
		if err != nil && !errors.Is(err, io.ErrClosedPipe) && !errors.Is(err, io.EOF) {
			return fmt.Errorf("cannot read the input of %q: %w", c.Argv[0], err)
		}
	default:
	}
	return nil
}

func (h *Host) broken(ctx context.Context, c Command, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%q in the emulated host: %w", c.Argv[0], ctx.Err())
	}
	select {
	case <-h.done:
		return fmt.Errorf("the emulated host ended while %q ran", c.Argv[0])
	default:
		return fmt.Errorf("cannot reach the emulated host while %q runs: %w", c.Argv[0], err)
	}
}

// CopyIn copies a file, or a directory with all below it, to a path in the host; modes and links are kept, all is
// owned by root. The directory that it goes to is made.
func (h *Host) CopyIn(ctx context.Context, from, to string) error {
	if !filepath.IsAbs(to) {
		return fmt.Errorf("cannot copy to %s: not an absolute path", to)
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(writeTar(w, from, strings.TrimPrefix(filepath.Clean(to), "/"))) }()
	var stderr bytes.Buffer
	code, err := h.Exec(ctx, Command{Argv: []string{"tar", "-C", "/", "--no-overwrite-dir", "-xpf", "-"}, Stdin: r, Stderr: &stderr})
	if err = errors.Join(err, r.Close()); err != nil {
		return fmt.Errorf("cannot copy %s: %w", from, err)
	}
	if code != 0 {
		return fmt.Errorf("cannot copy %s: tar ended with %d: %s", from, code, stderr.String())
	}
	return nil
}

// writeTar writes from, a file or a directory, as the archive's name.
func writeTar(out io.Writer, from, name string) error {
	w := tar.NewWriter(out)
	err := filepath.WalkDir(from, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if path == from {
			info, err = os.Stat(path) // a link that was asked for is followed
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		return writeEntry(w, path, filepath.Join(name, rel), info)
	})
	return errors.Join(err, w.Close())
}

func writeEntry(w *tar.Writer, path, name string, info fs.FileInfo) error {
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	header, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	header.Name, header.Uid, header.Gid, header.Uname, header.Gname = name, 0, 0, "", ""
	if err := w.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(w, f, info.Size())
	return errors.Join(err, f.Close())
}

// ConsoleTail is the end of what the host's serial console said.
func (h *Host) ConsoleTail() string { return h.console.String() }

// Done is closed when the host has ended, by itself or not.
func (h *Host) Done() <-chan struct{} { return h.done }

// Close shuts the host down as an administrator would, and kills what has not ended after 45 s. Several
// calls, and one after Kill, are no error.
func (h *Host) Close() error {
	select {
	case <-h.done:
		return h.cleanUp()
	default:
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
	defer cancel()
	// The answer may be lost with the host that is asked.
	_, _, _, asked := h.Run(ctx, "systemctl", "poweroff", "--no-block")
	select {
	case <-h.done:
		return h.cleanUp()
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("the emulated host did not shut down in %s", shutdownLimit), asked, h.Kill())
	}
}

// Kill ends the host like a power failure.
func (h *Host) Kill() error {
	_, _, err := h.PowerOff()
	return err
}

// PowerOff is Kill, and says how many pages of 4 KiB were in the disk's write cache and how many of them are lost. Both are
// 0 without Options.Loss, and for a host that has ended already.
func (h *Host) PowerOff() (cached, lost int, err error) {
	if h.disk != nil {
		select {
		case <-h.done:
		default:
			cached, lost, err = h.disk.powerOff(h.loss)
		}
	}
	return cached, lost, errors.Join(err, h.kill())
}

func (h *Host) kill() error {
	if err := h.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("cannot kill QEMU: %w", err)
	}
	select {
	case <-h.done:
		return h.cleanUp()
	case <-time.After(killLimit):
		return fmt.Errorf("QEMU (process %d) was killed and did not end in %s", h.process.Pid, killLimit)
	}
}

func (h *Host) cleanUp() (err error) {
	h.clean.Do(func() {
		if h.session != nil {
			err = h.session.Close() // closes the connection too
		} else {
			err = h.conn.Close()
		}
		if errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) {
			err = nil
		}
		if h.disk != nil {
			<-h.disk.done
			err = errors.Join(err, h.disk.served)
		}
		err = errors.Join(err, os.RemoveAll(h.work))
	})
	return err
}

// tail keeps the end of what is written to it and passes everything on.
type tail struct {
	limit int
	to    io.Writer

	mu  sync.Mutex
	end []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	t.end = append(t.end, p...)
	if over := len(t.end) - t.limit; over > 0 {
		t.end = append(t.end[:0], t.end[over:]...)
	}
	t.mu.Unlock()
	if t.to != nil {
		return t.to.Write(p)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.end))
}
