package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/vmm"
	"github.com/clawvm/clawvm/vmm/cloudhypervisor"
	"github.com/clawvm/clawvm/vmm/qemu"
)

// starts is the comparison under one VMM. All times are in milliseconds.
type starts struct {
	Emulated bool   `json:"emulated"`
	Pairs    []pair `json:"pairs"`
}

// pair is a start of each, one right after the other.
type pair struct {
	Up   up      `json:"up"`
	Bare float64 `json:"bare"` // from the VMM's start to the byte of its guest's init
}

// up is one `clawvm up`, and where its time went. Before, VMM, Guest and After
// are the whole of Total, one after the other.
type up struct {
	Total float64 `json:"total"` // from the command's start to its end
	// Before is what passes until the supervisor turns to the VMM; Command is the part of it until the
	// supervisor has its lock: the command's checks and two starts of the program.
	Before  float64 `json:"before"`
	Command float64 `json:"command"`
	VMM     float64 `json:"vmm"`   // until the VMM's guest runs
	Guest   float64 `json:"guest"` // until the guest has said that it is ready
	After   float64 `json:"after"` // until the command has ended
	Steps   []step  `json:"steps"`
}

// ours is what a start takes on the host beside VMM and guest.
func (u up) ours() float64 { return u.Before + u.After }

type step struct {
	Name string  `json:"name"`
	Took float64 `json:"took"`
}

// vmmStep is the supervisor's step that starts the VMM.
const vmmStep = "VM"

// measureStarts compares `clawvm up` with the bare VMM.
func (w *world) measureStarts(ctx context.Context, name string, pairs int) (starts, error) {
	s := starts{Emulated: !w.facts.Hardware()}
	b, err := w.newBare(ctx, name)
	if err != nil {
		return s, err
	}
	if err := w.declare("one", name); err != nil {
		return s, err
	}
	// The first start of each makes what is kept, and fills the caches.
	for i := -1; i < pairs; i++ {
		var p pair
		measure := []func() error{
			func() (err error) { p.Up, err = w.up(ctx, "one"); return err },
			func() (err error) { p.Bare, err = b.start(ctx); return err },
		}
		if i%2 != 0 {
			measure[0], measure[1] = measure[1], measure[0]
		}
		if err := errors.Join(measure[0](), measure[1]()); err != nil {
			return s, err
		}
		if i < 0 {
			continue
		}
		s.Pairs = append(s.Pairs, p)
		fmt.Fprintf(os.Stderr, "%s %d/%d: up %.0f ms (ours %.0f), bare %.0f ms\n", name, i+1, pairs, p.Up.Total, p.Up.ours(), p.Bare)
	}
	return s, nil
}

// event is what the supervisor tells of its progress.
type event struct {
	Time  time.Time `json:"time"`
	Step  string    `json:"step"`
	State string    `json:"state"`
}

// up starts a VM, measures that, and takes it down again.
func (w *world) up(ctx context.Context, name string) (u up, err error) {
	began := time.Now()
	if _, err := w.clawvm(ctx, "up", name); err != nil {
		return u, err
	}
	ended := time.Now()
	defer func() {
		_, derr := w.clawvm(context.WithoutCancel(ctx), "down", "--timeout", "10s", name)
		err = errors.Join(err, derr)
	}()
	u.Total = ms(ended.Sub(began))

	client := w.supervisor(name)
	var status struct {
		Started time.Time `json:"started"`
	}
	if err := client.get(ctx, "status", &status); err != nil {
		return u, err
	}
	var events []event
	if err := client.stream(ctx, "progress", func(d *json.Decoder) error {
		var e event
		err := d.Decode(&e)
		events = append(events, e)
		return err
	}); err != nil {
		return u, err
	}
	begun := map[string]time.Time{}
	var vmmBegun, vmmDone time.Time
	for _, e := range events {
		switch e.State {
		case "begun":
			begun[e.Step] = e.Time
			if e.Step == vmmStep {
				vmmBegun = e.Time
			}
		case "done":
			u.Steps = append(u.Steps, step{e.Step, ms(e.Time.Sub(begun[e.Step]))})
			if e.Step == vmmStep {
				vmmDone = e.Time
			}
		case "ready":
			u.Guest, u.After = ms(e.Time.Sub(vmmDone)), ms(ended.Sub(e.Time))
		}
	}
	if vmmBegun.IsZero() || vmmDone.IsZero() || u.After == 0 {
		return u, fmt.Errorf("the supervisor's progress is not that of a start: %v", events)
	}
	u.Command = ms(status.Started.Sub(began))
	u.Before, u.VMM = ms(vmmBegun.Sub(began)), ms(vmmDone.Sub(vmmBegun))
	return u, nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// supervisor speaks to a VM's control socket.
type supervisor struct{ http *http.Client }

func (w *world) supervisor(name string) supervisor {
	path := filepath.Join(w.root, "run/clawvm", name, "control.sock")
	return supervisor{&http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// stream calls each until it returns io.EOF.
func (s supervisor) stream(ctx context.Context, what string, each func(*json.Decoder) error) error {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://supervisor/v1/"+what, nil)
	if err != nil {
		return err
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	d := json.NewDecoder(resp.Body)
	for {
		if err := each(d); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("cannot read the supervisor's answer: %w", err)
		}
	}
}

func (s supervisor) get(ctx context.Context, what string, v any) error {
	return s.stream(ctx, what, func(d *json.Decoder) error {
		if err := d.Decode(v); err != nil {
			return err
		}
		return io.EOF
	})
}

// bare is the VMM with clawvm's command line, less network and shares, and the
// trivial init.
type bare struct {
	vmm     vmm.VMM
	machine vmm.Machine
	vsock   bool
}

// bareID is the uid that the bare VMM runs as: nobody's, and no VM's.
const bareID = 2100000000

func (w *world) newBare(ctx context.Context, name string) (*bare, error) {
	b := &bare{vsock: name == vmm.CloudHypervisor}
	if b.vsock {
		b.vmm = cloudhypervisor.New(w.facts.CloudHypervisor)
	} else {
		q := qemu.New(w.facts.QEMU)
		q.KVM = w.facts.Hardware()
		b.vmm = q
	}
	boot, err := kernel.Prepare(ctx, w.kernel, w.trivial, "/run/bare-boot")
	if err != nil {
		return nil, err
	}
	const dir, initramfs = "/run/bare", "/run/bare-initramfs"
	if err := errors.Join(os.Mkdir(dir, 0o710), os.Chmod(dir, 0o710), os.Chown(dir, 0, bareID)); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	f, err := os.OpenFile(initramfs, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(kernel.WriteInitramfs(f, boot.Initramfs, []byte("{}")), f.Close()); err != nil {
		return nil, err
	}
	cmdline := kernel.Cmdline(kernel.CmdlineOptions{Emulated: !w.facts.Hardware()})
	if b.vsock {
		cmdline += " channel=vsock"
	}
	b.machine = vmm.Machine{
		Name: "bare", VCPUs: 1, Memory: 256 << 20, Kernel: boot.Vmlinux, Initramfs: initramfs, Cmdline: cmdline,
		Dir: dir, UID: bareID, GID: bareID,
	}
	if w.facts.Hardware() && w.facts.KVMGroup >= 0 {
		b.machine.Groups = []int{w.facts.KVMGroup}
	}
	return b, nil
}

// start runs the machine until its byte arrives, and says how long that took
// from the moment when the VMM's process was started.
func (b *bare) start(ctx context.Context) (took float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	m := b.machine
	console, write, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	m.Console = write
	said := make(chan []byte, 1)
	go func() {
		// What was read before an error is what there is to show.
		text, _ := io.ReadAll(console)
		said <- text
	}()
	if m.Agent, err = b.vmm.OpenChannel(&m); err != nil {
		return 0, errors.Join(err, write.Close(), console.Close())
	}
	var began time.Time
	m.Spawn = func(cmd *exec.Cmd) error {
		began = time.Now()
		return cmd.Start()
	}
	arrived := make(chan error, 1)
	var at time.Time
	go func() {
		err := b.await(ctx, m.Agent)
		at = time.Now()
		arrived <- err
	}()
	instance, err := b.vmm.Start(ctx, &m)
	if err == nil {
		ended := make(chan struct{})
		go func() { instance.Wait(); close(ended) }()
		select {
		case err = <-arrived:
		case <-ended:
			err = fmt.Errorf("the bare VMM ended: %s", instance.Wait())
		case <-ctx.Done():
			err = ctx.Err()
		}
		err = errors.Join(err, instance.Kill())
		instance.Wait()
		err = errors.Join(err, instance.Close())
	}
	if err := errors.Join(err, m.Agent.Close(), write.Close()); err != nil {
		return 0, fmt.Errorf("%w\n%s", err, <-said)
	}
	<-said
	return ms(at.Sub(began)), console.Close()
}

// await waits for the byte.
func (b *bare) await(ctx context.Context, c *vmm.Channel) error {
	var conn net.Conn
	if c.Listening {
		l, err := net.FileListener(c.Host)
		if err != nil {
			return err
		}
		defer l.Close()
		defer context.AfterFunc(ctx, func() { l.Close() })()
		if conn, err = l.Accept(); err != nil {
			return err
		}
	} else {
		var err error
		if conn, err = net.FileConn(c.Host); err != nil {
			return err
		}
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}
