package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/secrets"
)

// Reload is what reading a running VM's declaration anew came to.
type Reload struct {
	Name    string          `json:"name"`
	Applied []config.Change `json:"applied"` // hold now
	Pending []config.Change `json:"pending"` // hold from the next start on
}

// reload reads the declaration anew and applies what can be changed while the VM
// runs: secrets, published ports, nameservers and egress. On an error all is as it
// was.
func (s *Supervisor) reload(ctx context.Context) (Reload, error) {
	r := Reload{Name: s.name}
	err := s.ask(ctx, "reload", func(l *life) error {
		_, vm, err := l.layout.load(l.name)
		if err != nil {
			return fmt.Errorf("cannot reload VM %s, which goes on as it was: %w", l.name, err)
		}
		before := l.vm.Fields()
		if err := l.adopt(vm); err != nil {
			return fmt.Errorf("cannot reload VM %s, which goes on as it was: %w", l.name, err)
		}
		now := l.vm.Fields()
		// Lists, were they empty, for those who read JSON.
		r.Applied = append([]config.Change{}, config.Changes(before, now)...)
		r.Pending = append([]config.Change{}, config.Changes(now, vm.Fields())...)
		for _, c := range r.Applied {
			l.logf("reload: %s", c)
		}
		for _, c := range r.Pending {
			l.logf("reload: %s: needs a restart", c)
		}
		return nil
	})
	return r, err
}

// reloadOnHangup makes SIGHUP a reload, as it is for most services.
func (s *Supervisor) reloadOnHangup(ctx context.Context) (stop func()) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, unix.SIGHUP)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-hangups:
				if _, err := s.reload(ctx); err != nil {
					s.logf("%v", err)
				}
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(hangups)
		close(done)
	}
}

// adopt brings the running VM as near to a new declaration as it can come, and
// leaves in l.vm the declaration that it goes by then.
func (l *life) adopt(vm *config.VM) (err error) {
	next := *l.vm
	next.Nameservers, next.Egress = vm.Nameservers, vm.Egress
	var undo undoStack // for what must be taken back on an error
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.unwind())
		}
	}()
	ports, err := l.planPorts(vm)
	if err != nil {
		return err
	}
	defer ports.close()
	next.Ports = ports.now

	l.staging.Lock()
	shared := l.staged
	l.staging.Unlock()
	if shared && !slices.Equal(l.vm.Secrets, vm.Secrets) {
		list, err := l.ownedSecrets(context.Background(), vm)
		if err != nil {
			return err
		}
		if err := secrets.Check(l.paths.KeptSecrets(), list); err != nil {
			return coded(ExitDeclaration, err)
		}
		old := l.secrets
		undo.push("the new secrets", func() error { return l.changeSecrets(old) })
		if err := l.changeSecrets(list); err != nil {
			return err
		}
		next.Secrets = vm.Secrets
	}
	governs := !l.vm.Egress.Equal(vm.Egress)
	if governs {
		if err := l.govern(vm, &undo); err != nil {
			return err
		}
	}
	if err := l.tellGate(&next, ports); err != nil {
		return fmt.Errorf("cannot tell the gate: %w", err)
	}
	if governs {
		if err := l.cutForbidden(); err != nil {
			return err
		}
	}
	l.vm = &next
	if l.first != nil {
		l.first.vm = l.vm
	}
	l.setFields(next.Fields())
	l.update(func(st *Status) { st.Ports = portTexts(next.Ports) })
	return nil
}

// tellGate tells the gate of its new ports and of how names are resolved.
func (l *life) tellGate(next *config.VM, ports *portPlan) error {
	var messages []gate.Message
	for _, p := range ports.closed {
		to := forward(p)
		messages = append(messages, gate.Message{Kind: gate.Unpublish, Port: &to})
	}
	for _, p := range ports.turned {
		to := forward(p)
		messages = append(messages, gate.Message{Kind: gate.Publish, Port: &to})
	}
	if !slices.Equal(l.vm.Nameservers, next.Nameservers) || !l.vm.Egress.Equal(next.Egress) {
		if err := l.tellNaming(next); err != nil {
			return err
		}
	}
	for _, m := range messages {
		if err := l.gate.conn.Send(m); err != nil {
			return err
		}
	}
	for _, p := range ports.opened {
		to := forward(p.port)
		if err := l.gate.conn.SendFile(gate.Message{Kind: gate.Publish, Port: &to}, p.file); err != nil {
			return err
		}
	}
	return nil
}

// tellNaming tells the gate how names are resolved, and what may be reached.
func (l *life) tellNaming(vm *config.VM) error {
	how, err := memoryFile("naming", l.naming(vm))
	if err != nil {
		return err
	}
	defer how.Close()
	return l.gate.conn.SendFile(gate.Message{Kind: gate.Resolve}, how)
}

// portPlan is how the published ports become others.
type portPlan struct {
	now    []config.Port // those that are published then
	closed []config.Port
	turned []config.Port // another port of the guest
	opened []openedPort
}

type openedPort struct {
	port config.Port
	file *os.File // listens
}

func (p *portPlan) close() {
	for _, o := range p.opened {
		o.file.Close()
	}
}

// planPorts opens what is to be published in addition. What the gate could not
// reach, or what overlaps with a port that is published now, is left for the next
// start.
func (l *life) planPorts(vm *config.VM) (plan *portPlan, err error) {
	plan = &portPlan{}
	defer func() {
		if err != nil {
			plan.close()
		}
	}()
	kept := make(map[config.Port]bool) // of those that are published now
	for _, p := range vm.Ports {
		had, same := findPort(l.vm.Ports, p)
		switch {
		case same && had == p:
			kept[had] = true
			plan.now = append(plan.now, p)
		case !l.reachable[p.GuestPort] && !gate.ConnectsAnywhere():
			// The gate is confined to the ports that it was started with.
			if same {
				kept[had] = true
				plan.now = append(plan.now, had)
			}
		case same:
			kept[had] = true
			plan.turned, plan.now = append(plan.turned, p), append(plan.now, p)
		case had != (config.Port{}):
			// Of the same number, at another address: the kernel refuses the second while the first is open.
			kept[had] = true
			plan.now = append(plan.now, had)
		default:
			listener, err := listenPort(p)
			if err != nil {
				return plan, err
			}
			f, err := listener.File()
			if err := errors.Join(err, listener.Close()); err != nil {
				return plan, fmt.Errorf("cannot publish port %s: %w", p, err)
			}
			plan.opened, plan.now = append(plan.opened, openedPort{p, f}), append(plan.now, p)
		}
	}
	for _, p := range l.vm.Ports {
		if !kept[p] {
			plan.closed = append(plan.closed, p)
		}
	}
	return plan, nil
}

// findPort finds the port among all that has p's number, if there is one; same
// says that it is at p's address too.
func findPort(all []config.Port, p config.Port) (found config.Port, same bool) {
	for _, o := range all {
		if o.HostPort == p.HostPort && (found == config.Port{} || o.HostAddress == p.HostAddress) {
			found, same = o, o.HostAddress == p.HostAddress
		}
	}
	return found, same
}

// changeSecrets stages other secrets, and watches their sources instead.
func (l *life) changeSecrets(list []secrets.Secret) error {
	if err := l.unwatchSecrets(); err != nil {
		l.logf("the watch of the secrets' sources: %v", err)
	}
	l.staging.Lock()
	l.secrets = list
	err := l.stage().Write(list)
	l.staging.Unlock()
	l.watchSecrets()
	return err
}

// watchSecrets stages the secrets anew whenever a source of theirs changes, until
// unwatchSecrets.
func (l *life) watchSecrets() {
	ctx, cancel := context.WithCancel(context.Background())
	watching := make(chan error, 1)
	list := l.secrets
	go func() {
		watching <- secrets.Watch(ctx, list, func() {
			if err := l.restage(); err != nil {
				l.logf("a secret's source has changed, and the guest keeps the old one: %v", err)
			}
		})
	}()
	l.unwatch = func() error {
		cancel()
		if err := <-watching; err != nil && !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	}
}

func (l *life) unwatchSecrets() error {
	if l.unwatch == nil {
		return nil
	}
	stop := l.unwatch
	l.unwatch = nil
	return stop()
}

func portTexts(ports []config.Port) []string {
	var all []string
	for _, p := range ports {
		all = append(all, portText(p))
	}
	return all
}
