package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"github.com/clawvm/clawvm/guest/agent"
	"github.com/clawvm/clawvm/guest/tree"
	"github.com/clawvm/clawvm/host/gate"
)

// Place is one end of a copy.
type Place struct {
	VM   string // "": the host
	Path string // on the host "-" is a tar stream on standard input or output
}

func (p Place) stream() bool { return p.VM == "" && p.Path == "-" }

// String is the place as it is typed, fit to be shown.
func (p Place) String() string {
	shown := gate.Printable(p.Path, lineMax)
	if p.VM == "" {
		return shown
	}
	return p.VM + ":" + shown
}

// CopyOptions say how to copy.
type CopyOptions struct {
	Follow bool         // when the source is a symbolic link, copy what it leads to
	Owners bool         // keep owners; into a guest only with Root
	Root   bool         // as root of the guest, and not as its workload
	Self   string       // how this program is called, for what to do next
	Stdin  io.Reader    // for a source "-"
	Stdout io.Writer    // for a destination "-"
	Warn   func(string) // is told what was left out; the text is fit to be shown
	Count  *tree.Count  // counts; may be nil
}

// ErrIncomplete means that all was copied but what Warn was told of.
var ErrIncomplete = errors.New("not all of it could be read")

// errStopped is what a source hears whose sink has ended.
var errStopped = errors.New("the receiving end has stopped")

// Copy copies a file, or a directory with all in it, as docker cp does: into the
// destination when that is a directory, else in its place; a source that ends with
// /. is what is in a directory. One end at least is in a guest, where files are
// read and written with the workload's rights. What a guest sends is hostile: see
// tree.Unpack.
func Copy(ctx context.Context, l Layout, from, to Place, o CopyOptions) error {
	source, name := l.source(ctx, from, o)
	sink := l.sink(ctx, to, name, from.VM != "", o)
	if err := relay(source, sink); errors.Is(err, ErrIncomplete) {
		return fmt.Errorf("copied %s to %s, but %w", from, to, err)
	} else if err != nil {
		var c *CodedError
		var missing *NotDeclaredError
		if errors.As(err, &c) { // of a VM that is down: it needs no more words
			return c
		}
		if errors.As(err, &missing) {
			return missing
		}
		return fmt.Errorf("cannot copy %s to %s: %w", from, to, err)
	}
	return nil
}

// relay lets the source write what the sink reads, and says what ended them too
// early: one of them is only a consequence of the other.
func relay(source func(io.Writer) error, sink func(io.Reader) error) error {
	r, w := io.Pipe()
	var failed error
	var wg sync.WaitGroup
	wg.Go(func() {
		failed = source(w)
		if failed == nil || errors.Is(failed, ErrIncomplete) {
			w.Close()
		} else {
			w.CloseWithError(failed)
		}
	})
	err := sink(r)
	r.CloseWithError(errStopped)
	wg.Wait()
	if failed != nil && !errors.Is(failed, errStopped) && (err == nil || !errors.Is(failed, ErrIncomplete)) {
		return failed
	}
	return err
}

// source is what writes the stream, and the name of its top; "" when it can have
// any names.
func (l Layout) source(ctx context.Context, from Place, o CopyOptions) (func(io.Writer) error, string) {
	switch {
	case from.stream():
		return func(w io.Writer) error {
			_, err := io.Copy(io.MultiWriter(w, o.Count), o.Stdin)
			return err
		}, ""
	case from.VM != "":
		p := guestPath(from.Path)
		return func(w io.Writer) error {
			return l.carry(ctx, from.VM, agent.CopyRequest{Path: p, Follow: o.Follow}, o, agent.Stdio{Out: w})
		}, tree.TopName(p)
	}
	p := hostPath(from.Path)
	return func(w io.Writer) error {
		// One frame on the way to the guest carries many small files.
		out := bufio.NewWriterSize(w, copyBuffer)
		warned := false
		err := tree.Pack(out, p, tree.PackOptions{Follow: o.Follow, Count: o.Count, Warn: func(err error) {
			warned = true
			o.Warn(err.Error())
		}})
		if err == nil {
			err = out.Flush()
		}
		if err == nil && warned {
			return ErrIncomplete
		}
		return err
	}, tree.TopName(p)
}

// copyBuffer is what one frame to a guest holds, in bytes.
const copyBuffer = 32 << 10

// sink is what reads the stream; hostile is one that comes from a guest.
func (l Layout) sink(ctx context.Context, to Place, name string, hostile bool, o CopyOptions) func(io.Reader) error {
	switch {
	case to.stream():
		return func(r io.Reader) error {
			_, err := io.Copy(io.MultiWriter(o.Stdout, o.Count), r)
			return err
		}
	case to.VM != "":
		return func(r io.Reader) error {
			if hostile { // from one guest into another
				r = io.TeeReader(r, o.Count)
			}
			return l.carry(ctx, to.VM, agent.CopyRequest{Path: guestPath(to.Path), Into: true, Name: name, Owners: o.Owners}, o, agent.Stdio{In: r})
		}
	}
	return func(r io.Reader) error {
		return tree.Unpack(r, to.Path, tree.UnpackOptions{Name: name, Owners: o.Owners, Hostile: hostile, Count: o.Count})
	}
}

// carry does a guest's part of a copy.
func (l Layout) carry(ctx context.Context, vm string, req agent.CopyRequest, o CopyOptions, stdio agent.Stdio) error {
	var said words
	stdio.Err = &said
	stdio.Signals = make(chan os.Signal) // none: the context ends by them
	to := "copy from"
	if req.Into {
		to = "copy into"
	}
	code, err := agent.Exec(ctx, l.Enter(vm, to, o.Self, ExitNotRunning), agent.ExecRequest{Root: o.Root, Copy: &req}, stdio)
	var answer *agent.AnswerError
	switch {
	case errors.As(err, &answer) && strings.Contains(answer.Text, `unknown field "copy"`):
		return fmt.Errorf("VM %s was started by an older clawvm, whose guests can't copy; `%s restart %s` renews it", vm, o.Self, vm)
	case err != nil:
		return err
	case code == agent.CopyIncomplete && !req.Into:
		for _, line := range said.lines() {
			o.Warn("VM " + vm + ": " + line)
		}
		return ErrIncomplete
	case code != 0:
		lines := said.lines()
		if len(lines) == 0 {
			return fmt.Errorf("the copy in VM %s ended with exit code %d", vm, code)
		}
		return fmt.Errorf("VM %s: %s", vm, lines[len(lines)-1])
	}
	return nil
}

// words is the beginning of what a guest says on standard error.
type words struct {
	mu   sync.Mutex
	text []byte
}

// wordsMax bounds it in bytes: the warnings of one copy.
const wordsMax = 16 << 10

func (w *words) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text = append(w.text, p[:min(len(p), wordsMax-len(w.text))]...)
	return len(p), nil
}

// lines is what was said, fit to be shown.
func (w *words) lines() (lines []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for line := range strings.Lines(string(w.text)) {
		if line = strings.TrimSpace(gate.Printable(strings.TrimRight(line, "\r\n"), lineMax)); line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

// guestPath is a path in a guest, from its root on, that keeps the endings which
// mean something: a directory (/) and its contents (/.).
func guestPath(p string) string {
	clean := path.Clean("/" + p)
	switch {
	case clean == "/":
		return clean
	case strings.HasSuffix(p, "/."):
		return clean + "/."
	case strings.HasSuffix(p, "/"):
		return clean + "/"
	}
	return clean
}

// hostPath is a source on the host with a name: that of .. is known to nobody.
func hostPath(p string) string {
	if filepath.Base(p) != ".." {
		return p
	}
	if abs, err := filepath.Abs(p); err == nil {
		return abs
	}
	return p
}
