package host

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/internal/durable"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/secrets"
	"github.com/clawvm/clawvm/storage"
	"github.com/clawvm/clawvm/vmm"
)

// life is one run of a VM from its first step to the end of its VMM. A reboot is
// the next life.
type life struct {
	*Supervisor
	undo undoStack

	// What the steps find and make, in their order.
	own            []string // published ports that the VM holds already; of a check only
	hostConfig     *config.Host
	vm             *config.VM
	secrets        []secrets.Secret
	image          *storage.Image
	user           user
	vmmProgram     vmm.VMM
	vmmVersionText string
	hostFacts      vmm.Facts
	emulated       bool
	virtiofsd      *storage.Virtiofsd
	kernel         *kernel.Kernel
	boot           *kernel.Boot
	address        netip.Addr
	index          int // the address's place in the subnet
	ids            ids
	bridge         network.Bridge
	rules          network.Rules
	disks          []vmm.Disk
	sockets        sockets
	leaves         leaves
	machine        vmm.Machine
	gate           *gateProcess
	daemons        []*storage.Daemon
	daemonLogs     []*wordLog // theirs, in the same order
	instance       vmm.Instance

	// What happens to it.
	gone      <-chan struct{} // closed when the VMM has ended
	lost      <-chan error    // the first virtiofsd that ended
	workload  *gate.Message   // how the workload ended last
	announced *gate.Message   // how the guest said that it ends

	healthSaid time.Time // when a change of the health was logged last

	met      bool          // the guest's agent has been reached
	paused   bool          // see pause.go
	clockSet chan struct{} // the gate's answers to resumes

	ruled     atomic.Pointer[network.Guest] // what the packet filter knows of the VM
	pins      *pins                         // and what it let the VM reach for a time
	reachable map[uint16]bool               // ports of the guest that the gate may connect to

	unwatch func() error // ends the watch of the secrets' sources
	staging sync.Mutex   // held while the staged secrets are written or taken away
	staged  bool         // they may be written: their tmpfs is there
}

// step is one thing that up does. It pushes what takes it down again on the undo
// stack as soon as there is something to take down, so that a step which fails
// half-way is undone like any other.
type step struct {
	name  string
	phase string // what `up` shows: some steps together
	do    func(*life, context.Context) error
}

// phaseCheck is the phase of the steps that only find out, and can be taken
// without bringing a VM up.
const phaseCheck = "check"

// steps is the whole of up, in order. The first group changes nothing: what is
// wrong with the declaration, or missing on the host, is said before anything is
// made.
func steps() []step {
	return []step{
		{"declaration", phaseCheck, (*life).loadDeclaration},
		{"secrets", phaseCheck, (*life).checkSecrets},
		{"image", phaseCheck, (*life).openImage},
		{"VMM", phaseCheck, (*life).chooseVMM},
		{"kernel", phaseCheck, (*life).prepareKernel},
		{"address", phaseCheck, (*life).checkAddress},
		{"bridge", phaseCheck, (*life).checkBridge},
		{"shares", phaseCheck, (*life).checkShares},
		{"ports", phaseCheck, (*life).checkPorts},

		{"left-overs", "disks", (*life).cleanUp},
		{"lease", "disks", (*life).lease},
		{"disks", "disks", (*life).prepareDisks},
		{"staging", "disks", (*life).stageSecrets},
		{"port", "network", (*life).attachPort},
		{"sockets", "network", (*life).openSockets},
		{"rules", "network", (*life).applyRules},
		{"limits", "network", (*life).setLimits},
		{"gate", "network", (*life).startGate},
		{"boot document", "VM", (*life).writeBootDocument},
		{"servers of shares", "VM", (*life).startShares},
		{"VM", "VM", (*life).startVMM},
		{"guest", "guest", (*life).awaitGuest},
		{"ready", "ready", (*life).awaitReady},
	}
}

// live brings the VM up, waits for its end and says how it ended, with an error
// where that is a failure. Whatever it put up is on the undo stack when it returns.
func (l *life) live(ctx context.Context) (EndKind, error) {
	// A request to end also ends a start that is under way.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stopWatching := make(chan struct{})
	var grace time.Duration
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case grace = <-l.down:
			cancel(errDown)
		case <-ctx.Done():
			grace = defaultGrace
		case <-stopWatching:
		}
	})
	err := l.bringUp(ctx)
	kind := kindOf(err)
	if err == nil {
		l.isUp()
		l.journal.add(Progress{State: VMReady})
		l.begin()
		l.tellSystemd("READY=1")
		l.logf("ready")
		// What the start needed, a running VM does not: the kernel's files above all, where they had to be made.
		go debug.FreeOSMemory()
		kind, err = l.awaitEnd(ctx)
	}
	asked := ctx.Err() != nil
	close(stopWatching)
	watching.Wait()
	l.update(func(st *Status) { st.State, st.Step = Stopping, "" })
	if asked {
		l.tellSystemd("STOPPING=1")
		return EndByOwner, l.shutDown(grace)
	}
	if kind == EndReboot {
		err = nil // what the guest asks for is not a failure, were it during the start
	}
	return kind, err
}

// errDown is the cause of a context that ended because the owner asked for it.
var errDown = errors.New("the owner asked for the VM's end")

// bringUp takes the steps.
func (l *life) bringUp(ctx context.Context) error {
	for _, st := range steps() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		l.update(func(s *Status) { s.Step = st.name })
		l.journal.add(Progress{Step: st.name, Phase: st.phase, State: StepBegun})
		began := time.Now()
		err := guarded(st.name, func() error { return st.do(l, ctx) })
		took := time.Since(began)
		if err != nil {
			err = cannotStart(l.name, stepError{st.name, err})
			l.journal.add(Progress{Step: st.name, Phase: st.phase, State: StepFailed, Text: err.Error(), Took: took.Milliseconds()})
			return err
		}
		l.journal.add(Progress{Step: st.name, Phase: st.phase, State: StepDone, Took: took.Milliseconds()})
		l.logf("%s: %.3f s", st.name, took.Seconds())
	}
	return nil
}

// note tells the owner something that a step found or changed.
func (l *life) note(step, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	l.logf("%s: %s", step, text)
	l.journal.add(Progress{Step: step, State: StepNote, Text: text})
}

// makeDir makes a directory of the VM with exactly this mode and owner.
func makeDir(path string, mode os.FileMode, uid, gid int) error {
	if err := durable.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return err
	}
	if err := durable.MkdirAll(path, 0o700); err != nil {
		return err
	}
	return errors.Join(os.Chown(path, uid, gid), os.Chmod(path, mode))
}
