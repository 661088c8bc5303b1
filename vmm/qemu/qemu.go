// Package qemu runs a machine by QEMU: with KVM where that works, else emulating it. QEMU runs unprivileged from its
// first instruction, in its seccomp sandbox, and inherits all that it needs as descriptors but the files of
// kernel, disks and virtiofsd's sockets.
package qemu

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/vmm"
)

// startLimit is how long QEMU may take until it answers. It takes 0.2 s, or seconds on a host that emulates one.
const startLimit = 60 * time.Second

// stderrLimit is how long after QEMU's end its standard error is waited for; only a process that it left could hold
// it open, and the sandbox lets it start none.
const stderrLimit = 2 * time.Second

// eventBuffer holds the events of a whole life with room to spare.
const eventBuffer = 16

// QEMU is an installed QEMU. It makes a vmm.VMM.
type QEMU struct {
	// Binary is the path of qemu-system-x86_64.
	Binary string
	// KVM: the hardware runs the guest (vmm.Facts.Hardware). The machine's groups must let it open /dev/kvm.
	KVM bool
}

var _ vmm.VMM = (*QEMU)(nil)

// New is a QEMU that emulates, unless its KVM is set.
func New(binary string) *QEMU { return &QEMU{Binary: binary} }

// Name is "qemu".
func (q *QEMU) Name() string { return vmm.QEMU }

var versionLine = regexp.MustCompile(`QEMU emulator version ([0-9][0-9.]*)`)

// Version is QEMU's version, as "7.2.22".
func (q *QEMU) Version(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, q.Binary, "--version")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("cannot ask %s for its version: %w", q.Binary, err)
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("cannot ask %s for its version: it says %.80q", q.Binary, out)
	}
	return string(m[1]), nil
}

// OpenChannel makes a pair of connected sockets. QEMU inherits one end and connects the guest's port to it.
func (q *QEMU) OpenChannel(*vmm.Machine) (*vmm.Channel, error) {
	host, guest, err := socketPair("agent")
	if err != nil {
		return nil, fmt.Errorf("cannot make the agent's channel: %w", err)
	}
	return &vmm.Channel{Host: host, Guest: guest}, nil
}

// socketPair makes a stream between two files; the first can be polled.
func socketPair(name string) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, errors.Join(err, unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name+" (QEMU's end)"), nil
}

// Start starts QEMU, which runs the machine at once. A disk, share or kernel that isn't there is an error with QEMU's
// own words.
func (q *QEMU) Start(ctx context.Context, m *vmm.Machine) (vmm.Instance, error) {
	i, err := q.start(ctx, m)
	if m.Agent != nil && m.Agent.Guest != nil {
		// QEMU's copy must be the only one: with ours open a dead QEMU would look like a silent one.
		if closeErr := m.Agent.Guest.Close(); closeErr != nil && err == nil {
			err = errors.Join(fmt.Errorf("cannot close the agent's channel: %w", closeErr), i.Kill())
			i.Wait()
			err = errors.Join(err, i.Close())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cannot start qemu: %w", err)
	}
	return i, nil
}

func (q *QEMU) start(ctx context.Context, m *vmm.Machine) (*instance, error) {
	if err := check(m); err != nil {
		return nil, err
	}
	ours, theirs, err := socketPair("qmp")
	if err != nil {
		return nil, err
	}
	conn, err := net.FileConn(ours)
	err = errors.Join(err, ours.Close())
	if err != nil {
		return nil, errors.Join(err, theirs.Close())
	}

	s := setup{kvm: q.KVM}
	s.dataDir, s.firmware = q.files()
	var inherited []*os.File
	inherit := func(f *os.File) int {
		inherited = append(inherited, f)
		return 2 + len(inherited) // after the three standard ones
	}
	s.qmp = inherit(theirs)
	if m.Agent != nil {
		s.agent = inherit(m.Agent.Guest)
	}
	if m.TAPFile != nil {
		s.tap = inherit(m.TAPFile)
	}
	tail := vmm.NewTail(m)
	cmd := vmm.Command(m, q.Binary, args(m, s), tail)
	cmd.ExtraFiles = inherited
	// All that it needs of the network is the TAP, which it has: whoever breaks out of the guest into QEMU finds
	// no interface but that.
	cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC
	cmd.WaitDelay = stderrLimit
	err = m.Start(cmd)
	err = errors.Join(err, theirs.Close())
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}

	i := &instance{cmd: cmd, tail: tail, events: make(chan vmm.Event, eventBuffer), ended: make(chan struct{}), exited: make(chan struct{})}
	go i.reap()
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	i.qmp, err = openQMP(ctx, conn, i.take)
	if err == nil {
		if err = running(ctx, i.qmp); err != nil {
			err = errors.Join(err, i.qmp.close())
		}
	}
	if err != nil {
		err = errors.Join(err, i.Kill())
		<-i.exited
		// What QEMU says on its way out explains more than that it went.
		if said := tail.String(); said != "" {
			return nil, errors.New(said)
		}
		return nil, err
	}
	i.send(vmm.Event{Kind: vmm.Booted})
	go i.settle()
	return i, nil
}

// running makes sure that the machine runs.
func running(ctx context.Context, control *qmp) error {
	answer, err := control.do(ctx, "query-status")
	if err != nil {
		return err
	}
	var status struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	if err := json.Unmarshal(answer, &status); err != nil {
		return fmt.Errorf("cannot read QEMU's status: %w", err)
	}
	if !status.Running {
		return fmt.Errorf("the machine doesn't run: %s", status.Status)
	}
	return nil
}

// Limits of the devices' formats.
const (
	maxSerial = 20 // virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID
	maxTag    = 36 // virtio 1.2, 5.11.4
)

// check refuses what QEMU would take in silence and make something else of.
func check(m *vmm.Machine) error {
	switch {
	case m.VCPUs < 1:
		return fmt.Errorf("%d vCPUs", m.VCPUs)
	case m.Memory < mib || m.Memory%mib != 0:
		return fmt.Errorf("memory of %d bytes is no multiple of 1 MiB", m.Memory)
	case m.TAPFile != nil && len(m.MAC) != 6:
		return errors.New("a network card without a MAC address")
	case m.Agent != nil && m.Agent.Guest == nil:
		return errors.New("the agent's channel was not made by OpenChannel")
	}
	for _, d := range m.Disks {
		if d.ID == "" || len(d.ID) > maxSerial {
			return fmt.Errorf("disk id %q is not of 1 to %d bytes", d.ID, maxSerial)
		}
	}
	for _, s := range m.Shares {
		if s.Tag == "" || len(s.Tag) > maxTag {
			return fmt.Errorf("share tag %q is not of 1 to %d bytes", s.Tag, maxTag)
		}
	}
	return nil
}

// Where QEMU's own files are: beside a QEMU that was unpacked somewhere, or installed.
const (
	besideBinary  = "../share/qemu"
	installedData = "/usr/share/qemu"
	qboot         = "qboot.rom"
)

// files finds QEMU's directory of data, "" for its default, and the quick firmware, "" where it has none.
func (q *QEMU) files() (dataDir, firmware string) {
	binary := q.Binary
	if resolved, err := filepath.EvalSymlinks(binary); err == nil {
		binary = resolved
	}
	beside := filepath.Join(filepath.Dir(binary), besideBinary)
	if _, err := os.Stat(beside); err == nil && beside != installedData {
		dataDir = beside
	}
	path := filepath.Join(cmp.Or(dataDir, installedData), qboot)
	if _, err := os.Stat(path); err == nil {
		firmware = path
	}
	return dataDir, firmware
}

// instance is a running QEMU.
type instance struct {
	cmd  *exec.Cmd
	tail *vmm.Tail
	qmp  *qmp

	pausing sync.Mutex // held while the machine is paused or resumed
	paused  bool       // the process is stopped

	exited chan struct{} // closed when the process is reaped
	ended  chan struct{} // closed when exit is known

	mu     sync.Mutex
	state  ending
	events chan vmm.Event
	closed bool // events is closed

	exit vmm.Exit
}

// reap waits for the process.
func (i *instance) reap() {
	// Its error is what the process state says, or that standard error was held open, which changes nothing.
	err := i.cmd.Wait()
	i.mu.Lock()
	if status, ok := i.cmd.ProcessState.Sys().(syscall.WaitStatus); ok {
		i.state.status = status
	} else if err != nil {
		i.state.said = err.Error()
	}
	i.mu.Unlock()
	close(i.exited)
}

// settle waits until QEMU has ended and all that it said on QMP is read, and says how it ended.
func (i *instance) settle() {
	<-i.exited
	<-i.qmp.done
	i.mu.Lock()
	defer i.mu.Unlock()
	i.state.said = cmp.Or(i.tail.String(), i.state.said)
	i.exit = i.state.exit()
	i.closed = true
	close(i.events)
	close(i.ended)
}

// take takes an event of QMP.
func (i *instance) take(e qmpEvent) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch e.Name {
	case "GUEST_PANICKED":
		i.state.panicked = true
		i.sendLocked(vmm.Event{Kind: vmm.Panicked, Detail: e.Data.Action})
	case "SHUTDOWN":
		i.state.reason = e.Data.Reason
		switch e.Data.Reason {
		case reasonPowerOff:
			i.sendLocked(vmm.Event{Kind: vmm.PoweredOff, Detail: e.Data.Reason})
		case reasonReset:
			i.sendLocked(vmm.Event{Kind: vmm.Rebooting, Detail: e.Data.Reason})
		}
	}
}

func (i *instance) send(e vmm.Event) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.sendLocked(e)
}

// sendLocked drops an event that nobody has room for: the reader of QMP must go on.
func (i *instance) sendLocked(e vmm.Event) {
	if i.closed {
		return
	}
	select {
	case i.events <- e:
	default:
	}
}

func (i *instance) PID() int                 { return i.cmd.Process.Pid }
func (i *instance) Events() <-chan vmm.Event { return i.events }

func (i *instance) PowerButton(ctx context.Context) error {
	_, err := i.qmp.do(ctx, "system_powerdown")
	return err
}

// Pause runs QMP's stop, after which no vCPU executes and no device takes anything from its queues, and stops the process.
func (i *instance) Pause(ctx context.Context) error {
	i.pausing.Lock()
	defer i.pausing.Unlock()
	if i.paused {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, vmm.PauseLimit)
	defer cancel()
	if _, err := i.qmp.do(ctx, "stop"); err != nil {
		fmt.Fprintf(i.tail, "clawvm: %v; QEMU is stopped as it is\n", err)
	}
	if err := vmm.Freeze(i.cmd.Process); err != nil {
		return fmt.Errorf("cannot stop qemu: %w", err)
	}
	i.paused = true
	return nil
}

// Resume lets the process go on, and runs QMP's cont, which QEMU takes for a machine that runs, too.
func (i *instance) Resume(ctx context.Context) error {
	i.pausing.Lock()
	defer i.pausing.Unlock()
	if !i.paused {
		return nil
	}
	if err := i.wake(); err != nil {
		return err
	}
	_, err := i.qmp.do(ctx, "cont")
	return err
}

// wake lets the process go on; its machine stays paused.
func (i *instance) wake() error {
	if err := vmm.Thaw(i.cmd.Process); err != nil {
		return fmt.Errorf("cannot let qemu go on: %w", err)
	}
	i.paused = false
	return nil
}

// Stop asks QEMU to quit. That it is gone before it answered is no error.
func (i *instance) Stop(ctx context.Context) error {
	i.ask()
	i.pausing.Lock()
	err := i.wake()
	i.pausing.Unlock()
	if err != nil {
		return err
	}
	_, err = i.qmp.do(ctx, "quit")
	if errors.Is(err, errQMPClosed) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return err
}

func (i *instance) Kill() error {
	i.ask()
	if err := i.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("cannot kill qemu: %w", err)
	}
	return nil
}

// ask notes that the end to come is one that was asked for.
func (i *instance) ask() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.state.asked = true
}

func (i *instance) Wait() vmm.Exit {
	<-i.ended
	return i.exit
}

// Close closes the control connection; QEMU leaves no files.
func (i *instance) Close() error {
	if err := i.qmp.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("cannot close qemu's control connection: %w", err)
	}
	return nil
}
