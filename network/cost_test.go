package network

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"
)

// costs are how long things took, by what was done.
type costs map[string][]time.Duration

func (c costs) clock(t *testing.T, what string, f func() error) {
	t.Helper()
	begin := time.Now()
	must(t, f())
	c[what] = append(c[what], time.Since(begin))
}

// of says how long something took: the median, the quickest and the slowest.
func (c costs) of(what string) string {
	all := slices.Sorted(slices.Values(c[what]))
	return fmt.Sprintf("%s %v (%v to %v)", what, all[len(all)/2].Round(time.Microsecond), all[0].Round(time.Microsecond), all[len(all)-1].Round(time.Microsecond))
}

// costProbes is how often each thing is done.
const costProbes = 9

func costGuest(i int) Guest {
	return Guest{VM: fmt.Sprintf("vm%d", i), Address: netip.AddrFrom4([4]byte{10, 77, byte(1 + i/200), byte(1 + i%200)}),
		Egress: EgressOpen, Resolver: uint16(5000 + i), LogGroup: uint16(i)}
}

// TestCostOfAVM gives one more VM its rules where there are 50, 200 and 1,000. What
// is read for that is the same; how long it takes is for the reader of `go test -v`.
func TestCostOfAVM(t *testing.T) {
	if !isolated(t) {
		return
	}
	r := testRules(t, Bridge{Name: "microbr", Address: netip.MustParsePrefix("10.77.0.1/20"), Owner: "0a1b2c3d"})
	reads := map[int]int{}
	there := 0
	for _, n := range []int{50, 200, 1000} {
		// Ten in a transaction, as only the result matters.
		must(t, r.Ensure(costGuest(2000)))
		must(t, r.Remove(costGuest(2000).VM, costGuest(2000).Address))
		for there < n {
			p := &plan{}
			for range 10 {
				g := get(costGuest(there).filled(r.Bridge))(t)
				there++
				shared := sharedTables(r.Bridge)
				for i, part := range guestTables(r.Bridge, g) {
					must(t, p.ensureChains(nil, part, false))
					for j, s := range part.sets {
						p.replaceElements(shared[i], shared[i].sets[j], nil, s.elements, nil)
					}
				}
			}
			must(t, p.commit())
		}
		took := costs{}
		for i := range costProbes {
			g := costGuest(2000 + i)
			filled := get(g.filled(r.Bridge))(t)
			must(t, reading(func(k *rulesReader) error {
				_, err := ensureRules(k, r.Bridge, &filled)
				reads[n] = k.read
				return err
			}))
			took.clock(t, "added", func() error { return r.Ensure(g) })
			took.clock(t, "removed", func() error { return r.Remove(g.VM, g.Address) })
		}
		if all := get(r.List())(t); len(all) != n {
			t.Errorf("%d VMs have rules, want %d", len(all), n)
		}
		t.Logf("with %d VMs: %d messages read, %s, %s", n, reads[n], took.of("added"), took.of("removed"))
	}
	if reads[50] != reads[1000] || reads[50] == 0 {
		t.Errorf("for one more VM, %d messages are read where there are 50, and %d where there are 1,000", reads[50], reads[1000])
	}
}

// TestCostOfAPort attaches one more VM to a bridge with few and with many ports. How
// long it takes is for the reader of `go test -v`; CLAWVM_PORTS says how many.
func TestCostOfAPort(t *testing.T) {
	if !isolated(t) {
		return
	}
	b := Bridge{Name: "microbr", Address: netip.MustParsePrefix("10.77.0.1/20"), Owner: "0a1b2c3d"}
	get(EnsureBridge(b))(t)
	port := func(i int) Port {
		g := costGuest(i)
		return Port{VM: g.VM, Address: g.Address, UID: 1000, GID: 1000}
	}
	most := 20
	if text := os.Getenv("CLAWVM_PORTS"); text != "" {
		most = get(strconv.Atoi(text))(t)
	}
	there := 0
	for _, n := range []int{1, most / 5, most} {
		for ; there < n; there++ {
			must(t, b.EnsurePort(port(there)))
		}
		took := costs{}
		for i := range costProbes {
			p := port(2000 + i)
			// As up does it: a TAP that was left goes first.
			took.clock(t, "looked for", func() error { return b.RemovePort(p) })
			took.clock(t, "made", func() error { return b.EnsurePort(p) })
			took.clock(t, "removed", func() error { return b.RemovePort(p) })
		}
		if all := get(b.Ports())(t); len(all) != n {
			t.Errorf("%d ports, want %d", len(all), n)
		}
		t.Logf("with %d ports: %s, %s, %s", n, took.of("looked for"), took.of("made"), took.of("removed"))
	}
}
