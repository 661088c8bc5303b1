// Package vmm says what a virtual machine monitor is: a machine's description goes in, a running machine comes out.
// The implementations are in cloudhypervisor/ and qemu/; which of them serves a VM is Choose's decision.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// AgentPort is the vsock port of the host (CID 2) that the guest's agent dials under cloud-hypervisor.
const AgentPort = 1024

// AgentPortName is the name of the virtio-serial port under QEMU, as the guest reads it in
// /sys/class/virtio-ports/*/name.
const AgentPortName = "agent"

// Machine describes one virtual machine, whichever program runs it. A VMM changes nothing in it.
type Machine struct {
	Name   string // the VM's name; shows in the process list
	VCPUs  int
	Memory int64 // bytes, a multiple of 1 MiB

	Kernel    string // an ELF vmlinux with a PVH entry
	Initramfs string
	Cmdline   string

	Disks  []Disk
	Shares []Share

	TAP     string   // the TAP's name, made before and owned by UID; "" for a machine without a network
	TAPFile *os.File // the TAP, opened with IFF_VNET_HDR; QEMU uses it, cloud-hypervisor opens TAP by its name
	MAC     net.HardwareAddr

	// Agent is what OpenChannel gave; nil for a machine without an agent.
	Agent *Channel

	// Dir is a directory (0710 root:GID) below which the VMM's sockets are made; short enough for a socket's path.
	Dir    string
	UID    int
	GID    int
	Groups []int // further groups, such as kvm's; nothing is added to them

	Console *os.File // where the guest's console (hvc0) is written; the write end of a pipe. The caller keeps and closes its own copy.
	Log     *os.File // what the VMM itself says on its standard error. The caller keeps and closes its own copy.

	// InstructionClock lets an emulated guest's clock run by its instructions, so that time limits in it hold
	// however slow the host is. It takes one vCPU. Without meaning where the hardware runs the guest.
	InstructionClock bool

	// Spawn starts the process; nil means (*exec.Cmd).Start. The VMM waits on it itself.
	Spawn func(*exec.Cmd) error
}

// Disk is a raw disk image. The guest finds it by its serial, which is ID.
type Disk struct {
	ID       string // at most 20 bytes, which is what a virtio-blk serial holds
	Path     string // owned by, or readable to, the VMM's uid
	ReadOnly bool
}

// Share is a directory that a running virtiofsd serves.
type Share struct {
	Tag    string // the virtiofs mount's source, at most 36 bytes
	Socket string // virtiofsd's listening socket
}

// VMM is a program that can run a Machine.
type VMM interface {
	// Name is what a declaration calls it: "cloud-hypervisor" or "qemu".
	Name() string
	// Version asks the installed program.
	Version(ctx context.Context) (string, error)
	// OpenChannel makes the agent's channel; before Start, so that its host end can be handed on first.
	// The caller puts it into m.Agent and closes it if Start is never called.
	OpenChannel(m *Machine) (*Channel, error)
	// Start starts the program and the machine, and returns when the guest's processors run. On an error nothing
	// is left; the error has the end of what the program said. m.Agent.Guest is closed either way.
	Start(ctx context.Context, m *Machine) (Instance, error)
}

// PauseLimit is how long a VMM may take to pause its machine in order. It takes milliseconds; whoever pulls a brake waits no longer
// for what may be in the guest's hands.
const PauseLimit = 5 * time.Second

// Instance is a running machine. It is used once: after Wait returned, Close is all that is left to do.
type Instance interface {
	// PID is the VMM's process.
	PID() int
	// Events tells of the machine's life; closed when the process has ended. It is buffered, and what nobody reads
	// in time is dropped: how the machine ended is Wait's to say.
	Events() <-chan Event
	// PowerButton presses the machine's power button; what comes of it is up to the guest.
	PowerButton(ctx context.Context) error
	// Pause stops the machine until Resume: first the guest's processors and devices, by the VMM, so that the guest's own
	// clocks stand still; then the VMM's process (SIGSTOP), so that a guest which has broken out into it stands still
	// too. A VMM that does not answer within PauseLimit is stopped all the same. One that is paused already is no error.
	Pause(ctx context.Context) error
	// Resume lets a paused machine go on where it was; its clock is behind by the time of the pause. One that isn't paused
	// is no error.
	Resume(ctx context.Context) error
	// Alive says why the VMM's process can't be told from one that hangs. A paused one answers nothing and is no error.
	Alive(ctx context.Context) error
	// Stop asks the VMM to end at once, whatever the guest does, paused or not.
	Stop(ctx context.Context) error
	// Kill kills the process; no error when it has ended already.
	Kill() error
	// Wait blocks until the process has ended and says why. It may be called by several, and again.
	Wait() Exit
	// Close removes what the instance leaves behind (sockets, files in Dir). Only after Wait has returned.
	Close() error
}

// Channel is how host and guest agent reach each other.
type Channel struct {
	// Host is the gate's end. The caller hands it on, and closes it with Close.
	Host *os.File
	// Listening: Host is a listening unix socket, and the guest makes a connection each time that it dials
	// AgentPort. Otherwise Host is one end of a connected stream that carries whatever the guest's port carries.
	Listening bool
	// Guest is the VMM's end where there is one to inherit (QEMU). Start closes it.
	Guest *os.File
	// Path is the socket in the file system where there is one (cloud-hypervisor); the instance's Close removes it.
	Path string
}

// Close closes what is open of both ends; what is closed already is no error.
func (c *Channel) Close() error {
	if c == nil {
		return nil
	}
	return errors.Join(closeOnce(c.Host), closeOnce(c.Guest))
}

func closeOnce(f *os.File) error {
	if f == nil {
		return nil
	}
	if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Event is something that the VMM said about its guest.
type Event struct {
	Kind   EventKind
	Detail string // the VMM's own words
}

// EventKind says what happened.
type EventKind int

// The kinds of events.
const (
	Booted     EventKind = iota + 1 // the guest's processors run
	Rebooting                       // the guest asked for a reset
	PoweredOff                      // the guest turned itself off
	Panicked                        // the guest's kernel said through pvpanic that it is done for
)

// String is the kind in words.
func (k EventKind) String() string {
	switch k {
	case Booted:
		return "booted"
	case Rebooting:
		return "rebooting"
	case PoweredOff:
		return "powered off"
	case Panicked:
		return "panicked"
	}
	return fmt.Sprintf("event %d", int(k))
}

// Exit says how a machine ended.
type Exit struct {
	Reason ExitReason
	Code   int            // the VMM's exit code, -1 when a signal ended it
	Signal syscall.Signal // the signal that ended the VMM, or 0
	Detail string         // why, in the VMM's words where it had any; the end of its standard error for Failed
}

// ExitReason is why a machine ended.
type ExitReason int

// The reasons. A reset that no panic explains counts as a reboot: a guest that has no pvpanic driver yet looks the
// same when it panics.
const (
	ExitPoweredOff ExitReason = iota + 1 // the guest turned itself off
	ExitRebooted                         // the guest asked for a reset, and the VMM ended for it
	ExitPanicked                         // the guest's kernel panicked
	ExitKilled                           // somebody ended the VMM: Stop, Kill or a signal from elsewhere
	ExitFailed                           // the VMM ended by itself
)

// String is the reason in words.
func (r ExitReason) String() string {
	switch r {
	case ExitPoweredOff:
		return "powered off"
	case ExitRebooted:
		return "rebooted"
	case ExitPanicked:
		return "panicked"
	case ExitKilled:
		return "killed"
	case ExitFailed:
		return "failed"
	}
	return fmt.Sprintf("exit %d", int(r))
}

// String is one line for a person: the reason, and what explains it.
func (e Exit) String() string {
	s := e.Reason.String()
	switch {
	case e.Signal != 0:
		s += " by signal " + fmt.Sprint(int(e.Signal)) + " (" + e.Signal.String() + ")"
	case e.Code != 0:
		s += fmt.Sprintf(" with exit code %d", e.Code)
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}
