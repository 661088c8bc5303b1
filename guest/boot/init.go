package boot

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
	"golang.org/x/sys/unix"
)

// guestInit is the guest's first process.
type guestInit struct {
	doc      *guest.Document
	board    *agent.Board
	log      *agent.Log
	server   *agent.Server // nil until the agent was started
	children *children
	box      *sandbox
	mounted  []guest.Mount
	upper    *os.File // the overlay's disk; nil for a tmpfs
	ends     chan ending
}

// ending is how the guest is to end.
type ending struct {
	reason string
	code   int
	detail string
	grace  time.Duration // for the workload; 0: as declared
}

func runInit() int {
	g := &guestInit{board: agent.NewBoard(), log: agent.NewLog(), children: newChildren(), ends: make(chan ending, 1)}
	s, err := g.setUp()
	if err != nil {
		warn("%v", err)
		return g.finish(ending{reason: agent.ReasonFailed, code: 1, detail: err.Error()})
	}
	return g.finish(g.live(s))
}

// end asks the guest to end; the first one counts.
func (g *guestInit) end(e ending) {
	select {
	case g.ends <- e:
	default:
	}
}

// live runs the workload until the guest is to end.
func (g *guestInit) live(s *supervisor) ending {
	if s == nil {
		// Nothing is to be waited for.
		g.board.Post(agent.Event{Kind: agent.Ready, Uptime: uptime()})
		return <-g.ends
	}
	over := make(chan outcome, 1)
	go func() { over <- s.run() }()
	select {
	case o := <-over:
		return ending{reason: agent.ReasonExit, code: o.Code, detail: o.Detail}
	case e := <-g.ends:
		s.stop(e.grace)
		e.code = (<-over).Code
		return e
	}
}

// setUp brings the guest from the initramfs to where the workload can be started. The supervisor is nil when there is no workload.
func (g *guestInit) setUp() (*supervisor, error) {
	if err := mountKernel(); err != nil {
		return nil, err
	}
	go g.children.reap(context.Background())
	if err := g.readDocument(); err != nil {
		return nil, err
	}
	if err := loadModules(guest.ModulesPath); err != nil {
		return nil, err
	}
	// From here on the host hears what goes wrong.
	g.startAgent()
	if err := watchSignals(func(reason string) { g.end(ending{reason: reason}) }); err != nil {
		return nil, fmt.Errorf("cannot watch for signals: %w", err)
	}
	go watchPowerButton(func() { g.end(ending{reason: agent.ReasonPowerOff}) })
	for _, step := range []func() error{g.changeRoot, g.mountDeclared, g.setIdentity, limitProcesses, setParameters} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	if err := configureNetwork(g.doc.Network); err != nil {
		return nil, fmt.Errorf("cannot configure the network: %w", err)
	}
	return g.prepareWorkload()
}

func (g *guestInit) readDocument() error {
	data, err := os.ReadFile(guest.DocumentPath)
	if err != nil {
		return fmt.Errorf("cannot read the boot document: %w", err)
	}
	if g.doc, err = guest.Decode(data); err != nil {
		return err
	}
	return os.Remove(guest.DocumentPath) // it is memory
}

// startAgent begins to look for the host, and goes on until the guest ends.
func (g *guestInit) startAgent() {
	g.server = &agent.Server{
		Hello:    agent.Hello{Version: version(), Name: g.doc.Name, Boot: oneLine("/proc/sys/kernel/random/boot_id"), Kernel: oneLine("/proc/sys/kernel/osrelease")},
		Board:    g.board,
		Log:      g.log,
		Clock:    g.setClock,
		Shutdown: func(grace time.Duration) { g.end(ending{reason: agent.ReasonPowerOff, grace: grace}) },
	}
	open, resync := agent.OpenPort, true
	if g.doc.Transport == guest.TransportVsock {
		open, resync = agent.DialHost, false
	}
	go g.server.Run(context.Background(), open, resync, func(err error) { warn("agent: %v", err) })
}

func oneLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// setClock sets the time, unless the clock counts instructions: then it is meant to run at its own pace.
func (g *guestInit) setClock(t time.Time) error {
	if g.doc.InstructionClock {
		return nil
	}
	tv := unix.NsecToTimeval(t.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		return fmt.Errorf("cannot set the clock: %w", err)
	}
	return nil
}

func (g *guestInit) changeRoot() error {
	if err := mountRoot(g.doc.Root); err != nil {
		return err
	}
	if g.doc.Root.Upper.Disk != "" {
		upper, err := os.Open(upperDir)
		if err != nil {
			return err
		}
		g.upper = upper
	}
	return switchRoot()
}

func selfFile(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func (g *guestInit) mountDeclared() error {
	g.mounted = g.doc.Mounts
	return mountAll(g.doc.Mounts)
}

// setIdentity sets the host name and writes the files.
func (g *guestInit) setIdentity() error {
	if err := unix.Sethostname([]byte(g.doc.Hostname)); err != nil {
		return fmt.Errorf("cannot set the host name: %w", err)
	}
	if err := writeFiles("", ownFiles(g.doc)); err != nil {
		return err
	}
	return writeFiles("", g.doc.Files)
}

// Limits that every program starts with. The soft limit of open files is the one that select(2) can bear, the hard one systemd's;
// memory dumps could hold secrets.
const (
	softFiles = 1024
	hardFiles = 512 << 10
)

func limitProcesses() error {
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: softFiles, Max: hardFiles}); err != nil {
		return fmt.Errorf("cannot limit the open files: %w", err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("cannot forbid memory dumps: %w", err)
	}
	return nil
}

// parameters are kernel parameters that every guest gets: what a distribution's init would set, and doors that no workload needs.
var parameters = [][2]string{
	{"user/max_user_namespaces", "0"}, // all capabilities are to be had in a user namespace
	{"kernel/unprivileged_bpf_disabled", "1"},
	{"kernel/kptr_restrict", "2"},
	{"kernel/dmesg_restrict", "1"},
	{"kernel/yama/ptrace_scope", "1"},
	{"fs/protected_hardlinks", "1"},
	{"fs/protected_symlinks", "1"},
	{"fs/protected_fifos", "1"},
	{"fs/protected_regular", "2"},
	{"net/ipv4/ping_group_range", "0 2147483647"}, // ping without a capability
}

func setParameters() error {
	for _, p := range parameters {
		if err := setSysctl(p[0], p[1]); err != nil {
			return err
		}
	}
	return nil
}

// prepareWorkload makes the sandbox and what runs in it.
func (g *guestInit) prepareWorkload() (*supervisor, error) {
	executed, err := newCgroup("exec")
	if err != nil {
		return nil, err
	}
	own, err := newCgroup("workload")
	if err != nil {
		return nil, err
	}
	if g.box, err = newSandbox(); err != nil {
		return nil, err
	}
	r := &runner{etc: "/etc", workload: g.doc.Workload, box: g.box, group: executed, children: g.children}
	g.server.SetRunner(r)
	if g.doc.Workload == nil {
		return nil, nil
	}
	addresses := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	if g.doc.Network != nil {
		addresses = append([]netip.Addr{g.doc.Network.Address}, addresses...)
	}
	var health func(context.Context) error
	if h := g.doc.Workload.Health; h != nil {
		health = newHealthLook(h, addresses, r.run)
	}
	return &supervisor{
		workload: g.doc.Workload,
		command:  r.workloadCommand,
		probe:    newProbe(g.doc.Workload.Ready, addresses, r.run),
		health:   health,
		killed:   killedForMemory,
		children: g.children,
		group:    own,
		log:      g.log,
		board:    g.board,
		uptime:   uptime,
		stopping: make(chan struct{}),
	}, nil
}

// uptime is the time since the kernel's start in seconds.
func uptime() float64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return float64(ts.Nano()) / 1e9
}
