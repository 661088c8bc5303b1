// Package gate is the unprivileged half of a running VM: the one process through
// which everything between the guest and the outside goes (the agent's
// connection, the resolver, published ports, the console, the logs), because it
// parses what the guest sends.
//
// It runs under a uid of its own without capabilities, can open nothing but the
// VM's log directory, and works on descriptors that the supervisor opened for
// it. A guest that takes the gate over holds what the gate holds: its own
// network, its own logs, and the small protocol of [Message] to a supervisor
// that checks each one.
package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"

	"github.com/clawvm/clawvm/network/egress"
	"github.com/clawvm/clawvm/network/egress/policy"
)

// The descriptors that the supervisor hands over, before those that
// Config.Files names.
const (
	controlFD  = 3 // a SOCK_SEQPACKET pair's end: see Message
	configFD   = 4 // a file that holds the Config as JSON
	firstNamed = 5
)

// Config is what the supervisor tells the gate. It holds no secret.
type Config struct {
	VM      string     `json:"vm"`
	Address netip.Addr `json:"address"` // the guest's
	// Resolver is where the guest's queries arrive.
	Resolver netip.AddrPort `json:"resolver"`
	Naming
	// AgentListens: the agent's descriptor is a listening socket on which the
	// guest's connection arrives; else it is the connection.
	AgentListens bool `json:"agentListens,omitempty"`
	// InstructionClock: the guest's clock is not the host's, and is left alone.
	InstructionClock bool `json:"instructionClock,omitempty"`
	// Ports are the published ports; the descriptor of the i-th is "port:i".
	Ports []Forward `json:"ports,omitempty"`
	// Logs is the directory that the gate may write.
	Logs string `json:"logs"`
	// Files names the descriptors that follow, in their order.
	Files []string `json:"files"`
}

// Naming is how the guest's queries are answered.
type Naming struct {
	// Upstreams are where they go.
	Upstreams []netip.AddrPort `json:"upstreams,omitempty"`
	// Policy is what the VM may reach.
	Policy policy.Spec `json:"policy"`
}

// Forward is one published port.
type Forward struct {
	Host  string `json:"host"` // where the host listens, for messages
	Guest uint16 `json:"guest"`
}

// Names of descriptors.
const (
	FileAgent     = "agent"
	FileConsole   = "console"   // the read end of the guest's console
	FileExec      = "exec"      // a listening unix socket for the command line
	FileDNSPacket = "dns-udp"   // bound to the bridge's address
	FileDNSStream = "dns-tcp"   // listening on the bridge's address
	FileFlows     = "flows"     // NFLOG
	FileConntrack = "conntrack" // conntrack events
	FilePins      = "pins"      // a SOCK_SEQPACKET pair's end, for Pin and its answers alone
)

// FilePort is the name of a published port's listening socket.
func FilePort(i int) string { return fmt.Sprintf("port:%d", i) }

// heapGrowth trades a little processor time for memory: there is a gate for
// every VM, and none of them holds much.
const heapGrowth = 30

// Main is the gate's process. It returns the process's exit code.
func Main() int {
	debug.SetGCPercent(heapGrowth)
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "gate:", err)
		return 1
	}
	return 0
}

func run() error {
	raw, err := io.ReadAll(os.NewFile(configFD, "config"))
	if err != nil {
		return fmt.Errorf("cannot read the configuration: %w", err)
	}
	var c Config
	if err := json.Unmarshal(raw, &c); err != nil {
		return fmt.Errorf("cannot read the configuration: %w", err)
	}
	if err := confine(c); err != nil {
		return err
	}
	g := &gate{
		Config: c, files: make(map[string]*os.File), publisher: newPublisher(c.Address),
		naming: newNaming(c.Naming),
	}
	for i, name := range c.Files {
		g.files[name] = os.NewFile(uintptr(firstNamed+i), name)
	}
	if g.supervisor, err = Open(os.NewFile(controlFD, "control")); err != nil {
		return err
	}
	// The supervisor says when the gate ends; a ^C on the terminal does not.
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
	return g.serve()
}

// gate is a running gate.
type gate struct {
	Config
	files      map[string]*os.File
	supervisor *Conn
	events     *egress.Log
	names      egress.Names // which name led to an address
	agent      agentLink
	publisher  *publisher
	naming     *naming // how names are resolved now, and what may be reached
	pins       *pinning
}

// part is one of the things that a gate does until it ends.
type part struct {
	name string
	run  func(context.Context) error
}

// serve runs all parts. The gate ends when its supervisor does, or when one part
// fails: a VM whose resolver or log is gone must not go on unseen.
func (g *gate) serve() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	log, err := egress.OpenLog(g.netLog(), egress.LogOptions{})
	if err != nil {
		return err
	}
	g.events = log
	parts := []part{
		{"the supervisor's messages", g.obey},
		{"the console", g.console},
		{"the agent", g.serveAgent},
		{"exec", g.serveExec},
		{"the published ports", g.publishAll},
	}
	if g.files[FileDNSPacket] != nil {
		conn, err := Open(g.files[FilePins])
		if err != nil {
			return err
		}
		g.pins = newPinning(conn)
		parts = append(parts, part{"the resolver", g.resolver}, part{"the flow log", g.flows}, part{"the pinned addresses", g.pins.run})
	}
	var wg sync.WaitGroup
	errs := make(chan error, len(parts))
	for _, p := range parts {
		wg.Go(func() {
			err := p.run(ctx)
			if errors.Is(err, errPeerGone) {
				// What a part has to say, nobody hears any more: the gate ends as it does when its reader sees it.
				err = nil
				cancel()
			}
			if err != nil && ctx.Err() == nil {
				err = fmt.Errorf("cannot go on with %s: %w", p.name, err)
			}
			errs <- err
			if err != nil || p.name == "the supervisor's messages" {
				cancel()
			}
		})
	}
	<-ctx.Done()
	err = <-errs
	for _, f := range g.files {
		// Unblocks what still reads. Some are closed already.
		if cerr := f.Close(); cerr != nil && !errors.Is(cerr, os.ErrClosed) {
			err = errors.Join(err, cerr)
		}
	}
	wg.Wait()
	return errors.Join(err, log.Close())
}

// listener makes a listener of a descriptor.
func (g *gate) listener(name string) (net.Listener, error) {
	l, err := net.FileListener(g.files[name])
	if err != nil {
		return nil, fmt.Errorf("cannot listen on descriptor %s: %w", name, err)
	}
	return l, nil
}
