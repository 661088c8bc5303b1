package recipe

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// idCount is how many ids a build's user namespace holds: Debian's own
// packages use ids up to 65534 (nobody).
const idCount = 65536

// childName is the argv[0] by which RunChild knows that this process is a
// build step. A file on disk can't be called that by accident.
const childName = "clawvm: image build step"

// The descriptors that a step inherits beside its standard ones.
const (
	stepFD   = 3 // the step as JSON; its end of file means that the builder is gone
	mountsFD = 4 // the first of the step's mounts
)

// step is what one child process does, sent to it as JSON.
type step struct {
	// Image says what the step sees as its root: the first of its Mounts, or
	// the host's files, read-only, where it is false.
	Image  bool
	Mounts []mount

	// What the child itself does in an image, before and after Argv.
	Layout *layout
	Finish *finish

	Argv    []string
	Env     []string
	Dir     string
	UID     int
	GID     int
	Network bool
	// Confined commands can't gain privileges by a setuid file.
	Confined bool
	// Until ends Argv once it answers, instead of waiting for it to end.
	Until *Until
}

// mount is a directory of the host that a step sees under another name.
type mount struct {
	Source   string `json:"-"`
	Path     string // where the step sees it; "" for the root of an image
	ReadOnly bool
}

// host runs steps. It holds what they have in common.
type host struct {
	uidBase uint32
	log     io.Writer
}

// run runs a step to its end. stdin and stdout may be nil; without stdout the
// step's output goes to the log. The error of a step that failed ends in the
// last lines of what it wrote.
func (h host) run(ctx context.Context, s step, stdin io.Reader, stdout io.Writer) error {
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("cannot write down the step: %w", err)
	}
	files, err := openMounts(s.Mounts)
	defer closeAll(files)
	if err != nil {
		return err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("cannot make a pipe: %w", err)
	}
	defer write.Close()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{childName}
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.ExtraFiles = append([]*os.File{read}, files...)
	tail := &tailWriter{next: h.log}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, tail
	if stdout == nil {
		cmd.Stdout = tail
	}
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(h.uidBase), Size: idCount}}
	flags := uintptr(unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS)
	if !s.Network {
		flags |= unix.CLONE_NEWNET
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 flags,
		UidMappings:                ids,
		GidMappings:                ids,
		GidMappingsEnableSetgroups: true,
		Credential:                 &syscall.Credential{Uid: 0, Gid: 0},
		// A Ctrl-C at the terminal is the builder's to handle.
		Setsid: true,
	}
	err = cmd.Start()
	closeErr := read.Close()
	if err != nil {
		return fmt.Errorf("cannot start a process in a user namespace of its own: %w", namespaceHint(err))
	}
	if closeErr != nil {
		return errors.Join(fmt.Errorf("cannot close a pipe: %w", closeErr), cmd.Cancel(), cmd.Wait())
	}
	_, writeErr := write.Write(append(data, '\n'))
	err = cmd.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("%w%s", err, tail.quote())
	}
	if writeErr != nil {
		return fmt.Errorf("cannot tell the step what to do: %w", writeErr)
	}
	return nil
}

// namespaceHint adds what usually forbids user namespaces.
func namespaceHint(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return fmt.Errorf("%w (see the sysctl user.max_user_namespaces)", err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (images are built by root, not in a chroot, on a host that allows user namespaces)", err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w (is clawvm's program readable and executable by all?)", err)
	}
	return err
}

// openMounts clones the directories' mounts. The child attaches the clones: it
// couldn't reach the directories by their paths, which lie below some that
// only the host's root may enter.
func openMounts(mounts []mount) ([]*os.File, error) {
	var files []*os.File
	for _, m := range mounts {
		fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return files, fmt.Errorf("cannot open %s for mounting: %w", m.Source, err)
		}
		files = append(files, os.NewFile(uintptr(fd), m.Source))
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// tailLines and tailBytes bound what an error repeats of a step's output.
const (
	tailLines = 15
	tailBytes = 4096
)

// tailWriter passes on what it is given and keeps the end of it.
type tailWriter struct {
	mu   sync.Mutex
	next io.Writer
	kept []byte
}

func (t *tailWriter) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept = append(t.kept, p...)
	if over := len(t.kept) - tailBytes; over > 0 {
		t.kept = append(t.kept[:0], t.kept[over:]...)
	}
	if t.next == nil {
		return len(p), nil
	}
	return t.next.Write(p)
}

// quote is the end of the output, indented below an error's first line.
func (t *tailWriter) quote() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.TrimRight(string(bytes.ToValidUTF8(t.kept, []byte("?"))), "\n")
	if text == "" {
		return ""
	}
	lines := strings.Split(text, "\n")
	if len(lines) > tailLines {
		lines = lines[len(lines)-tailLines:]
	}
	return "; it ended with\n\t" + strings.Join(lines, "\n\t")
}
