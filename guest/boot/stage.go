package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// stageName is the init's second life: started by itself under this name, it enters the sandbox, gives up all rights and becomes
// the program.
const stageName = "clawvm-stage"

// Files that a stage inherits behind its standard streams.
const (
	stageSpecFD   = 3 + iota // a memfd with the spec
	stageStatusFD            // a pipe: its end without a word means that the program runs, else the reason why not
	stageMountsFD            // with Sandboxed: the mount namespace
	stageIPCFD               // with Sandboxed: the IPC namespace
)

// Exit codes of a stage, as a shell's.
const (
	exitNotFound      = 127
	exitNotExecutable = 126
	exitStage         = 125 // the stage itself failed, as docker's
)

// stageSpec is what a stage does.
type stageSpec struct {
	Path      string // the program; "": Argv[0] as it is found on the PATH
	Argv      []string
	Env       []string
	Cwd       string // "": Home if it can be entered, else /
	Home      string
	UID, GID  int
	Groups    []int
	Sandboxed bool // false: as root of the guest, with everything
}

// maxSpec bounds a spec in bytes: what the kernel takes as arguments and environment, encoded.
const maxSpec = 16 << 20

// runStage runs on the process' only interesting thread and doesn't return when all is well.
func runStage() int {
	runtime.LockOSThread()
	status := os.NewFile(stageStatusFD, "status")
	unix.CloseOnExec(stageStatusFD)
	spec, err := readSpec()
	code := exitStage
	if err == nil {
		code, err = spec.become()
	}
	text := err.Error()
	if _, err := status.WriteString(text); err != nil {
		text += "; " + err.Error()
	}
	fmt.Fprintln(os.Stderr, "clawvm: "+text)
	return code
}

func readSpec() (*stageSpec, error) {
	f := os.NewFile(stageSpecFD, "spec")
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > maxSpec {
		return nil, fmt.Errorf("a command of %d bytes is too long", info.Size())
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil {
		return nil, fmt.Errorf("cannot read what to run: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	var s stageSpec
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("cannot read what to run: %w", err)
	}
	return &s, nil
}

// become turns the process into the program. It returns only with an error, and the exit code for it.
func (s *stageSpec) become() (int, error) {
	if s.Sandboxed {
		if err := enterSandbox(); err != nil {
			return exitStage, err
		}
	}
	unix.Umask(0o022)
	if err := s.takeUser(); err != nil {
		return exitStage, err
	}
	if err := s.enterDirectory(); err != nil {
		return exitStage, err
	}
	path := s.Path
	if path == "" {
		var err error
		if path, err = lookPath(s.Argv[0], s.Env); err != nil {
			return exitNotFound, err
		}
	}
	if s.Sandboxed {
		if err := applyFilter(); err != nil {
			return exitStage, err
		}
	}
	err := error(&fs.PathError{Op: "exec", Path: path, Err: syscall.Exec(path, s.Argv, s.Env)})
	if errors.Is(err, fs.ErrNotExist) { // a missing interpreter
		return exitNotFound, fmt.Errorf("cannot run %s: %w", s.Argv[0], err)
	}
	return exitNotExecutable, fmt.Errorf("cannot run %s: %w", s.Argv[0], err)
}

// enterSandbox moves this thread, which becomes the program, into the sandbox's namespaces.
func enterSandbox() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("cannot enter the sandbox: %w", err)
	}
	for _, ns := range []struct{ fd, kind int }{{stageIPCFD, unix.CLONE_NEWIPC}, {stageMountsFD, unix.CLONE_NEWNS}} {
		if err := unix.Setns(ns.fd, ns.kind); err != nil {
			return fmt.Errorf("cannot enter the sandbox: %w", err)
		}
		if err := unix.Close(ns.fd); err != nil {
			return err
		}
	}
	return nil
}

// takeUser sets the user and, in the sandbox, gives up what root could do: no capability is left, and none comes back by a setuid
// program, by file capabilities or by being uid 0.
func (s *stageSpec) takeUser() error {
	if s.Sandboxed {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("cannot refuse new privileges: %w", err)
		}
		if err := dropBounding(); err != nil {
			return err
		}
	}
	if err := ownStreams(s.UID, s.GID); err != nil {
		return err
	}
	// Plain system calls: only this thread lives on.
	groups := make([]uint32, len(s.Groups))
	for i, g := range s.Groups {
		groups[i] = uint32(g)
	}
	var first unsafe.Pointer
	if len(groups) > 0 {
		first = unsafe.Pointer(&groups[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(first), 0); e != 0 {
		return fmt.Errorf("cannot set the groups: %w", e)
	}
	gid, uid := uintptr(uint32(s.GID)), uintptr(uint32(s.UID))
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); e != 0 {
		return fmt.Errorf("cannot become group %d: %w", s.GID, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); e != 0 {
		return fmt.Errorf("cannot become user %d: %w", s.UID, e)
	}
	if s.Sandboxed {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			return fmt.Errorf("cannot give up the capabilities: %w", err)
		}
	}
	return nil
}

// ownStreams gives the pipes that are the standard streams to the user, so that it can open /dev/stdout by its name.
func ownStreams(uid, gid int) error {
	for fd := range 3 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFIFO {
			continue
		}
		if err := unix.Fchown(fd, uid, gid); err != nil {
			return fmt.Errorf("cannot give the standard streams to their user: %w", err)
		}
	}
	return nil
}

// dropBounding empties the bounding and ambient sets.
func dropBounding() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot give up the ambient capabilities: %w", err)
	}
	for c := uintptr(0); c < 64; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > unix.CAP_CHECKPOINT_RESTORE {
			return nil // behind the kernel's last one
		}
		if err != nil {
			return fmt.Errorf("cannot give up capability %d: %w", c, err)
		}
	}
	return nil
}

func (s *stageSpec) enterDirectory() error {
	if s.Cwd != "" {
		return os.Chdir(s.Cwd)
	}
	if s.Home != "" && os.Chdir(s.Home) == nil {
		return nil
	}
	return os.Chdir("/")
}

// lookPath finds a program on the PATH that it will have itself.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	dirs := defaultPath
	for _, v := range env {
		if p, ok := strings.CutPrefix(v, "PATH="); ok {
			dirs = p
		}
	}
	for _, dir := range filepath.SplitList(dirs) {
		p := filepath.Join(dir, name)
		if !filepath.IsAbs(p) {
			continue
		}
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() && unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("cannot run %s: %w", name, exec.ErrNotFound)
}

// stageCommand prepares the process that becomes the program. status is the write end of the stage's status pipe, nil for a
// program that reports its failure by its exit code alone. The caller closes files when the process is started, or isn't to be.
func stageCommand(spec *stageSpec, box *sandbox, status *os.File) (cmd *exec.Cmd, files []*os.File, err error) {
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, nil, err
	}
	if len(data) > maxSpec {
		return nil, nil, fmt.Errorf("a command of %d bytes is too long", len(data))
	}
	fd, err := unix.MemfdCreate("spec", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	mem := os.NewFile(uintptr(fd), "spec")
	files = append(files, mem)
	if _, err := mem.WriteAt(data, 0); err != nil {
		return nil, nil, errors.Join(err, mem.Close())
	}
	if status == nil {
		if status, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0); err != nil {
			return nil, nil, errors.Join(err, mem.Close())
		}
		files = append(files, status)
	}
	cmd = exec.Command("/proc/self/exe")
	cmd.Args = []string{stageName}
	cmd.Env = []string{}
	cmd.ExtraFiles = []*os.File{mem, status}
	if spec.Sandboxed {
		cmd.ExtraFiles = append(cmd.ExtraFiles, box.mounts, box.ipc)
	}
	return cmd, files, nil
}
