package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/clawvm/clawvm/internal/durable"
)

// Declare makes sure that the declaration in file is the one that its VM goes by:
// a link to it is made among the root's declarations, unless it lies there. It
// returns the VM's name, and whether it made the link, which [Undeclare] removes
// again. Another declaration of that name is not replaced.
func Declare(l Layout, file string) (name string, made bool, err error) {
	abs, err := filepath.Abs(file)
	if err != nil {
		return "", false, fmt.Errorf("cannot use the declaration %s: %w", file, err)
	}
	if _, err := os.Stat(abs); err != nil {
		return "", false, coded(ExitDeclaration, fmt.Errorf("cannot use the declaration %s: %w", file, Bare(err)))
	}
	name, ok := declarationName(abs)
	if !ok {
		return "", false, coded(ExitDeclaration, fmt.Errorf("cannot tell the VM's name from %s: a declaration is a file called NAME.yaml or NAME.json, and NAME is a lower-case letter, then lower-case letters, digits and -, 32 at most", file))
	}
	have, err := l.Declaration(name)
	var missing *NotDeclaredError
	if errors.As(err, &missing) {
		if err := durable.MkdirAll(l.Declarations(), 0o755); err != nil {
			return "", false, fmt.Errorf("cannot declare VM %s: %w", name, err)
		}
		link := filepath.Join(l.Declarations(), name+filepath.Ext(abs))
		if err := durable.Symlink(abs, link); err != nil {
			return "", false, fmt.Errorf("cannot declare VM %s: %w", name, err)
		}
		return name, true, nil
	}
	if err != nil {
		return "", false, err
	}
	a, err := os.Stat(abs)
	if err != nil {
		return "", false, fmt.Errorf("cannot use the declaration %s: %w", file, Bare(err))
	}
	if b, err := os.Stat(have); err != nil || !os.SameFile(a, b) {
		return "", false, coded(ExitDeclaration, fmt.Errorf("cannot declare VM %s by %s: it is declared by %s already; remove that, or give %s another name", name, file, have, file))
	}
	return name, false, nil
}

// Undeclare removes the link that Declare made.
func Undeclare(l Layout, name string) error {
	if err := removeDeclarationLink(l, name); err != nil {
		return fmt.Errorf("cannot remove the link to the declaration of VM %s: %w", name, err)
	}
	return nil
}

// Bare is what an error of the system says beside the path, which the message
// names already.
func Bare(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// launchPoll is how often a starting supervisor's socket is tried: it is there
// some 30 ms after the start.
const launchPoll = 5 * time.Millisecond

// Launch starts the supervisor of the VM name in a session of its own and returns
// when it answers. Where it ends before that, the error has its last words. A
// VM that runs already is no error: started is false.
func Launch(ctx context.Context, l Layout, name string) (started bool, err error) {
	client := l.Dial(name)
	if _, err := client.Status(ctx); err == nil {
		return false, nil
	} else if !errors.Is(err, ErrNotRunning) {
		return false, err
	}
	paths := l.VM(name)
	log, err := openLog(paths.SupervisorLog())
	if err != nil {
		return false, fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return false, err
	}
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	before, beforeErr := LastEnd(l, name) // one that can't be read is replaced by the next
	cmd := exec.Command(self, "--root", l.Root, "run", name)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	// In a mount namespace of its own from the start: see EnterMountNamespace.
	here, err := mountNamespace()
	if err != nil {
		return false, err
	}
	cmd.Env = append(os.Environ(), privateMounts+"="+here, noHugePages)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		return false, fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(launchPoll)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if _, serr := client.Status(ctx); serr == nil {
				return false, nil // another `up` was quicker
			}
			said := make([]byte, 4096)
			n, _ := log.ReadAt(said, from)
			code := ExitFailed
			var exit *exec.ExitError
			if errors.As(err, &exit) && !exit.Exited() {
				return false, killedAtStart(name, exit.ProcessState.String())
			} else if exit != nil {
				code = exit.ExitCode()
			} else if err == nil {
				return false, TakenDown(name)
			}
			if e, eerr := LastEnd(l, name); eerr == nil && e.Failed() && e.Kind != EndSupervisor && (beforeErr != nil || e.Since(before)) {
				return false, coded(e.Code, errors.New(e.Reason))
			}
			why := strings.TrimPrefix(lastLine(said[:n]), "clawvm: ")
			if !strings.HasPrefix(why, "cannot start VM "+name) {
				why = fmt.Sprintf("cannot start VM %s: its supervisor ended at once: %s", name, why)
			}
			return false, coded(code, errors.New(why))
		case <-tick.C:
			if _, err := client.Status(ctx); err == nil {
				return true, nil
			}
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// killedAtStart is the error of a start whose supervisor ended without a word.
func killedAtStart(name, how string) error {
	return fmt.Errorf("cannot start VM %s: its supervisor ended without a word (%s); clawvm logs --supervisor %s shows how far it came", name, how, name)
}

// TakenDown is the error of a start that its owner ended.
func TakenDown(name string) error { return fmt.Errorf("VM %s was taken down while it started", name) }

// WhyNot is the error of a start that can't be followed any more, because err, of a
// VM whose last end was before when it began.
func WhyNot(l Layout, name string, before *End, err error) error {
	switch end, eerr := LastEnd(l, name); {
	case eerr != nil:
		return errors.Join(err, eerr)
	case !end.Since(before), end.Kind == EndSupervisor:
		return killedAtStart(name, err.Error())
	case end.Failed():
		return coded(end.Code, errors.New(end.Reason))
	case end.Kind == EndByOwner:
		return TakenDown(name)
	}
	return err
}

// WaitDown waits until the supervisor that had the status st has ended, and says
// how it did; nil when it ended without a word. That another one runs by then, of
// an `up` that was quick, is no reason to wait on.
func WaitDown(ctx context.Context, l Layout, st Status) (*End, error) {
	tick := time.NewTicker(downPoll)
	defer tick.Stop()
	for {
		held, err := locked(l.VM(st.Name).Lock())
		if err != nil {
			return nil, err
		}
		if !held {
			return endOf(l, st)
		}
		if now, err := l.Dial(st.Name).Status(ctx); err == nil && !now.Started.Equal(st.Started) {
			return endOf(l, st)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("VM %s is not down yet: %w", st.Name, context.Cause(ctx))
		}
	}
}

// downPoll is how often a lock is asked for: it has no event to wait for.
const downPoll = 20 * time.Millisecond
