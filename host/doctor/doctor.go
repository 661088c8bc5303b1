// Package doctor looks whether a host can run VMs, and says what to do where it can't. It changes nothing; what it makes to see whether
// that works (a network namespace, a VM of four instructions) is gone when it returns.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/vmm"
)

// Severity says how much a finding matters.
type Severity string

// The severities, the worst last.
const (
	OK      Severity = "ok"
	Note    Severity = "note"    // worth knowing
	Unknown Severity = "unknown" // it could not be looked; nothing is said about what is there
	Warning Severity = "warning" // something does not work, or will not for long
	Error   Severity = "error"   // a VM does not start, or does not work
)

var order = []Severity{OK, Note, Unknown, Warning, Error}

// Finding is what a check saw.
type Finding struct {
	// Check is the check's name, which stays the same between versions.
	Check string `json:"check"`
	// VM is whom it is about; empty for the host as a whole.
	VM       string   `json:"vm,omitempty"`
	Severity Severity `json:"severity"`
	// Seen is what was seen, one line.
	Seen string `json:"seen"`
	// Do is what to do about it; empty where nothing needs to be done.
	Do string `json:"do,omitempty"`
}

// Options say what is looked at.
type Options struct {
	Layout host.Layout
	// VM is the one VM to look at, and to say the next `up` of; empty: all.
	VM string
	// Verify reads every image whole.
	Verify bool
	// Limit bounds each check, and so the whole, as they run side by side.
	Limit time.Duration
}

// DefaultLimit is enough for a host that isn't emulated itself, and above what a name server may take.
const DefaultLimit = 2800 * time.Millisecond

// look is what checks share.
type look struct {
	Options
	facts   vmm.Facts
	host    *config.Host // the defaults where hostErr says why there is none
	hostErr error
	vms     []declared
	vmsErr  error
	root    bool // may look at everything
}

// declared is a VM and what its declaration came to.
type declared struct {
	name    string
	vm      *config.VM // nil where err says why
	err     error
	running bool
	runErr  error // why it can't be said whether it runs
}

// check is one look at one thing.
type check struct {
	name string
	do   func(context.Context, *look) []Finding
	// long: it may take as long as it takes when Verify is asked for.
	long bool
}

// checks are all checks of the host and of every VM, in the order in which they are shown.
var checks = []check{
	{name: "cpu", do: checkCPU},
	{name: "kvm", do: checkKVM},
	{name: "cloud-hypervisor", do: checkCloudHypervisor},
	{name: "qemu", do: checkQEMU},
	{name: "virtiofsd", do: checkVirtiofsd},
	{name: "disk-programs", do: checkDiskPrograms},
	{name: "guest-kernel", do: checkGuestKernel},
	{name: "host-kernel", do: checkHostKernel},
	{name: "network", do: checkNetwork},
	{name: "sysctl", do: checkSysctls},
	{name: "firewall", do: checkFirewall},
	{name: "subnet", do: checkSubnet},
	{name: "uids", do: checkUIDs},
	{name: "cgroup", do: checkCgroup},
	{name: "memory", do: checkMemory},
	{name: "space", do: checkSpace},
	{name: "clock", do: checkClock},
	{name: "systemd", do: checkSystemd},
	{name: "permissions", do: checkPermissions},
	{name: "images", do: checkImages, long: true},
	{name: "left-overs", do: checkLeftovers},
	{name: "host-config", do: checkHostConfig},
	{name: "nameservers", do: checkNameservers},
	{name: "declaration", do: checkDeclarations},
	{name: "secrets", do: checkSecrets},
	{name: "disks", do: checkDisks},
	{name: "up", do: checkUp},
}

// Run takes all checks side by side, and returns their findings: the host's first, then each VM's. A check that does not end within its
// time is a finding of its own. The error is that of a VM which nothing declares.
func Run(ctx context.Context, o Options) ([]Finding, error) {
	k := &look{Options: o, facts: vmm.LookHost(), root: os.Geteuid() == 0}
	if err := k.load(); err != nil {
		return nil, err
	}
	results := make([][]Finding, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() { results[i] = c.run(ctx, k) })
	}
	wg.Wait()
	all := []Finding{}
	for _, r := range results {
		all = append(all, r...)
	}
	return sorted(all, k.vms), nil
}

// run takes a check within its time. One that hangs is left behind: the program ends soon after.
func (c check) run(ctx context.Context, k *look) []Finding {
	if !c.long || !k.Verify {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, k.Limit)
		defer cancel()
	}
	done := make(chan []Finding, 1)
	go func() { done <- c.do(ctx, k) }()
	select {
	case found := <-done:
		return found
	case <-ctx.Done():
		return []Finding{{Check: c.name, Severity: Unknown, Seen: fmt.Sprintf("no answer within %v", k.Limit), Do: "give it more time: --timeout"}}
	}
}

// load reads the declarations.
func (k *look) load() error {
	if k.host, k.hostErr = config.LoadHost(k.Layout.HostConfig()); k.hostErr != nil {
		k.host = &config.Host{Bridge: config.DefaultBridge, Address: config.DefaultAddress(), UIDBase: config.DefaultUIDBase}
	}
	names := []string{k.VM}
	if k.VM == "" {
		names, k.vmsErr = k.Layout.Declared()
	} else if _, err := k.Layout.Declaration(k.VM); err != nil {
		return err
	}
	for _, n := range names {
		d := declared{name: n}
		if k.hostErr == nil {
			_, d.vm, d.err = k.Layout.LoadVM(n)
		} else {
			d.err = errHost
		}
		d.running, d.runErr = k.Layout.Running(n)
		k.vms = append(k.vms, d)
	}
	return nil
}

// errHost is the error of a VM whose declaration can't be read before the host's settings are.
var errHost = errors.New("cannot be read before the host's settings are in order")

// sorted puts the host's findings before those of the VMs.
func sorted(all []Finding, vms []declared) []Finding {
	var out []Finding
	add := func(vm string) {
		for _, f := range all {
			if f.VM == vm {
				out = append(out, f)
			}
		}
	}
	add("")
	for _, d := range vms {
		add(d.name)
	}
	return out
}

// Worst is the worst severity of the findings.
func Worst(all []Finding) Severity {
	worst := 0
	for _, f := range all {
		for i, s := range order {
			if s == f.Severity {
				worst = max(worst, i)
			}
		}
	}
	return order[worst]
}

// found makes one finding; do is formatted by the caller.
func found(check string, s Severity, do, format string, args ...any) []Finding {
	return []Finding{{Check: check, Severity: s, Seen: fmt.Sprintf(format, args...), Do: do}}
}

// broken is the finding of an error: unknown when it is one of rights, else of severity s. What the error says to do is taken apart from what it
// says that is.
func broken(check string, s Severity, err error) Finding {
	if denied(err) {
		return Finding{Check: check, Severity: Unknown, Seen: "could not look: " + oneLine(err), Do: "ask as root"}
	}
	seen, do, _ := strings.Cut(oneLine(err), "; ")
	return Finding{Check: check, Severity: s, Seen: seen, Do: do}
}

func denied(err error) bool {
	return os.Geteuid() != 0 && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES))
}

func oneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), "; ")
}
