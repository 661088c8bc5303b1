package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/secrets"
	"github.com/clawvm/clawvm/storage"
)

func checkHostConfig(_ context.Context, k *look) []Finding {
	var all []Finding
	switch {
	case k.hostErr != nil:
		all = []Finding{broken("host-config", Error, k.hostErr)}
	case k.host.File == "":
		all = found("host-config", OK, "", "no %s: the defaults hold", k.Layout.HostConfig())
	default:
		all = found("host-config", OK, "", "%s", k.host.File)
	}
	if k.vmsErr != nil {
		all = append(all, broken("declarations", Unknown, k.vmsErr))
	} else if len(k.vms) == 0 {
		all = append(all, Finding{Check: "declarations", Severity: Note, Seen: "no VM is declared in " + k.Layout.Declarations()})
	}
	return all
}

// forVM makes findings those of a VM.
func forVM(name string, all ...Finding) []Finding {
	for i := range all {
		all[i].VM = name
	}
	return all
}

func checkDeclarations(_ context.Context, k *look) []Finding {
	var all []Finding
	for _, d := range k.vms {
		var problems config.Problems
		switch {
		case errors.Is(d.err, errHost):
			all = append(all, forVM(d.name, Finding{Check: "declaration", Severity: Unknown, Seen: d.err.Error()})...)
		case errors.As(d.err, &problems):
			for _, p := range problems {
				seen, do := p.String(), ""
				if p.Want != "" {
					seen, do = strings.TrimSuffix(seen, "; want "+p.Want), "want "+p.Want
				}
				all = append(all, forVM(d.name, Finding{Check: "declaration", Severity: Error, Seen: seen, Do: do})...)
			}
		case d.err != nil:
			all = append(all, forVM(d.name, broken("declaration", Error, d.err))...)
		default:
			state := "down"
			if d.running {
				state = "up"
			}
			if d.runErr != nil {
				state = "whether it is up could not be looked at"
			}
			all = append(all, forVM(d.name, Finding{Check: "declaration", Severity: OK, Seen: d.vm.File + ", " + state})...)
		}
	}
	return all
}

func checkSecrets(ctx context.Context, k *look) []Finding {
	var all []Finding
	for _, d := range k.vms {
		if d.vm == nil {
			continue
		}
		list, err := host.Secrets(ctx, k.Layout, d.name)
		if err != nil {
			all = append(all, forVM(d.name, broken("secret", Error, err))...)
			continue
		}
		keep := k.Layout.VM(d.name).KeptSecrets()
		for _, s := range list {
			f := Finding{Check: "secret", Severity: OK, Seen: s.Name + " from " + s.Source(keep)}
			if err := secrets.Check(keep, []secrets.Secret{s}); err != nil {
				f = broken("secret", Error, err)
			} else if s.Awaited {
				f.Seen = s.Name + " from the credential " + s.Credential + ", which systemd loads when it starts the VM"
			} else if _, err := os.Lstat(s.Source(keep)); errors.Is(err, fs.ErrNotExist) {
				f.Seen = s.Name + " is generated at the first start"
			}
			all = append(all, forVM(d.name, f)...)
		}
	}
	return all
}

func checkDisks(_ context.Context, k *look) []Finding {
	var all []Finding
	for _, d := range k.vms {
		if d.vm == nil {
			continue
		}
		for _, disk := range k.Layout.Disks(d.vm) {
			state, err := storage.LookDisk(disk.Disk)
			all = append(all, forVM(d.name, diskFinding(disk, state, err, d.running))...)
		}
	}
	return all
}

// diskFinding judges what a look at a disk showed.
func diskFinding(disk host.NamedDisk, state storage.DiskState, err error, running bool) Finding {
	f := Finding{Check: "disk", Severity: OK}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.Seen = disk.Name + " is made at the first start (" + config.Size(disk.Size).String() + ")"
	case err != nil:
		return broken("disk", Error, err)
	case state.Errors:
		f.Severity, f.Seen = Warning, disk.Name+": the guest's kernel found an error in its file system"
		f.Do = "copy " + disk.Path + " while the VM is down; the next start reads all of it, and says how to repair it"
	case running:
		f.Seen = disk.Name + " is in use"
	case state.Unfinished:
		f.Severity, f.Seen = Note, disk.Name+" was not unmounted; the next start finishes what is in its journal"
	default:
		f.Seen = disk.Name + " is clean"
	}
	return f
}

// checkImages compares every image with its manifest, and every declaration with the images.
func checkImages(ctx context.Context, k *look) []Finding {
	store := k.Layout.Images()
	images, err := store.List()
	if err != nil {
		return []Finding{broken("images", Error, err)}
	}
	all := make([]Finding, len(images))
	var wg sync.WaitGroup
	for i, image := range images {
		wg.Go(func() { all[i] = checkImage(ctx, store, image, k.Verify) })
	}
	wg.Wait()
	if len(images) == 0 {
		all = append(all, Finding{Check: "images", Severity: Note, Seen: "the store has none", Do: "clawvm image build openclaw"})
	}
	for _, d := range k.vms {
		if d.vm == nil || has(images, d.vm.Image) {
			continue
		}
		all = append(all, forVM(d.name, Finding{Check: "image", Severity: Error, Seen: "the store has no image " + d.vm.Image,
			Do: "clawvm image build " + d.vm.Image + ", or clawvm image import DIR|FILE " + d.vm.Image})...)
	}
	return all
}

func has(images []storage.Image, ref string) bool {
	return slices.ContainsFunc(images, func(i storage.Image) bool { return i.Digest == ref || slices.Contains(i.Names, ref) })
}

func checkImage(ctx context.Context, store *storage.Store, image storage.Image, verify bool) Finding {
	name := image.Digest[:min(len(image.Digest), len("sha256:")+12)]
	if len(image.Names) > 0 {
		name = strings.Join(image.Names, ", ") + " (" + name + ")"
	}
	if verify {
		if err := store.Verify(ctx, image.Digest); err != nil {
			return broken("images", Error, err)
		}
		return Finding{Check: "images", Severity: OK, Seen: name + " is what its digest says"}
	}
	if _, err := store.Open(image.Digest); err != nil {
		return broken("images", Error, err)
	}
	return Finding{Check: "images", Severity: OK, Seen: name + " has all its files; --verify reads them"}
}

func checkLeftovers(_ context.Context, k *look) []Finding {
	if k.Layout.ID == "" {
		if k.root {
			return found("left-overs", OK, "", "nothing was started from this root")
		}
		return found("left-overs", Unknown, "ask as root", "could not look: the root's id is not readable")
	}
	left, err := host.Leftovers(k.Layout, k.host)
	var all []Finding
	for _, what := range left.Removed {
		all = append(all, Finding{Check: "left-overs", Severity: Warning, Seen: what, Do: "clawvm gc"})
	}
	for _, kept := range left.Kept {
		seen, do, _ := strings.Cut(kept, "; ")
		all = append(all, Finding{Check: "left-overs", Severity: Note, Seen: seen, Do: do})
	}
	if err != nil {
		all = append(all, broken("left-overs", Unknown, err))
	}
	if len(all) == 0 {
		return found("left-overs", OK, "", "nothing was left behind")
	}
	return all
}

// A name server has two tries; together they are what a VM's program waits for at least.
const (
	queryTries = 2
	queryLimit = time.Second
)

// checkNameservers asks each name server that VMs' queries go to.
func checkNameservers(ctx context.Context, k *look) []Finding {
	answers := map[netip.Addr]answer{}
	for _, d := range k.vms {
		if d.vm == nil {
			continue
		}
		for _, a := range d.vm.Nameservers {
			answers[a] = answer{}
		}
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for a := range answers {
		wg.Go(func() {
			took, err := ask(ctx, netip.AddrPortFrom(a, nameserverPort))
			mu.Lock()
			defer mu.Unlock()
			answers[a] = answer{took, err}
		})
	}
	wg.Wait()
	var all []Finding
	for _, d := range k.vms {
		if d.vm != nil {
			all = append(all, forVM(d.name, nameservers(d.vm.Nameservers, answers)...)...)
		}
	}
	return all
}

const nameserverPort = 53

// answer is how long a name server took, or why it gave no answer.
type answer struct {
	took time.Duration
	err  error
}

// ask queries a name server for the root's own name servers, which every resolver knows. Any answer is one.
func ask(ctx context.Context, server netip.AddrPort) (time.Duration, error) {
	q := new(dns.Msg)
	q.SetQuestion(".", dns.TypeNS)
	client := dns.Client{Net: "udp", Timeout: queryLimit}
	var err error
	for range queryTries {
		var took time.Duration
		if _, took, err = client.ExchangeContext(ctx, q, server.String()); err == nil {
			return took, nil
		}
	}
	return 0, err
}

// nameservers judges a VM's name servers by their answers: one that answers is enough to work with.
func nameservers(list []netip.Addr, answers map[netip.Addr]answer) []Finding {
	var all []Finding
	reached := slices.ContainsFunc(list, func(a netip.Addr) bool { return answers[a].err == nil })
	for _, a := range list {
		got := answers[a]
		f := Finding{Check: "nameserver", Severity: OK, Seen: fmt.Sprintf("%s answered in %d ms", a, got.took.Milliseconds())}
		if got.err != nil {
			f.Severity = Warning
			f.Seen = fmt.Sprintf("%s gave no answer within %v: %v", a, queryTries*queryLimit, bare(got.err))
			f.Do = "declare others in `nameservers:`, or look why UDP port 53 does not get there"
			if !reached {
				f.Severity = Error
			}
		}
		all = append(all, f)
	}
	return all
}

// bare is an error of the network without the addresses, which are said beside it.
func bare(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		if op.Timeout() {
			return errors.New("time-out")
		}
		return op.Err
	}
	return err
}

// checkUp says what the next `up` of the one VM would do.
func checkUp(ctx context.Context, k *look) []Finding {
	if k.VM == "" || k.vms[0].vm == nil {
		return nil
	}
	var all []Finding
	for _, p := range host.Preview(ctx, k.Layout, k.VM) {
		f := Finding{Check: "up " + p.Step, Severity: OK, Seen: p.Text}
		if p.Err != nil {
			f = broken("up "+p.Step, Error, p.Err)
		}
		all = append(all, f)
	}
	return forVM(k.VM, all...)
}

// Where systemd looks for units, the administrator's first.
var unitDirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// unitName is the template of the VMs' units.
const unitName = "clawvm@.service"

// checkSystemd compares what is installed and enabled with what is declared.
func checkSystemd(_ context.Context, k *look) []Finding {
	if _, err := os.Stat("/run/systemd/system"); err != nil { // sd_booted(3)
		return found("systemd", Note, "", "not running here: nothing starts VMs at boot")
	}
	if !k.Layout.IsSystem() {
		return found("systemd", OK, "", "units are for the system's own root, not for %s", k.Layout.Root)
	}
	return units(unitDirs, k.declares)
}

// declares says whether a VM of that name is declared.
func (k *look) declares(name string) bool {
	_, err := k.Layout.Declaration(name)
	return err == nil
}

// units looks for the template, its program, and the instances that are enabled.
func units(dirs []string, declares func(string) bool) []Finding {
	var all []Finding
	template := ""
	for _, dir := range dirs {
		path := filepath.Join(dir, unitName)
		if _, err := os.Stat(path); err == nil && template == "" {
			template = path
		}
	}
	enabled := map[string]bool{}
	for _, dir := range dirs {
		links, err := filepath.Glob(filepath.Join(dir, "*.wants", "clawvm@*.service"))
		if err != nil {
			return []Finding{broken("systemd", Unknown, err)}
		}
		for _, link := range links {
			name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(link), "clawvm@"), ".service")
			if name != "" {
				enabled[name] = true
			}
		}
	}
	names := make([]string, 0, len(enabled))
	for n := range enabled {
		names = append(names, n)
	}
	slices.Sort(names)
	if template == "" && len(names) > 0 {
		return found("systemd", Error, "make install", "%s is enabled, and %s is not installed", strings.Join(names, ", "), unitName)
	}
	if template == "" {
		return found("systemd", Note, "make install puts it in place", "%s is not installed: nothing starts VMs at boot", unitName)
	}
	for _, n := range names {
		if !declares(n) {
			all = append(all, Finding{Check: "systemd", Severity: Warning, Seen: "clawvm@" + n + " is enabled, and nothing declares VM " + n, Do: "systemctl disable clawvm@" + n + ", or declare it"})
		}
	}
	if f, ok := unitProgram(template); ok {
		all = append(all, f)
	}
	if len(all) == 0 {
		what := "no VM is enabled"
		if len(names) > 0 {
			what = "enabled: " + strings.Join(names, ", ")
		}
		return found("systemd", OK, "", "%s; %s", template, what)
	}
	return all
}

// unitProgram says when the program that a unit starts isn't there.
func unitProgram(template string) (Finding, bool) {
	b, err := os.ReadFile(template)
	if err != nil {
		return broken("systemd", Unknown, err), true
	}
	for line := range strings.Lines(string(b)) {
		value, ok := strings.CutPrefix(strings.TrimSpace(line), "ExecStart=")
		words := strings.Fields(strings.TrimLeft(value, "@-:+!"))
		if !ok || len(words) == 0 {
			continue
		}
		if _, err := os.Stat(words[0]); errors.Is(err, fs.ErrNotExist) {
			return Finding{Check: "systemd", Severity: Error, Seen: template + " starts " + words[0] + ", which isn't there", Do: "make install"}, true
		}
	}
	return Finding{}, false
}
