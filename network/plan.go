package network

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrNewerRules is in the error about tables of this root whose layout is newer
// than this program knows: they are another version's, which is left to mend them.
var ErrNewerRules = errors.New("the rules were made by a newer clawvm")

// plan is what has to be done to the kernel's tables, in the order of its fields,
// as one transaction: it happens as a whole or not at all.
type plan struct {
	oldTables   []tableVersion
	tables      []table
	sets        []setIn
	chains      []chainIn
	flush       []chainIn // take their rules away
	rules       []chainIn // add theirs
	delElements []elementIn
	addElements []elementIn
	delChains   []chainIn
	delSets     []setIn
}

type setIn struct {
	table table
	set   set
}

type chainIn struct {
	table table
	chain chain
}

type elementIn struct {
	table   table
	set     set
	element element
}

func (p *plan) empty() bool {
	return len(p.oldTables)+len(p.tables)+len(p.sets)+len(p.chains)+len(p.flush)+len(p.rules)+
		len(p.delElements)+len(p.addElements)+len(p.delChains)+len(p.delSets) == 0
}

// versions reads which tables the owner has. It refuses newer ones and returns the older.
func versions(r *rulesReader, owner string) (have map[nftables.TableFamily]bool, older []tableVersion, err error) {
	all, err := r.tables(owner)
	if err != nil {
		return nil, nil, err
	}
	have = map[nftables.TableFamily]bool{}
	for _, t := range all {
		switch {
		case t.version > layout:
			return nil, nil, fmt.Errorf("table %s has layout %d, this program knows %d: %w; use that one's program, or take its VMs and rules down with it",
				t.name, t.version, layout, ErrNewerRules)
		case t.version < layout:
			older = append(older, t)
		default:
			have[t.family] = true
		}
	}
	return have, older, nil
}

// ensureRules plans the shared tables, and with a guest its part of them.
func ensureRules(r *rulesReader, b Bridge, g *Guest) (*plan, error) {
	have, older, err := versions(r, b.Owner)
	if err != nil {
		return nil, err
	}
	p := &plan{oldTables: older}
	shared := sharedTables(b)
	for _, t := range shared {
		if !have[t.family] {
			p.tables = append(p.tables, t)
		}
		if err := p.ensureChains(r, t, have[t.family]); err != nil {
			return nil, err
		}
	}
	if err := p.ensureSets(r, shared, have); err != nil || g == nil {
		return p, err
	}
	parts := guestTables(b, *g)
	isNew := false
	if p.empty() {
		if isNew, err = r.areNew(parts); err != nil {
			return nil, err
		}
	}
	var state setState
	if !isNew {
		if state, err = readSets(r, shared, have); err != nil {
			return nil, err
		}
	}
	for i, t := range parts {
		if err := p.ensureChains(r, t, have[t.family] && !isNew); err != nil {
			return nil, err
		}
		for j, s := range t.sets {
			p.replaceElements(shared[i], shared[i].sets[j], state.of(shared[i], s.name), s.elements,
				state.isOf(shared, g.VM, g.TAP, g.Address))
		}
	}
	return p, p.ensureOwnSets(r, parts[0], g.VM, have[parts[0].family])
}

// ensureOwnSets plans the sets of a VM's own table part, and takes away those that
// it had and doesn't want. What vanishes by itself isn't looked at.
func (p *plan) ensureOwnSets(r *rulesReader, t table, vm string, there bool) error {
	for _, name := range []string{pinsOf(vm), allowedOf(vm)} {
		i := slices.IndexFunc(t.own, func(s set) bool { return s.name == name })
		missing := true
		var now map[string]element
		if there {
			var err error
			if now, missing, err = r.elements(t, name); err != nil {
				return err
			}
		}
		if i < 0 {
			if !missing {
				p.delSets = append(p.delSets, setIn{t, set{name: name}})
			}
			continue
		}
		s := t.own[i]
		if missing {
			p.sets = append(p.sets, setIn{t, s})
		}
		if !s.timeout {
			p.replaceElements(t, s, now, s.elements, func(string, element) bool { return true })
		}
	}
	return nil
}

// ensureChains plans the chains that aren't as described.
func (p *plan) ensureChains(r *rulesReader, t table, there bool) error {
	for _, c := range t.chains {
		var now, want []string
		for _, rule := range c.rules {
			data, err := rule.userData(t.family)
			if err != nil {
				return err
			}
			want = append(want, string(data))
		}
		if there {
			var err error
			if now, err = r.rules(t, c.name); err != nil {
				return err
			}
		}
		if slices.Equal(now, want) {
			continue
		}
		if len(now) > 0 {
			p.flush = append(p.flush, chainIn{t, c})
		} else {
			// There without rules or not there: adding it does for both.
			p.chains = append(p.chains, chainIn{t, c})
		}
		p.rules = append(p.rules, chainIn{t, c})
	}
	return nil
}

// setState is what the sets hold, by family and name of the set.
type setState map[string]map[string]element

func (s setState) of(t table, set string) map[string]element { return s[families[t.family]+set] }

// ensureSets plans the sets that are missing.
func (p *plan) ensureSets(r *rulesReader, shared []table, have map[nftables.TableFamily]bool) error {
	for _, t := range shared {
		for _, s := range t.sets {
			there := false
			if have[t.family] {
				var length uint32
				var err error
				if length, there, err = r.keyLength(t, s.name); err != nil {
					return err
				}
				if there && length != s.key.Bytes {
					return fmt.Errorf("set %s of table %s isn't as clawvm makes it; remove the table: nft delete table %s %s",
						s.name, t.name, families[t.family], t.name)
				}
			}
			if !there {
				p.sets = append(p.sets, setIn{t, s})
			}
		}
	}
	return nil
}

// readSets reads what the sets hold; one that isn't there holds nothing.
func readSets(r *rulesReader, shared []table, have map[nftables.TableFamily]bool) (setState, error) {
	state := setState{}
	for _, t := range shared {
		if !have[t.family] {
			continue
		}
		for _, s := range t.sets {
			all, _, err := r.elements(t, s.name)
			if err != nil {
				return nil, err
			}
			state[families[t.family]+s.name] = all
		}
	}
	return state, nil
}

// isOf returns what tells, for an element of a set, whether it is the VM's: it
// leads to the VM's chains, or is of the VM's address or TAP, or of an address
// or TAP that it had before.
func (s setState) isOf(shared []table, vm, tap string, address netip.Addr) func(set string, e element) bool {
	inet, bridge := shared[0], shared[1]
	addresses, taps := map[string]bool{}, map[string]bool{}
	if address.Is4() {
		addresses[string(word(address))] = true
	}
	if tap != "" {
		taps[string(linkKey(tap))] = true
	}
	for _, m := range []string{mapGuests, mapRefusals} {
		for key, e := range s.of(inet, m) {
			if e.chain == chainOf(vm) || e.chain == refuseChain(vm) {
				addresses[key] = true
			}
		}
	}
	for key := range s.of(bridge, setPins) {
		if addresses[pinAddress(key)] {
			taps[key[:unix.IFNAMSIZ]] = true
		}
	}
	return func(set string, e element) bool {
		key := string(e.key)
		switch set {
		case setTAPs:
			return taps[key]
		case setPins:
			return taps[key[:unix.IFNAMSIZ]] || addresses[pinAddress(key)]
		}
		return addresses[key[:4]]
	}
}

// pinAddress is the address in a key of the set of pins: after the TAP and the MAC.
func pinAddress(key string) string { return key[unix.IFNAMSIZ+8:] }

// replaceElements plans what makes the VM's elements of a set the wanted ones.
func (p *plan) replaceElements(t table, s set, now map[string]element, want []element, isOurs func(string, element) bool) {
	for _, w := range want {
		if e, ok := now[string(w.key)]; !ok || !sameElement(e, w) {
			p.addElements = append(p.addElements, elementIn{t, s, w})
		}
	}
	wanted := make(map[string]element, len(want))
	for _, w := range want {
		wanted[string(w.key)] = w
	}
	for _, e := range now {
		w, kept := wanted[string(e.key)]
		if !(kept && sameElement(e, w)) && isOurs(s.name, e) {
			p.delElements = append(p.delElements, elementIn{t, s, e})
		}
	}
}

func sameElement(x, y element) bool {
	return bytes.Equal(x.key, y.key) && bytes.Equal(x.end, y.end) && bytes.Equal(x.value, y.value) && x.chain == y.chain
}

// removeRules plans to take a VM's part away. An address that another VM has by
// now is that one's.
func removeRules(r *rulesReader, b Bridge, vm string, a netip.Addr) (*plan, error) {
	have, _, err := versions(r, b.Owner)
	if err != nil {
		return nil, err
	}
	p, shared := &plan{}, sharedTables(b)
	if err := (&plan{}).ensureSets(r, shared, have); err != nil {
		return nil, err
	}
	state, err := readSets(r, shared, have)
	if err != nil {
		return nil, err
	}
	if a.Is4() {
		if e, ok := state.of(shared[0], mapGuests)[string(word(a))]; ok && e.chain != chainOf(vm) {
			a = netip.Addr{}
		}
	}
	isOurs := state.isOf(shared, vm, "", a)
	for _, t := range shared {
		for _, s := range t.sets {
			p.replaceElements(t, s, state.of(t, s.name), nil, isOurs)
		}
	}
	if !have[shared[0].family] {
		return p, nil
	}
	for _, name := range []string{chainOf(vm), refuseChain(vm)} {
		there, err := r.hasChain(shared[0], name)
		if err != nil {
			return nil, err
		}
		if there {
			c := chainIn{shared[0], chain{name: name}}
			p.flush, p.delChains = append(p.flush, c), append(p.delChains, c)
		}
	}
	return p, p.ensureOwnSets(r, shared[0], vm, true)
}

// commit sends the plan to the kernel.
func (p *plan) commit() error {
	if p.empty() {
		return nil
	}
	// A Conn keeps its first error for good, so each transaction has its own.
	c, err := nftables.New(nftables.WithSockOptions(largeBatches))
	if err != nil {
		return err
	}
	for _, t := range p.oldTables {
		c.DelTable(&nftables.Table{Family: t.family, Name: t.name})
	}
	for _, t := range p.tables {
		c.AddTable(t.nft())
	}
	for i, s := range p.sets {
		// The library numbers sets from a variable that it doesn't protect.
		n := s.nft()
		n.ID = uint32(i + 1)
		if err := c.AddSet(n, nil); err != nil {
			return err
		}
	}
	for _, ch := range p.chains {
		c.AddChain(ch.nft())
	}
	for _, ch := range p.flush {
		c.FlushChain(ch.nft())
	}
	for _, ch := range p.rules {
		for _, r := range ch.chain.rules {
			data, err := r.userData(ch.table.family)
			if err != nil {
				return err
			}
			c.AddRule(&nftables.Rule{Table: ch.table.nft(), Chain: ch.nft(), Exprs: r.exprs, UserData: data})
		}
	}
	for _, some := range batches(p.delElements) {
		var keys []nftables.SetElement
		for _, e := range some {
			keys = append(keys, nftables.SetElement{Key: e.element.key, KeyEnd: e.element.end})
		}
		if err := c.SetDeleteElements(setIn{some[0].table, some[0].set}.nft(), keys); err != nil {
			return err
		}
	}
	for _, some := range batches(p.addElements) {
		var elements []nftables.SetElement
		for _, e := range some {
			elements = append(elements, e.element.nft())
		}
		if err := c.SetAddElements(setIn{some[0].table, some[0].set}.nft(), elements); err != nil {
			return err
		}
	}
	for _, ch := range p.delChains {
		c.DelChain(ch.nft())
	}
	for _, s := range p.delSets {
		c.DelSet(s.nft())
	}
	return c.Flush()
}

// elementsAtOnce is how many elements one message holds: their length in it is a
// number of 16 bits, and more are lost without an error.
const elementsAtOnce = 500

// batches are the elements in pieces of one set each, small enough for a message.
func batches(all []elementIn) [][]elementIn {
	var out [][]elementIn
	for len(all) > 0 {
		n := 1
		for n < len(all) && n < elementsAtOnce && all[n].table.family == all[0].table.family && all[n].set.name == all[0].set.name {
			n++
		}
		out, all = append(out, all[:n]), all[n:]
	}
	return out
}

// batchBuffer holds a transaction as a whole, which is one message to the kernel:
// 10,000 elements have 1.5 MB.
const batchBuffer = 16 << 20

func largeBatches(c *netlink.Conn) error { return c.SetWriteBuffer(batchBuffer) }

func (t table) nft() *nftables.Table { return &nftables.Table{Family: t.family, Name: t.name} }

func (s setIn) nft() *nftables.Set {
	n := &nftables.Set{Table: s.table.nft(), Name: s.set.name, IsMap: s.set.isMap, KeyType: s.set.key, DataType: s.set.data,
		KeyByteOrder: binaryutil.BigEndian, Size: s.set.size, HasTimeout: s.set.timeout, Dynamic: s.set.dynamic,
		Interval: s.set.interval, Concatenation: s.set.interval}
	if s.set.byLink {
		n.KeyByteOrder = binaryutil.NativeEndian // or the nft program shows the names as ""
	}
	return n
}

func (c chainIn) nft() *nftables.Chain {
	n := &nftables.Chain{Table: c.table.nft(), Name: c.chain.name}
	if h := c.chain.hook; h != nil {
		policy := nftables.ChainPolicyAccept
		n.Type, n.Hooknum, n.Priority, n.Policy = h.kind, &h.point, nftables.ChainPriorityRef(nftables.ChainPriority(h.priority)), &policy
	}
	return n
}

func (e element) nft() nftables.SetElement {
	n := nftables.SetElement{Key: e.key, KeyEnd: e.end, Val: e.value}
	if e.chain != "" {
		n.VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: e.chain}
	}
	return n
}
