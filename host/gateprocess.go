package host

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/host/gate"
)

// GateArgument is the program's first argument that makes it a gate. It is not a
// command for people.
const GateArgument = "gate"

// gateProcess is the supervisor's end of a running gate.
type gateProcess struct {
	cmd      *exec.Cmd // nil until it runs
	conn     *gate.Conn
	messages chan gate.Message // closed when the gate has ended or speaks nonsense

	ended chan struct{}
	mu    sync.Mutex
	err   error // why it ended
}

// messagesMax is how many messages may wait: a gate that floods its supervisor
// waits for it, and so does its guest.
const messagesMax = 16

// startGateProcess starts the gate with the sockets that openSockets made. What
// ends it is pushed on the undo stack, which the caller unwinds also after an error.
func (l *life) startGateProcess(c gate.Config, files []namedFile) (*gateProcess, error) {
	conn, end, err := gate.Pair()
	if err != nil {
		return nil, err
	}
	defer end.Close()
	g := &gateProcess{conn: conn, messages: make(chan gate.Message, messagesMax), ended: make(chan struct{})}
	l.undo.push("the gate", g.stop)
	for _, f := range files {
		c.Files = append(c.Files, f.name)
	}
	config, err := memoryFile("gate-config", c)
	if err != nil {
		return nil, err
	}
	defer config.Close()
	log, err := openLog(l.paths.Log + "/gate.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()

	// By this link, since the gate's uid may not pass through the directories to
	// the program's file. The working directory stays: see Layout.relative.
	cmd := exec.Command("/proc/self/exe", GateArgument)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(childEnvironment(), noHugePages)
	cmd.ExtraFiles = []*os.File{end, config}
	for _, f := range files {
		cmd.ExtraFiles = append(cmd.ExtraFiles, f.file)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(l.ids.gate), Gid: uint32(l.ids.gate)},
	}
	if err := l.spawnGate(cmd); err != nil {
		return nil, fmt.Errorf("cannot start the gate: %w", err)
	}
	g.cmd = cmd
	go g.receive()
	go func() {
		err := cmd.Wait()
		if err == nil {
			err = errors.New("it ended by itself")
		}
		g.fail(err)
		close(g.ended)
	}()
	return g, nil
}

func (g *gateProcess) receive() {
	defer close(g.messages)
	for tokens := newBucket(messageBurst, messageRate); ; {
		m, err := g.conn.Receive()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			// A gate that breaks the protocol is not one's own any more.
			g.fail(err)
			if err := g.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				g.fail(err)
			}
			return
		}
		for wait := tokens.take(time.Now()); wait > 0; wait = tokens.take(time.Now()) {
			time.Sleep(wait) // the gate waits with it, and its guest
		}
		g.messages <- m
	}
}

func (g *gateProcess) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil {
		g.err = err
	}
}

// why says why the gate ended.
func (g *gateProcess) why() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// stop ends the gate: it goes when its supervisor hangs up, after it has written
// its logs; and by force when that takes too long.
func (g *gateProcess) stop() error {
	err := g.conn.Close()
	if g.cmd == nil {
		return err
	}
	for {
		select {
		case <-g.ended:
			return err
		case _, ok := <-g.messages: // so that receive can end
			if !ok {
				g.messages = nil
			}
		case <-after(gateStop):
			if kerr := g.cmd.Process.Kill(); kerr != nil && !errors.Is(kerr, os.ErrProcessDone) {
				return errors.Join(err, kerr)
			}
			<-g.ended
			return err
		}
	}
}

// namedFile is a descriptor that is handed to the gate.
type namedFile struct {
	name string
	file *os.File
}

// memoryFile returns a file in memory that holds v as JSON, at its start.
func memoryFile(name string, v any) (*os.File, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = io.Copy(f, bytes.NewReader(b))
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
