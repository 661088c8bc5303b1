package boot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
)

// runner starts programs in the guest: the workload, what is executed as it, and what is executed as root.
type runner struct {
	etc       string // where the image's passwd and group are
	workload  *guest.Workload
	box       *sandbox
	group     *cgroup // of what hosts execute
	*children         // starts and awaits them
}

// workloadCommand prepares a run of the workload.
func (r *runner) workloadCommand(status *os.File) (*exec.Cmd, []*os.File, error) {
	spec, _, err := r.spec(agent.ExecRequest{Argv: r.workload.Argv})
	if err != nil {
		return nil, nil, err
	}
	return stageCommand(spec, r.box, status)
}

// spec says how a request is run.
func (r *runner) spec(req agent.ExecRequest) (*stageSpec, *account, error) {
	user, cwd := req.User, req.Cwd
	if r.workload != nil && !req.Root {
		if user == "" {
			user = r.workload.User
		}
		if cwd == "" {
			cwd = r.workload.Cwd
		}
	}
	argv, path, err := program(req)
	if err != nil {
		return nil, nil, err
	}
	who, err := lookupAccount(r.etc, user)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot run %s: %w", argv[0], err)
	}
	env := who.environment()
	if r.workload != nil && !req.Root {
		maps.Copy(env, r.workload.Env)
	}
	if req.TTY {
		env["TERM"] = "xterm"
	}
	maps.Copy(env, req.Env)
	spec := &stageSpec{Path: path, Argv: argv, Cwd: cwd, Home: who.Home, UID: who.UID, GID: who.GID, Groups: who.Groups, Sandboxed: !req.Root}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		spec.Env = append(spec.Env, k+"="+env[k])
	}
	return spec, who, nil
}

// program says which program a request is for: the one that it names, or this one, which carries files.
func program(req agent.ExecRequest) (argv []string, path string, err error) {
	if req.Copy == nil {
		return req.Argv, "", nil
	}
	text, err := json.Marshal(req.Copy)
	if err != nil {
		return nil, "", err
	}
	return []string{copyName, string(text)}, "/proc/self/exe", nil
}

// Command prepares what a host asks for.
func (r *runner) Command(req agent.ExecRequest) (*agent.Command, error) {
	spec, who, err := r.spec(req)
	if err != nil {
		return nil, err
	}
	cmd, files, err := stageCommand(spec, r.box, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot run %s: %w", spec.Argv[0], err)
	}
	dir, err := r.group.place(cmd)
	if err != nil {
		return nil, errors.Join(err, closeFiles(files))
	}
	return &agent.Command{Cmd: cmd, Files: append(files, dir), UID: who.UID, GID: who.GID}, nil
}

func closeFiles(files []*os.File) (err error) {
	for _, f := range files {
		err = errors.Join(err, f.Close())
	}
	return err
}

// run runs a command as the workload is run, with nothing to read, and returns its failure with the end of what it said.
func (r *runner) run(ctx context.Context, argv []string) error {
	cmd, err := r.Command(agent.ExecRequest{Argv: argv})
	if err != nil {
		return err
	}
	var said lastBytes
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &said, &said, commandTime
	cmd.SysProcAttr.Setsid = true
	if err := errors.Join(r.Start(cmd.Cmd), closeFiles(cmd.Files)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		// Its session, so that nothing of it stays behind, look after look.
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			warn("cannot kill %s: %v", argv[0], err)
		}
	})
	defer stop()
	if err := r.Wait(cmd.Cmd); err != nil {
		if text := strings.TrimSpace(said.buf.String()); text != "" {
			return fmt.Errorf("%w: %s", err, text)
		}
		return err
	}
	return nil
}

// lastBytes keeps the end of what is written to it.
type lastBytes struct{ buf bytes.Buffer }

func (l *lastBytes) Write(p []byte) (int, error) {
	n, err := l.buf.Write(p)
	if extra := l.buf.Len() - 512; extra > 0 {
		l.buf.Next(extra)
	}
	return n, err
}
