package network

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Destination is a port of addresses, of TCP or UDP.
type Destination struct {
	Prefix   netip.Prefix // of IPv4, masked; a /32 for one address
	Protocol uint8        // unix.IPPROTO_TCP or unix.IPPROTO_UDP
	Port     uint16
}

func (d Destination) String() string {
	return fmt.Sprintf("%v . %s . %d", d.text(), protocols[d.Protocol], d.Port)
}

// text is the prefix as the nft program lists it.
func (d Destination) text() string {
	if d.Prefix.IsSingleIP() {
		return d.Prefix.Addr().String()
	}
	return d.Prefix.String()
}

func (d Destination) check() error {
	if !d.Prefix.Addr().Is4() || d.Prefix != d.Prefix.Masked() || protocols[d.Protocol] == "" || d.Port == 0 {
		return fmt.Errorf("%v protocol %d port %d is no destination", d.Prefix, d.Protocol, d.Port)
	}
	return nil
}

// MaxPins bounds the addresses and ports that a VM has pinned at a time. The kernel
// takes some 100 bytes for each.
const MaxPins = 4096

// ErrManyPins says that a VM has MaxPins already.
var ErrManyPins = errors.New("too many addresses are pinned")

func destinationKey(a netip.Addr, proto uint8, port uint16) []byte {
	return append(append(word(a), proto, 0, 0, 0), portWord(port)...)
}

// allowedElements are the ranges of destinations. The kernel refuses ranges that
// overlap, so what lies within another of the same port is left out; two networks
// can't overlap otherwise.
func allowedElements(all []Destination) []element {
	sorted := slices.SortedFunc(slices.Values(all), func(a, b Destination) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port),
			a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
	})
	var elements []element
	var last Destination
	for i, d := range sorted {
		if i > 0 && d.Protocol == last.Protocol && d.Port == last.Port && last.Prefix.Contains(d.Prefix.Addr()) {
			continue
		}
		last = d
		elements = append(elements, element{text: d.String(),
			key: destinationKey(d.Prefix.Addr(), d.Protocol, d.Port), end: destinationKey(lastOf(d.Prefix), d.Protocol, d.Port)})
	}
	return elements
}

// lastOf is the last address of an IPv4 network.
func lastOf(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(a)
}

// Pinner lets a VM with egress "allowlist" reach single addresses for a time. It
// may be used by many at once. Close it.
type Pinner struct {
	table table
	set   set

	mu   sync.Mutex
	conn *nftables.Conn // nil: to be opened
}

// Pinner returns the VM's, whose rules Ensure makes.
func (r Rules) Pinner(vm string) *Pinner {
	return &Pinner{table: inetTable(r.Bridge), set: set{name: pinsOf(vm), key: typeDestination, size: MaxPins, timeout: true}}
}

// Pin allows destinations, each a single address, until the time has passed from
// now, whatever time they had left. It happens to all or none. The error is
// ErrManyPins when there is no room, ErrNoPins when the VM's rules aren't there.
func (p *Pinner) Pin(all []Destination, keep time.Duration) error {
	if err := p.change(all, keep); err != nil {
		return fmt.Errorf("cannot pin %d addresses: %w", len(all), err)
	}
	return nil
}

// Unpin takes destinations back. What has vanished by itself meanwhile is no error.
func (p *Pinner) Unpin(all []Destination) error {
	if err := p.change(all, 0); err != nil {
		return fmt.Errorf("cannot take back %d pinned addresses: %w", len(all), err)
	}
	return nil
}

// ErrNoPins says that the VM's rules are not there, or don't pin.
var ErrNoPins = errors.New("the VM's packet filter rules are not there")

func (p *Pinner) change(all []Destination, keep time.Duration) (err error) {
	for _, d := range all {
		if err := d.check(); err != nil {
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == nil {
		// Lasting: closing a socket that deleted something waits for the kernel, 15 ms.
		if p.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(largeBatches)); err != nil {
			return err
		}
	}
	for some := range slices.Chunk(all, elementsAtOnce) {
		if err := p.plan(some, keep); err != nil {
			return err
		}
	}
	err = p.conn.Flush()
	if err != nil {
		// A Conn keeps its first error for good.
		err = errors.Join(err, p.close())
	}
	switch {
	case errors.Is(err, unix.ENFILE):
		return ErrManyPins
	case errors.Is(err, unix.ENOENT):
		return ErrNoPins
	}
	return err
}

// plan queues what sets or removes elements. Adding one that is there leaves its
// time as it was, and removing one that isn't there is an error: so it is added,
// removed and, unless it is to go, added.
func (p *Pinner) plan(all []Destination, keep time.Duration) error {
	s := setIn{p.table, p.set}.nft()
	var keys, elements []nftables.SetElement
	for _, d := range all {
		key := destinationKey(d.Prefix.Addr(), d.Protocol, d.Port)
		keys = append(keys, nftables.SetElement{Key: key, Timeout: keep})
		elements = append(elements, nftables.SetElement{Key: key, Timeout: keep})
	}
	if err := p.conn.SetAddElements(s, elements); err != nil {
		return err
	}
	if err := p.conn.SetDeleteElements(s, keys); err != nil {
		return err
	}
	if keep == 0 {
		return nil
	}
	return p.conn.SetAddElements(s, elements)
}

// Close closes the connection to the kernel. What is pinned stays pinned.
func (p *Pinner) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.close()
}

func (p *Pinner) close() error {
	if p.conn == nil {
		return nil
	}
	err := p.conn.CloseLasting()
	p.conn = nil
	return err
}
