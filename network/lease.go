package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/clawvm/clawvm/internal/durable"
)

// Leases are the addresses that VMs hold. A lease is a symbolic link named for
// the address, whose target is the VM's name; as symlink(2) makes it with its
// content or not at all, whoever makes it holds the address, without a lock and
// whatever is killed when.
type Leases struct {
	Dir    string       // made when it isn't there
	Subnet netip.Prefix // the bridge's address and length, such as 192.168.83.1/24
}

var (
	// ErrTaken is in the error about an address that another VM holds.
	ErrTaken = errors.New("address taken")
	// ErrOutside is in the error about an address that no VM can hold: outside
	// of the subnet, its own or its broadcast address, or the bridge's.
	ErrOutside = errors.New("address outside of what VMs can hold")
	// ErrExhausted is in the error when every address is taken.
	ErrExhausted = errors.New("no address left")
)

// reasonError says in its own words what errors.Is knows it by.
type reasonError struct {
	text string
	is   error
}

func (e *reasonError) Error() string { return e.text }
func (e *reasonError) Unwrap() error { return e.is }

func reason(is error, format string, args ...any) error {
	return &reasonError{fmt.Sprintf(format, args...), is}
}

// Check says what Acquire would refuse, and changes nothing.
func (l Leases) Check(vm string, want netip.Addr) error {
	if want.IsValid() && !l.usable(want) {
		return fmt.Errorf("cannot get an address: %w", l.outside(want))
	}
	all, err := l.List()
	if err != nil {
		return err
	}
	held := l.heldBy(all, vm)
	switch holder, taken := all[want]; {
	case want.IsValid() && taken && holder != vm:
		return fmt.Errorf("cannot get an address: %w", takenBy(want, holder))
	case want.IsValid(), len(held) > 0 && l.usable(held[0]):
		return nil
	}
	if _, ok := l.firstFree(all); !ok {
		return fmt.Errorf("cannot get an address: %w", l.exhausted())
	}
	return nil
}

func (l Leases) outside(a netip.Addr) error {
	return reason(ErrOutside, "%v is not one that VMs of %v can hold; declare a free address of that subnet, or none", a, l.Subnet.Masked())
}

func takenBy(a netip.Addr, holder string) error {
	return reason(ErrTaken, "%v is held by VM %s; declare another address, or `clawvm rm %s` gives it back", a, holder, holder)
}

func (l Leases) exhausted() error {
	return reason(ErrExhausted, "all of %v are held; remove a VM (clawvm rm) or give the bridge a larger subnet", l.Subnet.Masked())
}

// Acquire returns the address that the VM holds from now on. A zero want means
// the one that it has, or else the lowest free one; another want replaces what
// the VM had. Two Acquire of different VMs may run at once; of one VM they must
// not, which the VM's own lock sees to.
func (l Leases) Acquire(vm string, want netip.Addr) (netip.Addr, error) {
	a, err := l.acquire(vm, want)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("cannot get an address: %w", err)
	}
	return a, nil
}

func (l Leases) acquire(vm string, want netip.Addr) (netip.Addr, error) {
	if err := checkVM(vm); err != nil {
		return netip.Addr{}, err
	}
	if want.IsValid() && !l.usable(want) {
		return netip.Addr{}, l.outside(want)
	}
	if err := durable.MkdirAll(l.Dir, 0o700); err != nil {
		return netip.Addr{}, err
	}
	all, err := l.List()
	if err != nil {
		return netip.Addr{}, err
	}
	got := want
	switch held := l.heldBy(all, vm); {
	case want.IsValid():
		err = l.take(want, vm)
	case len(held) > 0 && l.usable(held[0]):
		got = held[0]
	default:
		got, err = l.takeFirst(all, vm)
	}
	if err != nil {
		return netip.Addr{}, err
	}
	// One VM, one address: what it held before goes back.
	for _, a := range l.heldBy(all, vm) {
		if a == got {
			continue
		}
		if err := l.drop(a); err != nil {
			return netip.Addr{}, err
		}
	}
	return got, nil
}

// usable says whether a VM can hold the address.
func (l Leases) usable(a netip.Addr) bool {
	return a.Is4() && l.Subnet.Contains(a) && a != l.Subnet.Addr() &&
		a != l.Subnet.Masked().Addr() && a != broadcast(l.Subnet)
}

// take makes the lease; one that the VM has already is as good.
func (l Leases) take(a netip.Addr, vm string) error {
	err := durable.Symlink(vm, l.path(a))
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	holder, err := os.Readlink(l.path(a))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return reason(ErrTaken, "%v was held a moment ago; try again", a)
	case err != nil:
		return err
	case holder == vm:
		return nil
	}
	return takenBy(a, holder)
}

// takeFirst takes the lowest free address. One that another process takes in
// the meantime is passed over.
func (l Leases) takeFirst(all map[netip.Addr]string, vm string) (netip.Addr, error) {
	all = maps.Clone(all)
	for {
		a, ok := l.firstFree(all)
		if !ok {
			return netip.Addr{}, l.exhausted()
		}
		switch err := l.take(a, vm); {
		case err == nil:
			return a, nil
		case !errors.Is(err, ErrTaken):
			return netip.Addr{}, err
		}
		all[a] = "" // since a moment ago
	}
}

// firstFree is the lowest address that nobody holds.
func (l Leases) firstFree(all map[netip.Addr]string) (netip.Addr, bool) {
	for a := l.Subnet.Masked().Addr().Next(); l.Subnet.Contains(a); a = a.Next() {
		if _, taken := all[a]; !taken && l.usable(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func (l Leases) path(a netip.Addr) string { return filepath.Join(l.Dir, a.String()) }

func (l Leases) drop(a netip.Addr) error {
	if err := os.Remove(l.path(a)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// heldBy lists the addresses that a VM holds, those of the subnet first, lowest first.
func (l Leases) heldBy(all map[netip.Addr]string, vm string) []netip.Addr {
	var held []netip.Addr
	for a, holder := range all {
		if holder == vm {
			held = append(held, a)
		}
	}
	slices.SortFunc(held, func(x, y netip.Addr) int {
		if in := l.usable(x); in != l.usable(y) {
			if in {
				return -1
			}
			return 1
		}
		return x.Compare(y)
	})
	return held
}

// Lookup returns the address that the VM holds within the subnet, if it does.
func (l Leases) Lookup(vm string) (netip.Addr, bool, error) {
	all, err := l.List()
	if err != nil {
		return netip.Addr{}, false, err
	}
	if held := l.heldBy(all, vm); len(held) > 0 && l.usable(held[0]) {
		return held[0], true, nil
	}
	return netip.Addr{}, false, nil
}

// ByVM returns the address that each VM holds within the subnet: what Lookup says,
// of all of them at once.
func (l Leases) ByVM() (map[string]netip.Addr, error) {
	all, err := l.List()
	if err != nil {
		return nil, err
	}
	held := make(map[string]netip.Addr, len(all))
	for a, vm := range all {
		if other, ok := held[vm]; l.usable(a) && (!ok || a.Less(other)) {
			held[vm] = a
		}
	}
	return held, nil
}

// Release gives back whatever the VM holds; nothing is no error.
func (l Leases) Release(vm string) error {
	all, err := l.List()
	if err != nil {
		return fmt.Errorf("cannot release the address of VM %s: %w", vm, err)
	}
	for _, a := range l.heldBy(all, vm) {
		if err := l.drop(a); err != nil {
			return fmt.Errorf("cannot release the address of VM %s: %w", vm, err)
		}
	}
	return nil
}

// List returns the holder of every address that is held. Files that are no
// leases are passed over. No directory means that there are no leases.
func (l Leases) List() (map[netip.Addr]string, error) {
	entries, err := os.ReadDir(l.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return map[netip.Addr]string{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the leases: %w", err)
	}
	all := map[netip.Addr]string{}
	for _, e := range entries {
		a, err := netip.ParseAddr(e.Name())
		if err != nil || !a.Is4() || e.Type() != fs.ModeSymlink {
			continue
		}
		vm, err := os.Readlink(filepath.Join(l.Dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // released since
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read the lease of %v: %w", a, err)
		}
		all[a] = vm
	}
	return all, nil
}

// Index is the address's offset in the subnet: 10 for 192.168.83.10 in
// 192.168.83.0/24. It is below the subnet's size for an address within it, and
// -1 for any other.
func (l Leases) Index(a netip.Addr) int {
	if !a.Is4() || !l.Subnet.Contains(a) {
		return -1
	}
	first, this := l.Subnet.Masked().Addr().As4(), a.As4()
	return int(binary.BigEndian.Uint32(this[:]) - binary.BigEndian.Uint32(first[:]))
}
