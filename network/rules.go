package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Rules are the nftables rules of a root: two tables, of the families inet and
// bridge, that all its VMs share. Every change is one transaction, made under
// the lock file that all supervisors of the host use.
//
// Tables of others are never read, changed or removed.
type Rules struct {
	Bridge Bridge
	Lock   string // path of the lock file; made when it isn't there
}

// lockWait is how long a change waits for the others' changes. One takes a few
// milliseconds, so that a thousand VMs that start at once are done long before;
// who holds the lock for longer hangs.
const lockWait = time.Minute

// changeTries is how often a change is planned anew when the tables changed
// between the look at them and the transaction, which only others' programs
// (nft flush ruleset) can do while the lock is held.
const changeTries = 5

// Describe returns the tables of a root with the given VMs, in the words and the
// order of `nft list table`.
func Describe(b Bridge, guests ...Guest) (string, error) {
	var parts [][]table
	for _, g := range guests {
		g, err := g.filled(b)
		if err != nil {
			return "", fmt.Errorf("cannot describe the rules of VM %s: %w", g.VM, err)
		}
		parts = append(parts, guestTables(b, g))
	}
	var w strings.Builder
	for _, t := range merged(sharedTables(b), parts...) {
		w.WriteString(t.String())
	}
	return w.String(), nil
}

// Ensure makes the shared tables where they are gone or not as they should be,
// and the VM's chains and elements, in one transaction. What is as it should be
// is not touched: connections go on, and a second Ensure changes nothing. What
// the VM had with another address or TAP goes.
//
// Tables of a newer layout are refused with ErrNewerRules.
func (r Rules) Ensure(g Guest) error {
	g, err := g.filled(r.Bridge)
	if err == nil {
		err = r.change(func(k *rulesReader) (*plan, error) { return ensureRules(k, r.Bridge, &g) })
	}
	if err != nil {
		return fmt.Errorf("cannot set the rules of VM %s: %w", g.VM, err)
	}
	return nil
}

// Remove takes the VM's chains and elements away; what isn't there is no error.
// The address, which may be zero, is the one it had: with it, elements are found
// that lead to no chain. One that another VM has by now is left to that VM.
func (r Rules) Remove(vm string, a netip.Addr) error {
	err := errors.Join(r.Bridge.check(), checkVM(vm))
	if err == nil {
		err = r.change(func(k *rulesReader) (*plan, error) { return removeRules(k, r.Bridge, vm, a) })
	}
	if err != nil {
		return fmt.Errorf("cannot remove the rules of VM %s: %w", vm, err)
	}
	return nil
}

// List returns the VMs that have chains, with the address that leads there; it
// is not valid when none does. For finding what was left over.
func (r Rules) List() (map[string]netip.Addr, error) {
	vms := map[string]netip.Addr{}
	err := reading(func(k *rulesReader) error {
		inet := sharedTables(r.Bridge)[0]
		chains, err := k.chains(inet)
		if err != nil {
			return err
		}
		guests, _, err := k.elements(inet, mapGuests)
		if err != nil {
			return err
		}
		for _, c := range chains {
			for _, prefix := range []string{chainOf(""), refuseChain("")} {
				if vm, ok := strings.CutPrefix(c, prefix); ok && checkVM(vm) == nil {
					vms[vm] = netip.Addr{}
				}
			}
		}
		for key, e := range guests {
			if a, ok := netip.AddrFromSlice([]byte(key)); ok {
				vms[strings.TrimPrefix(e.chain, chainOf(""))] = a
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list the VMs that have rules: %w", err)
	}
	return vms, nil
}

// reading opens a reader for the time of f.
func reading(f func(*rulesReader) error) (err error) {
	k, err := openRulesReader()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	return f(k)
}

// change plans and commits under the lock.
func (r Rules) change(planned func(*rulesReader) (*plan, error)) (err error) {
	unlock, err := lockFile(r.Lock, lockWait)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	return reading(func(k *rulesReader) error { return replanned(k, planned) })
}

func replanned(k *rulesReader, planned func(*rulesReader) (*plan, error)) error {
	for try := 1; ; try++ {
		p, err := planned(k)
		if err != nil {
			return err
		}
		err = p.commit()
		moved := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY)
		if err == nil || !moved || try == changeTries {
			return err
		}
	}
}

// lockFile holds an exclusive lock on the file until unlock is called. The lock
// ends with the process, whatever kills it; the file stays, because removing a
// file that others lock lets two hold the lock.
func lockFile(path string, wait time.Duration) (unlock func() error, err error) {
	if path == "" {
		return nil, errors.New("no lock file was given")
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the lock file: %w", err)
	}
	locked := make(chan error, 1)
	go func() {
		for {
			err := control(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX) })
			if !errors.Is(err, unix.EINTR) {
				locked <- err
				return
			}
		}
	}()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case err := <-locked:
		if err != nil {
			return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", path, err), f.Close())
		}
		return f.Close, nil
	case <-timer.C:
		go func() {
			<-locked
			// Nobody waits for it any more; the lock goes with the file.
			if err := f.Close(); err != nil {
				return
			}
		}()
		return nil, fmt.Errorf("cannot lock %s: another process has held it for %v; `fuser -v %s` shows which", path, wait, path)
	}
}

// removeTables removes all tables of an owner that this program knows the layout of.
func removeTables(owner string) error {
	return reading(func(k *rulesReader) error {
		return replanned(k, func(k *rulesReader) (*plan, error) {
			have, older, err := versions(k, owner)
			if err != nil {
				return nil, err
			}
			for _, f := range []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyBridge} {
				if have[f] {
					older = append(older, tableVersion{f, tableName(owner), layout})
				}
			}
			return &plan{oldTables: older}, nil
		})
	})
}
