package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/network/egress"
)

// exceptions are what the owner has a VM reach, or not reach, beside its
// declaration. They end with the supervisor, or earlier; a reboot of the guest, a
// start after a fault and a reload leave them.
type exceptions struct {
	mu      sync.Mutex
	allowed []Exception
	denied  []config.Allow
}

// Exception is an entry that holds beside the declaration.
type Exception struct {
	Entry config.Allow
	Until time.Time // zero: until the VM is taken down
}

// list is what a declared list becomes by the exceptions that hold at a time.
func (x *exceptions) list(declared []config.Allow, now time.Time) []config.Allow {
	x.mu.Lock()
	defer x.mu.Unlock()
	out := slices.DeleteFunc(slices.Clone(declared), func(a config.Allow) bool { return slices.ContainsFunc(x.denied, a.Equal) })
	for _, e := range x.allowed {
		if holds(e, now) && !slices.ContainsFunc(out, e.Entry.Equal) {
			out = append(out, e.Entry)
		}
	}
	return out
}

func holds(e Exception, now time.Time) bool { return e.Until.IsZero() || now.Before(e.Until) }

// snapshot returns a way back to what is there now.
func (x *exceptions) snapshot() (back func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	allowed, denied := slices.Clone(x.allowed), slices.Clone(x.denied)
	return func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.allowed, x.denied = allowed, denied
	}
}

// allow adds entries, in place of the same ones that hold for another time. A
// declared one is only no longer denied.
func (x *exceptions) allow(entries, declared []config.Allow, until time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, a := range entries {
		x.denied = slices.DeleteFunc(slices.Clone(x.denied), a.Equal)
		x.allowed = slices.DeleteFunc(slices.Clone(x.allowed), func(e Exception) bool { return e.Entry.Equal(a) })
		if !slices.ContainsFunc(declared, a.Equal) {
			x.allowed = append(x.allowed, Exception{a, until})
		}
	}
}

// deny takes entries away, declared ones and exceptions.
func (x *exceptions) deny(entries []config.Allow) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, a := range entries {
		x.allowed = slices.DeleteFunc(slices.Clone(x.allowed), func(e Exception) bool { return e.Entry.Equal(a) })
		if !slices.ContainsFunc(x.denied, a.Equal) {
			x.denied = append(x.denied, a)
		}
	}
}

// Reach is what a VM may reach now.
type Reach struct {
	Name  string       `json:"name"`
	Mode  string       `json:"mode"`
	Allow []ReachEntry `json:"allow"`
}

// ReachEntry is an entry of a VM's list.
type ReachEntry struct {
	Entry string `json:"entry"`
	// Declared: the declaration has it. Denied: it doesn't hold all the same.
	Declared bool      `json:"declared,omitempty"`
	Denied   bool      `json:"denied,omitempty"`
	Until    time.Time `json:"until,omitzero"`
}

// reach is what the VM may reach now.
func (l *life) reach() Reach {
	r := Reach{Name: l.name, Mode: l.vm.Egress.Mode, Allow: []ReachEntry{}}
	x := &l.exceptions
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, a := range l.vm.Egress.Allow {
		r.Allow = append(r.Allow, ReachEntry{Entry: a.String(), Declared: true, Denied: slices.ContainsFunc(x.denied, a.Equal)})
	}
	for _, e := range x.allowed {
		if holds(e, time.Now()) && !slices.ContainsFunc(l.vm.Egress.Allow, e.Entry.Equal) {
			r.Allow = append(r.Allow, ReachEntry{Entry: e.Entry.String(), Until: e.Until})
		}
	}
	return r
}

// Ways to change what a VM may reach.
const (
	reachShow  = "show"
	reachAllow = "allow"
	reachDeny  = "deny"
)

// changeReach allows or denies entries in a VM that is up, and says what it may
// reach then. by is who asked, for the log.
func (s *Supervisor) changeReach(ctx context.Context, how string, texts []string, keep time.Duration, by string) (Reach, error) {
	var r Reach
	err := s.ask(ctx, how+" what is reached by", func(l *life) error {
		if how != reachShow {
			if err := l.except(how, texts, keep, by); err != nil {
				return err
			}
		}
		r = l.reach()
		return nil
	})
	return r, err
}

func (l *life) except(how string, texts []string, keep time.Duration, by string) error {
	if mode := l.vm.Egress.Mode; mode != config.EgressAllowlist {
		return coded(ExitDeclaration, fmt.Errorf("VM %s has no list: its egress mode is %s; declare egress: {allow: […]}, and clawvm reload %s", l.name, mode, l.name))
	}
	entries, err := l.exceptionEntries(how, texts)
	if err != nil {
		return coded(ExitDeclaration, err)
	}
	back := l.exceptions.snapshot()
	until, said := time.Time{}, "until the VM is taken down"
	if how == reachAllow {
		if keep > 0 {
			until = time.Now().Add(keep)
			said = "until " + until.UTC().Format(time.RFC3339)
		}
		l.exceptions.allow(entries, l.vm.Egress.Allow, until)
	} else {
		l.exceptions.deny(entries)
	}
	if err := l.regovern(); err != nil {
		back()
		return fmt.Errorf("cannot change what VM %s reaches, which goes on as it was: %w", l.name, errors.Join(err, l.regovern()))
	}
	for _, a := range entries {
		l.logf("egress: %s: %s %s, %s", by, how, a, said)
	}
	if !until.IsZero() {
		l.endException(keep)
	}
	return nil
}

// exceptionEntries reads what is to be allowed or denied. What is to be denied must
// be allowed; without ports, all of its entries are meant.
func (l *life) exceptionEntries(how string, texts []string) ([]config.Allow, error) {
	now := l.exceptions.list(l.vm.Egress.Allow, time.Now())
	var all []config.Allow
	for _, text := range texts {
		entries, err := config.ParseAllow(text)
		if err != nil {
			return nil, fmt.Errorf("VM %s: %w", l.name, err)
		}
		for _, a := range entries {
			if how == reachAllow {
				if err := a.CheckPrivate(l.vm.Egress.AllowPrivate); err != nil {
					return nil, fmt.Errorf("VM %s: %w", l.name, err)
				}
				all = append(all, a)
				continue
			}
			found := slices.DeleteFunc(slices.Clone(now), func(b config.Allow) bool {
				return b.Name != a.Name || b.Prefix != a.Prefix || (strings.ContainsAny(text, ":/") && a.Name != "") && !b.Equal(a)
			})
			if len(found) == 0 {
				why := "it is not allowed"
				if v := l.pins.allowed().Name(a.Name); a.Name != "" && v.Allowed {
					why = "it is allowed by " + v.Rule + ", which can be denied"
				}
				return nil, fmt.Errorf("VM %s: cannot deny %s: %s; clawvm allow %s shows the list", l.name, text, why, l.name)
			}
			all = append(all, found...)
		}
	}
	return all, nil
}

// regovern makes the VM go by its declaration and the exceptions that hold now.
func (l *life) regovern() (err error) {
	var undo undoStack
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.unwind())
		}
	}()
	if err := l.govern(l.vm, &undo); err != nil {
		return err
	}
	if err := l.tellNaming(l.vm); err != nil {
		return err
	}
	return l.cutForbidden()
}

// cutForbidden ends the connections that were allowed when they began, and are not
// any more.
func (l *life) cutForbidden() error {
	_, err := egress.CutFlows(l.address, l.pins.keeps(l.hostConfig.Address.Addr()))
	return err
}

// endException has the VM go by its other rules when an exception's time is over.
// Whatever life it is in by then: one that begins later knows of it.
func (s *Supervisor) endException(after time.Duration) {
	time.AfterFunc(after+exceptionSlack, func() {
		err := s.ask(context.Background(), "end an exception of", func(l *life) error {
			s.logf("egress: the time of an exception is over")
			return l.regovern()
		})
		if err == nil {
			return
		}
		switch s.Status().State {
		case Starting, Restarting:
			s.endException(exceptionAgain)
		case Running, Paused:
			s.logf("egress: an exception's time is over, and it holds still: %v", err)
			s.endException(exceptionAgain)
		}
	})
}

const (
	exceptionSlack = 10 * time.Millisecond // after its end, so that it is over by any clock
	exceptionAgain = time.Second           // for a VM that is starting, or busy
)
