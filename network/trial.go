package network

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// InNamespace runs f in a network namespace of its own, which is gone with all that f made in it when f returns. It needs
// CAP_SYS_ADMIN; an error about the namespace comes without f having run. f must stay on its goroutine.
func InNamespace(f func()) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and no other gets one that lives elsewhere.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("cannot make a network namespace: %w", err)
			return
		}
		f()
		done <- nil
	}()
	return <-done
}

// trialOwner is the owner of what is made for a trial; no root has it, whose ids are random.
const trialOwner = "00000000"

// trialBridge and trialGuest are what a trial makes: all kinds of links, tables, sets and rules that VMs have.
var (
	trialBridge = Bridge{Name: "microbr", Address: netip.MustParsePrefix("192.168.83.1/24"), Owner: trialOwner}
	trialGuest  = Guest{VM: "trial", Address: netip.MustParseAddr("192.168.83.2"), Egress: EgressOpen, Resolver: 53, LogGroup: 1}
)

// TryBridge makes a bridge as EnsureBridge does, for the trial of a kernel; call it in a namespace of its own.
func TryBridge() error {
	_, err := EnsureBridge(trialBridge)
	return err
}

// TryTAP makes a TAP and opens it as a VMM does, after TryBridge.
func TryTAP() error {
	// The library's error doesn't say which file it could not open.
	if tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		return err
	} else if err := tun.Close(); err != nil {
		return err
	}
	p := Port{VM: trialGuest.VM, Address: trialGuest.Address, UID: 1, GID: 1}
	if err := trialBridge.EnsurePort(p); err != nil {
		return err
	}
	f, err := OpenTAP(TAPName(p.Address))
	if err != nil {
		return err
	}
	return f.Close()
}

// TryRules sets all rules of a VM, for the trial of a kernel; call it in a namespace of its own. When they are refused as a whole, it looks
// which one alone is, and the error names it in the words of the nft program.
func TryRules() error {
	g, err := trialGuest.filled(trialBridge)
	if err != nil {
		return err
	}
	err = reading(func(k *rulesReader) error {
		p, err := ensureRules(k, trialBridge, &g)
		if err != nil {
			return err
		}
		return p.commit()
	})
	if err == nil {
		return nil
	}
	for _, t := range merged(sharedTables(trialBridge), guestTables(trialBridge, g)) {
		if what, alone := refusedPart(t); alone != nil {
			return fmt.Errorf("the kernel refuses, in a table of the family %s, %s: %w", families[t.family], what, alone)
		}
	}
	return fmt.Errorf("the kernel refuses the rules: %w", err)
}

// refusedPart looks for the first part of a table that the kernel refuses.
func refusedPart(t table) (what string, err error) {
	var empty []chainIn
	for _, c := range t.chains {
		empty = append(empty, chainIn{t, c})
	}
	p := &plan{tables: []table{t}}
	try := func(what string) (string, error) { return what, p.commit() }
	if what, err := try("the table itself"); err != nil {
		return what, err
	}
	for _, s := range t.sets {
		p.sets = append(p.sets, setIn{t, s})
		if what, err := try("the set " + s.name); err != nil {
			return what, err
		}
		p.sets = nil
	}
	for _, c := range empty {
		p.chains = []chainIn{c}
		if what, err := try(strings.TrimSpace("the chain " + c.chain.name + " " + c.chain.hookText())); err != nil {
			return what, err
		}
	}
	p.chains = nil
	for _, c := range t.chains {
		for _, r := range c.rules {
			p.rules = []chainIn{{t, chain{name: c.name, rules: []rule{r}}}}
			if what, err := try(fmt.Sprintf("the rule `%s`", r.text)); err != nil {
				return what, err
			}
		}
	}
	return "", nil
}

func (c chain) hookText() string {
	if c.hook == nil {
		return ""
	}
	return "(" + strings.TrimSuffix(c.hook.text, ";") + ")"
}
