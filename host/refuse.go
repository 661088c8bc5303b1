package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/storage"
)

// checkAddress looks whether the VM can have its address.
func (l *life) checkAddress(context.Context) error {
	leases := network.Leases{Dir: l.layout.Leases(), Subnet: l.hostConfig.Address}
	return coded(ExitDeclaration, leases.Check(l.name, l.vm.Address))
}

// checkBridge looks whether the bridge is this root's, or can become it.
func (l *life) checkBridge(context.Context) error {
	h := l.hostConfig
	err := (network.Bridge{Name: h.Bridge, Address: h.Address, Owner: l.layout.ID}).Check()
	var route *network.RouteError
	switch {
	case errors.As(err, &route):
		err = fmt.Errorf("%w; declare another `address:` in %s", err, l.layout.HostConfig())
	case errors.Is(err, network.ErrNotOurs):
		err = fmt.Errorf("%w; declare another `bridge:` and `address:` in %s", err, l.layout.HostConfig())
	}
	return coded(ExitDeclaration, err)
}

// checkShares looks whether each declared share can be served as declared.
func (l *life) checkShares(context.Context) error {
	if l.virtiofsd == nil {
		return nil // whose absence was said
	}
	var errs []error
	for _, s := range l.vm.Shares {
		share := storage.Share{Source: s.Source, ReadOnly: s.ReadOnly, Cache: storage.CacheAuto}
		uid, gid, err := ownerOf(s.Source)
		if err == nil {
			share.SquashUID, share.SquashGID = uid, gid
		} else {
			share.ReadOnly = true // Check says more of what is not there
		}
		errs = append(errs, l.virtiofsd.Check(share))
	}
	return coded(ExitDeclaration, errors.Join(errs...))
}

// checkPorts looks whether each published port is free.
func (l *life) checkPorts(context.Context) error {
	var errs []error
	for _, p := range l.vm.Ports {
		if l.publishes(p) {
			continue
		}
		listener, err := listenPort(p)
		if err != nil {
			// By the VM's last gate, perhaps, which was killed and is not quite gone.
			users, uerr := l.users()
			if uerr != nil || awaitEnds(users...) != nil {
				return errors.Join(err, uerr)
			}
			listener, err = listenPort(p)
		}
		if err == nil {
			err = listener.Close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// publishes says whether the VM, which runs, holds the port's number already.
func (l *life) publishes(p config.Port) bool {
	return slices.ContainsFunc(l.own, func(text string) bool {
		held, _, _ := strings.Cut(text, "->")
		return strings.HasSuffix(held, fmt.Sprintf(":%d", p.HostPort))
	})
}

// listenPort opens a published port.
func listenPort(p config.Port) (*net.TCPListener, error) {
	at := netip.AddrPortFrom(p.HostAddress, p.HostPort)
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("cannot publish port %s: another program listens there (`ss -tlnp 'sport = :%d'` shows which); end it, or declare another port", at, p.HostPort)
	}
	if errors.Is(err, syscall.EADDRNOTAVAIL) {
		return nil, fmt.Errorf("cannot publish port %s: this host has no address %s; declare one that `ip addr` shows", at, p.HostAddress)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot publish port %s: %w", at, err)
	}
	return l, nil
}

// cannotStart is the error of a start that failed at some steps: one problem a
// line, and the VM named once. A problem that says itself what could not be done
// needs no step's name before it.
func cannotStart(name string, failed ...stepError) error {
	var lines []string
	var errs []error
	for _, f := range failed {
		errs = append(errs, f.err)
		var problems config.Problems
		declared := errors.As(f.err, &problems)
		for line := range strings.SplitSeq(f.err.Error(), "\n") {
			if !declared && !strings.HasPrefix(line, "cannot ") {
				line = f.step + ": " + line
			}
			lines = append(lines, line)
		}
	}
	text := fmt.Sprintf("cannot start VM %s: %s", name, strings.Join(lines, ""))
	if len(lines) > 1 {
		text = fmt.Sprintf("cannot start VM %s:\n%s", name, strings.Join(lines, "\n"))
	}
	return &startError{text, errs}
}

// stepError is why a step failed.
type stepError struct {
	step string
	err  error
}

// startError is the error of [cannotStart].
type startError struct {
	text string
	errs []error
}

func (e *startError) Error() string   { return e.text }
func (e *startError) Unwrap() []error { return e.errs }
