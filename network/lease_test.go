package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestLease(t *testing.T) {
	l := Leases{Dir: filepath.Join(t.TempDir(), "leases"), Subnet: netip.MustParsePrefix("192.168.83.1/24")}
	if all := get(l.List())(t); len(all) != 0 {
		t.Error(all)
	}
	must(t, l.Release("nobody"))
	if _, ok, err := l.Lookup("one"); ok || err != nil {
		t.Error(ok, err)
	}
	one := get(l.Acquire("one", netip.Addr{}))(t)
	if one.String() != "192.168.83.2" {
		t.Error(one)
	}
	if again := get(l.Acquire("one", netip.Addr{}))(t); again != one {
		t.Error(again)
	}
	if got, ok, err := l.Lookup("one"); got != one || !ok || err != nil {
		t.Error(got, ok, err)
	}
	wanted := netip.MustParseAddr("192.168.83.77")
	if got := get(l.Acquire("one", wanted))(t); got != wanted {
		t.Error(got)
	}
	if all := get(l.List())(t); len(all) != 1 || all[wanted] != "one" {
		t.Error("the former address is held still:", all)
	}
	must(t, os.Symlink("two", filepath.Join(l.Dir, "192.168.83.9")))
	must(t, os.Symlink("two", filepath.Join(l.Dir, "192.168.83.8"))) // the lower one counts
	must(t, os.Symlink("three", filepath.Join(l.Dir, "10.0.0.3")))   // of another subnet
	if held := get(l.ByVM())(t); len(held) != 2 || held["one"] != wanted || held["two"].String() != "192.168.83.8" {
		t.Error(held)
	}
	must(t, l.Release("two"))
	must(t, l.Release("three"))
	_, err := l.Acquire("two", wanted)
	if !errors.Is(err, ErrTaken) || !strings.Contains(err.Error(), "held by VM one") {
		t.Error(err)
	}
	for _, a := range []string{"192.168.83.0", "192.168.83.1", "192.168.83.255", "192.168.84.2", "::1", "::ffff:192.168.83.9"} {
		if _, err := l.Acquire("two", netip.MustParseAddr(a)); !errors.Is(err, ErrOutside) {
			t.Errorf("%s: %v", a, err)
		}
	}
	if i := l.Index(wanted); i != 77 {
		t.Error(i)
	}
	if i := l.Index(netip.MustParseAddr("10.0.0.1")); i != -1 {
		t.Error(i)
	}
	// What isn't a lease is passed over.
	must(t, os.WriteFile(filepath.Join(l.Dir, "192.168.83.5"), nil, 0o600))
	must(t, os.WriteFile(filepath.Join(l.Dir, "notes"), nil, 0o600))
	if all := get(l.List())(t); len(all) != 1 {
		t.Error(all)
	}
	// Another subnet: the lease doesn't count, and goes when the VM gets one that does.
	moved := l
	moved.Subnet = netip.MustParsePrefix("10.9.8.1/24")
	if got := get(moved.Acquire("one", netip.Addr{}))(t); got.String() != "10.9.8.2" {
		t.Error(got)
	}
	must(t, moved.Release("one"))
	if all := get(l.List())(t); len(all) != 0 {
		t.Error(all)
	}
	if _, err := l.Acquire("../etc", netip.Addr{}); err == nil {
		t.Error("a lease for what is no name")
	}
}

// 32 VMs want one of the 13 addresses of a /28 at once: each that gets one holds
// it alone, the others are told that there is none left.
func TestLeaseRace(t *testing.T) {
	for round := range 20 {
		l := Leases{Dir: filepath.Join(t.TempDir(), "leases"), Subnet: netip.MustParsePrefix("192.168.83.17/28")}
		const vms, places = 32, 13
		got, errs := make([]netip.Addr, vms), make([]error, vms)
		var wg sync.WaitGroup
		start := make(chan struct{})
		for i := range vms {
			wg.Add(1)
			go func() {
				defer wg.Done()
				<-start
				got[i], errs[i] = l.Acquire(fmt.Sprintf("vm%d", i), netip.Addr{})
			}()
		}
		close(start)
		wg.Wait()
		holders := map[netip.Addr]int{}
		for i := range vms {
			if errs[i] != nil {
				if !errors.Is(errs[i], ErrExhausted) {
					t.Errorf("vm%d: %v", i, errs[i])
				}
				continue
			}
			if other, taken := holders[got[i]]; taken {
				t.Errorf("round %d: vm%d and vm%d both hold %v", round, i, other, got[i])
			}
			holders[got[i]] = i
		}
		all := get(l.List())(t)
		if len(holders) != places || len(all) != places {
			t.Errorf("round %d: %d of %d addresses held, %d leases", round, len(holders), places, len(all))
		}
		for a, i := range holders {
			if all[a] != fmt.Sprintf("vm%d", i) {
				t.Errorf("%v: lease of %s, returned to vm%d", a, all[a], i)
			}
		}
	}
}
