package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// generation counts the transactions on the namespace's rules.
func generation(t *testing.T) uint32 {
	t.Helper()
	c := get(netlink.Dial(unix.NETLINK_NETFILTER, nil))(t)
	defer c.Close()
	msgs := get(c.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN), Flags: netlink.Request},
		Data:   []byte{0, unix.NFNETLINK_V0, 0, 0}}))(t)
	var id uint32
	must(t, attributes(msgs[0].Data[nfgenmsg:], func(d *netlink.AttributeDecoder) {
		if d.Type() == unix.NFTA_GEN_ID {
			id = d.Uint32()
		}
	}))
	return id
}

func firstDifference(x, y string) string {
	n := 0
	for n < min(len(x), len(y)) && x[n] == y[n] {
		n++
	}
	from := max(0, n-60)
	return "first difference: " + x[from:min(n+60, len(x))] + "\n             not: " + y[from:min(n+60, len(y))]
}

var elementList = regexp.MustCompile(`elements = \{ ([^}]*) \}`)

// words brings a listing into one line and its sets' elements into one order.
func words(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return elementList.ReplaceAllStringFunc(s, func(list string) string {
		elements := strings.Split(elementList.FindStringSubmatch(list)[1], ", ")
		slices.Sort(elements)
		return "elements = { " + strings.Join(elements, ", ") + " }"
	})
}

// The kernel holds what Describe says, word for word as the nft program lists it.
func TestRulesAreAsDescribed(t *testing.T) {
	if !isolated(t) {
		return
	}
	r := testRules(t, testBridge)
	guests := []Guest{openGuest, noneGuest, cutGuest, listGuest}
	for _, g := range guests {
		if get(r.Present(g))(t) {
			t.Errorf("%s is there before it was made", g.VM)
		}
		must(t, r.Ensure(g))
		if !get(r.Present(g))(t) {
			t.Errorf("%s isn't there after it was made", g.VM)
		}
	}
	listed := nft(t, "list", "table", "inet", "clawvm_v1_0a1b2c3d") + nft(t, "list", "table", "bridge", "clawvm_v1_0a1b2c3d")
	want := get(Describe(testBridge, guests...))(t)
	if words(listed) != words(want) {
		t.Errorf("nft lists\n%s\nnot\n%s\n%s", listed, want, firstDifference(words(listed), words(want)))
	}
	if all := get(r.List())(t); len(all) != 4 || all["cut"] != cutGuest.Address {
		t.Error(all)
	}
	before := generation(t)
	for _, g := range guests {
		must(t, r.Ensure(g))
	}
	if after := generation(t); after != before {
		t.Errorf("Ensure of what is there made %d transactions", after-before)
	}
	for _, g := range guests {
		must(t, r.Remove(g.VM, g.Address))
	}
	listed = nft(t, "list", "table", "inet", "clawvm_v1_0a1b2c3d") + nft(t, "list", "table", "bridge", "clawvm_v1_0a1b2c3d")
	if words(listed) != words(get(Describe(testBridge))(t)) {
		t.Errorf("after the last VM nft lists\n%s", listed)
	}
	before = generation(t)
	for _, g := range guests {
		must(t, r.Remove(g.VM, g.Address))
		must(t, r.Remove(g.VM, netip.Addr{}))
	}
	if after := generation(t); after != before {
		t.Errorf("Remove of what isn't there made %d transactions", after-before)
	}
	get(EnsureBridge(testBridge))(t)
	must(t, RemoveBridge(testBridge))
	if left := rulesNow(t); left != "" {
		t.Errorf("left over:\n%s", left)
	}
	must(t, r.Remove("openclaw", openGuest.Address))
	if all := get(r.List())(t); len(all) != 0 {
		t.Error(all)
	}
}

// Whatever is broken by hand, Present sees it and Ensure mends it.
func TestRulesMended(t *testing.T) {
	if !isolated(t) {
		return
	}
	r := testRules(t, testBridge)
	must(t, r.Ensure(noneGuest))
	must(t, r.Ensure(openGuest))
	want := words(rulesNow(t))
	const inet, bridge = "inet clawvm_v1_0a1b2c3d", "bridge clawvm_v1_0a1b2c3d"
	for _, broken := range []string{
		"delete element " + inet + " guests { 192.168.83.10 : goto vm_openclaw }",
		"delete element " + inet + " services { 192.168.83.10 . udp . 5310 }",
		"delete element " + bridge + " taps { \"clawc0a8530a\" }",
		"delete element " + bridge + " pins { \"clawc0a8530a\" . 02:63:c0:a8:53:0a . 192.168.83.10 }",
		"add element " + bridge + " pins { \"clawc0a8530a\" . 02:63:c0:a8:53:0a . 192.168.83.66 }",
		"add element " + inet + " services { 192.168.83.10 . tcp . 22 }",
		"flush chain " + inet + " from_guests",
		"flush chain " + inet + " vm_openclaw",
		"flush table " + inet,
		"flush table " + bridge,
		"insert rule " + inet + " vm_openclaw accept",
		"add rule " + inet + " input accept",
		"delete table " + bridge,
	} {
		nft(t, strings.Fields(broken)...)
		if get(r.Present(openGuest))(t) {
			t.Errorf("%s: not seen", broken)
		}
		must(t, r.Ensure(openGuest))
		must(t, r.Ensure(noneGuest))
		if !get(r.Present(openGuest))(t) {
			t.Errorf("%s: not mended", broken)
		}
		if broken == "delete table "+bridge {
			break // made anew in another order than it was
		}
		if got := words(rulesNow(t)); got != want {
			t.Errorf("%s: after Ensure: %s", broken, firstDifference(got, want))
		}
	}
	// Another address and TAP, as after a change of the declaration.
	moved := openGuest
	moved.Address, moved.Resolver, moved.LogGroup = netip.MustParseAddr("192.168.83.50"), 5350, 50
	must(t, r.Ensure(moved))
	if now := rulesNow(t); strings.Contains(now, "192.168.83.10") || strings.Contains(now, "clawc0a8530a") || strings.Contains(now, "5310") {
		t.Error(now)
	}
	// Its former address goes to another VM, which a late Remove doesn't harm.
	next := openGuest
	next.VM = "next"
	must(t, r.Ensure(next))
	must(t, r.Remove("openclaw", openGuest.Address))
	if !get(r.Present(next))(t) || get(r.Present(moved))(t) {
		t.Error(rulesNow(t))
	}
	// An address that leads to a VM which is gone without a word is taken over.
	heir := next
	heir.VM = "heir"
	must(t, r.Ensure(heir))
	must(t, r.Remove("next", netip.Addr{}))
	if !get(r.Present(heir))(t) {
		t.Error(rulesNow(t))
	}
}

func TestRulesOfOtherVersions(t *testing.T) {
	if !isolated(t) {
		return
	}
	r := testRules(t, testBridge)
	nft(t, "add", "table", "inet", "clawvm_v0_0a1b2c3d")
	nft(t, "add", "table", "inet", "clawvm_v0_99999999")
	nft(t, "add", "table", "inet", "clawvm_v2_99999999")
	nft(t, "add", "table", "inet", "clawvm_vx_0a1b2c3d")
	must(t, r.Ensure(openGuest))
	now := rulesNow(t)
	if strings.Contains(now, "clawvm_v0_0a1b2c3d") || !strings.Contains(now, "clawvm_v0_99999999") ||
		!strings.Contains(now, "clawvm_v2_99999999") || !strings.Contains(now, "clawvm_vx_0a1b2c3d") {
		t.Error(now)
	}
	nft(t, "add", "table", "bridge", "clawvm_v2_0a1b2c3d")
	before := generation(t)
	_, present := r.Present(openGuest)
	for what, err := range map[string]error{"ensure": r.Ensure(openGuest), "remove": r.Remove("openclaw", openGuest.Address),
		"present": present, "bridge": RemoveBridge(testBridge)} {
		if !errors.Is(err, ErrNewerRules) || !strings.Contains(err.Error(), "clawvm_v2_0a1b2c3d has layout 2") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if after := generation(t); after != before {
		t.Error("something was changed")
	}
}

// Two roots on a host never touch each other's rules and links.
func TestTwoRoots(t *testing.T) {
	if !isolated(t) {
		return
	}
	up := newUplink(t)
	one := testRules(t, testBridge)
	two := Rules{Bridge: Bridge{Name: "otherbr", Address: netip.MustParsePrefix("192.168.90.1/28"), Owner: "99999999"}, Lock: one.Lock}
	get(EnsureBridge(one.Bridge))(t)
	get(EnsureBridge(two.Bridge))(t)
	first := newVM(t, one, openGuest)
	rules, links := func() string {
		return nft(t, "list", "table", "inet", "clawvm_v1_0a1b2c3d") + nft(t, "list", "table", "bridge", "clawvm_v1_0a1b2c3d")
	}, func() string {
		var mine []string
		for _, l := range strings.Split(linksNow(t), "\n") {
			if strings.Contains(l, "0a1b2c3d") || strings.Contains(l, "192.168.83.") {
				mine = append(mine, l)
			}
		}
		return strings.Join(mine, "\n")
	}
	first.answers(t, "tcp", server+":80", "server "+hostUplink) // from now on its connections are counted
	rulesBefore, linksBefore := stripCounters(rules()), links()
	// The same VM's name, in the other root.
	g := Guest{VM: "openclaw", Address: netip.MustParseAddr("192.168.90.2"), Egress: EgressOpen, LogGroup: 20}
	second := newVM(t, two, g)
	first.answers(t, "tcp", server+":80", "server "+hostUplink)
	second.answers(t, "tcp", server+":80", "server "+hostUplink)
	first.serve(t, "first", "0.0.0.0:80")
	second.serve(t, "second", "0.0.0.0:80")
	(*space)(nil).answers(t, "tcp", "192.168.90.2:80", "second 192.168.90.1")
	// Across the roots: neither the other's VMs nor its bridge's address.
	first.refuses(t, "tcp", "192.168.90.2:80")
	second.refuses(t, "tcp", "192.168.83.10:80")
	first.refuses(t, "tcp", "192.168.90.1:80")
	second.refuses(t, "tcp", "192.168.83.1:80")
	up.serve(t, "up", router+":81")
	must(t, two.Remove("openclaw", g.Address))
	if _, _, err := second.ask("tcp", server+":80"); err == nil {
		t.Error("a VM without rules is answered")
	}
	first.answers(t, "tcp", server+":80", "server "+hostUplink)
	second.tap.Close()
	must(t, two.Bridge.RemovePort(Port{VM: "openclaw", Address: g.Address}))
	must(t, RemoveBridge(two.Bridge))
	if now := stripCounters(rules()); now != rulesBefore {
		t.Errorf("the other root changed\n%s\nto\n%s", rulesBefore, now)
	}
	if now := links(); now != linksBefore {
		t.Errorf("the other root changed\n%s\nto\n%s", linksBefore, now)
	}
	if now := rulesNow(t); strings.Contains(now, "99999999") {
		t.Errorf("left over:\n%s", now)
	}
}

func stripCounters(s string) string {
	f := strings.Fields(s)
	for i := range f {
		if i > 0 && (f[i-1] == "packets" || f[i-1] == "bytes") {
			f[i] = "N"
		}
	}
	return strings.Join(f, " ")
}

// After a flush the watcher calls, and Ensure brings everything back.
func TestFlushAndWatch(t *testing.T) {
	if !isolated(t) {
		return
	}
	newUplink(t)
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	v := newVM(t, r, openGuest)
	v.answers(t, "tcp", server+":80", "server "+hostUplink)
	ctx, cancel := context.WithCancel(t.Context())
	gone, ended := make(chan struct{}, 100), make(chan error, 1)
	go func() { ended <- r.Watch(ctx, func() { gone <- struct{}{} }) }()
	wait := func(what string) {
		t.Helper()
		select {
		case <-gone:
		case err := <-ended:
			t.Fatalf("%s: the watch ended: %v", what, err)
		case <-time.After(5 * time.Second):
			t.Fatalf("%s: not seen", what)
		}
	}
	// The watch listens when it has seen something; until then, try.
	soon(t, "the watch listens", func() bool {
		nft(t, "flush", "ruleset")
		must(t, r.Ensure(openGuest))
		return len(gone) > 0
	})
	for len(gone) > 0 {
		<-gone
	}
	for _, broken := range []string{"flush ruleset", "delete table bridge clawvm_v1_0a1b2c3d", "flush table inet clawvm_v1_0a1b2c3d",
		"flush chain inet clawvm_v1_0a1b2c3d from_guests"} {
		begin := time.Now()
		nft(t, strings.Fields(broken)...)
		wait(broken)
		must(t, r.Ensure(openGuest))
		took := time.Since(begin)
		if !get(r.Present(openGuest))(t) {
			t.Errorf("%s: not restored", broken)
		}
		t.Logf("%s: nft's own start, notice and Ensure took %v", broken, took)
		v.answers(t, "tcp", server+":80", "server "+hostUplink)
		for len(gone) > 0 {
			<-gone
		}
	}
	// Other VMs' and other tables' comings and goings are no reason.
	must(t, r.Ensure(noneGuest))
	must(t, r.Remove(noneGuest.VM, noneGuest.Address))
	nft(t, "add", "table", "inet", "others")
	nft(t, "delete", "table", "inet", "others")
	nft(t, "delete", "table", "inet", "clawvm_v1_0a1b2c3d")
	wait("the last")
	if n := len(gone); n != 0 {
		t.Errorf("called %d times without a reason", n)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	// One that begins when the tables are gone already says so.
	ctx, cancel = context.WithCancel(t.Context())
	go func() { ended <- r.Watch(ctx, func() { gone <- struct{}{} }) }()
	wait("gone before")
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// What a VM had goes with it, and nothing else does.
func TestNothingLeft(t *testing.T) {
	if !isolated(t) {
		return
	}
	newUplink(t)
	r := testRules(t, testBridge)
	get(EnsureBridge(testBridge))(t)
	stays := newVM(t, r, noneGuest)
	linksBefore, rulesBefore := linksNow(t), stripCounters(rulesNow(t))
	v := newVM(t, r, openGuest)
	v.answers(t, "tcp", server+":80", "server "+hostUplink)
	if received, sent, err := testBridge.Counters("clawc0a8530a"); err != nil || received == 0 || sent == 0 {
		t.Error(received, sent, err)
	}
	must(t, v.tap.Close())
	must(t, r.Remove(openGuest.VM, openGuest.Address))
	must(t, testBridge.RemovePort(Port{VM: openGuest.VM, Address: openGuest.Address}))
	if now := linksNow(t); now != linksBefore {
		t.Errorf("links left over:\n%snot\n%s", now, linksBefore)
	}
	if now := stripCounters(rulesNow(t)); now != rulesBefore {
		t.Errorf("rules left over:\n%s\nnot\n%s", now, rulesBefore)
	}
	stays.serve(t, "stays", "0.0.0.0:80")
	(*space)(nil).answers(t, "tcp", "192.168.83.11:80", "stays 192.168.83.1")
}

// 200 VMs come, and every other one goes again, all at once, while others change
// their tables: nothing is lost, nothing is left.
func TestManyAtOnce(t *testing.T) {
	if !isolated(t) {
		return
	}
	r := testRules(t, Bridge{Name: "microbr", Address: netip.MustParsePrefix("10.77.0.1/22"), Owner: "0a1b2c3d"})
	get(EnsureBridge(r.Bridge))(t)
	const vms, others = 200, 20
	guest := func(i int) Guest {
		return Guest{VM: fmt.Sprintf("vm%d", i), Address: netip.AddrFrom4([4]byte{10, 77, byte(1 + i/200), byte(1 + i%200)}),
			Egress: EgressOpen, Resolver: uint16(5000 + i), LogGroup: uint16(i)}
	}
	var wg sync.WaitGroup
	errs := make(chan error, 4*vms)
	begin := time.Now()
	for i := range vms {
		wg.Add(1)
		go func() {
			defer wg.Done()
			g := guest(i)
			p := Port{VM: g.VM, Address: g.Address, UID: 1000, GID: 1000}
			errs <- r.Bridge.EnsurePort(p)
			errs <- r.Ensure(g)
			if i%2 == 0 {
				errs <- r.Remove(g.VM, g.Address)
				errs <- r.Bridge.RemovePort(p)
			}
		}()
	}
	for i := range others {
		wg.Add(1)
		go func() {
			defer wg.Done()
			c, err := nftables.New()
			if err == nil {
				c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: fmt.Sprintf("others%d", i)})
				err = c.Flush()
			}
			errs <- err
		}()
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d VMs' ports and rules made, half of them removed, at once: %v", vms, time.Since(begin))
	ports := get(r.Bridge.Ports())(t)
	if len(ports) != vms/2 {
		t.Errorf("%d ports", len(ports))
	}
	if all := get(r.List())(t); len(all) != vms/2 {
		t.Errorf("%d VMs have rules", len(all))
	}
	for i := range vms {
		if is, want := get(r.Present(guest(i)))(t), i%2 == 1; is != want {
			t.Errorf("vm%d: present %v", i, is)
		}
	}
}

// Of those who find nothing and make the shared tables at the same time, one does.
func TestFirstAtOnce(t *testing.T) {
	if !isolated(t) {
		return
	}
	r := testRules(t, testBridge)
	for round := range 20 {
		const vms = 6
		guest := func(i int) Guest {
			return Guest{VM: fmt.Sprintf("vm%d", i), Address: netip.AddrFrom4([4]byte{192, 168, 83, byte(10 + i)}), Egress: EgressOpen}
		}
		var wg sync.WaitGroup
		errs, start := make([]error, vms), make(chan struct{})
		for i := range vms {
			wg.Add(1)
			go func() {
				defer wg.Done()
				<-start
				errs[i] = r.Ensure(guest(i))
			}()
		}
		close(start)
		wg.Wait()
		for i := range vms {
			if errs[i] != nil || !get(r.Present(guest(i)))(t) {
				t.Fatalf("round %d: vm%d: %v\n%s", round, i, errs[i], rulesNow(t))
			}
		}
		must(t, removeTables(testBridge.Owner))
	}
}

// What a change costs with one VM there and with hundreds. Nothing is asserted: it
// is for the reader of `go test -v`.
func TestCostOfAChange(t *testing.T) {
	if !isolated(t) {
		return
	}
	r := testRules(t, Bridge{Name: "microbr", Address: netip.MustParsePrefix("10.77.0.1/20"), Owner: "0a1b2c3d"})
	guest := func(i int) Guest {
		return Guest{VM: fmt.Sprintf("vm%d", i), Address: netip.AddrFrom4([4]byte{10, 77, byte(1 + i/200), byte(1 + i%200)}),
			Egress: EgressOpen, Resolver: uint16(5000 + i), LogGroup: uint16(i)}
	}
	took := func(f func() error) time.Duration {
		begin := time.Now()
		must(t, f())
		return time.Since(begin).Round(10 * time.Microsecond)
	}
	t.Logf("the first VM, with the tables: %v", took(func() error { return r.Ensure(guest(0)) }))
	there := 1
	for _, n := range []int{1, 100, 300} {
		for ; there < n; there++ {
			must(t, r.Ensure(guest(there)))
		}
		g := guest(2000)
		t.Logf("with %4d VMs: add one more %v, Ensure again %v, Present %v, Remove %v", n,
			took(func() error { return r.Ensure(g) }), took(func() error { return r.Ensure(g) }),
			took(func() error { _, err := r.Present(g); return err }), took(func() error { return r.Remove(g.VM, g.Address) }))
	}
}

// Present says whether all that Ensure makes for the VM is there. It changes
// nothing and waits for nobody.
func (r Rules) Present(g Guest) (bool, error) {
	g, err := g.filled(r.Bridge)
	present := false
	if err == nil {
		err = reading(func(k *rulesReader) error {
			p, err := ensureRules(k, r.Bridge, &g)
			present = err == nil && p.empty()
			return err
		})
	}
	if err != nil {
		return false, fmt.Errorf("cannot look for the rules of VM %s: %w", g.VM, err)
	}
	return present, nil
}
