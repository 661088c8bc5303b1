package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// watchBuffer holds the kernel's notices of about 10,000 changed rules. When it
// runs over, one may have been ours, and that is taken for granted.
const watchBuffer = 4 << 20

// A removed table is told of by a notice for each of its parts. They are one
// reason for the caller: gone is called when there was none for watchQuiet, or
// at the latest after watchLongest.
const (
	watchQuiet   = 2 * time.Millisecond
	watchLongest = 50 * time.Millisecond
)

// Watch calls gone whenever one of the shared tables, or a chain, a set or a
// rule that all VMs share, was removed: by `nft flush ruleset`, a restart of
// nftables.service, or by hand. It calls it once at the beginning when they
// aren't there, so nothing is missed between Ensure and Watch. The caller then
// calls Ensure for its VM, which changes nothing where another was faster.
//
// Watch returns nil when ctx ends, an error when it can't listen.
func (r Rules) Watch(ctx context.Context, gone func()) error {
	if err := r.watch(ctx, gone); err != nil {
		return fmt.Errorf("cannot watch the rules: %w", err)
	}
	return nil
}

func (r Rules) watch(ctx context.Context, gone func()) (err error) {
	if err := r.Bridge.check(); err != nil {
		return err
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.SetReadBuffer(watchBuffer); err != nil {
		return err
	}
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return err
	}
	// The end of ctx wakes the receiver by a deadline that has passed.
	stop := context.AfterFunc(ctx, func() {
		if err := conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
			return // closed already
		}
	})
	defer stop()
	there := false
	if err := reading(func(k *rulesReader) error {
		p, err := ensureRules(k, r.Bridge, nil)
		there = err == nil && p.empty()
		return err
	}); err != nil {
		return err
	}
	if !there {
		gone()
	}
	shared := sharedTables(r.Bridge)
	var since time.Time // when the first of the notices came that gone wasn't called for yet
	for {
		deadline := time.Time{}
		if !since.IsZero() {
			deadline = time.Now().Add(watchQuiet)
		}
		if err := conn.SetReadDeadline(deadline); err != nil {
			return err
		}
		// The deadline may just have replaced the one that ends the wait.
		if ctx.Err() != nil {
			return nil
		}
		msgs, err := conn.Receive()
		removed := slices.ContainsFunc(msgs, func(m netlink.Message) bool { return removesShared(shared, m) })
		quiet := errors.Is(err, os.ErrDeadlineExceeded)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			removed = true
		case err != nil && !quiet && !errors.Is(err, unix.EINTR):
			return err
		}
		if removed && since.IsZero() {
			since = time.Now()
		}
		if !since.IsZero() && (quiet || time.Since(since) > watchLongest) {
			since = time.Time{}
			gone()
		}
	}
}

// removesShared tells a notice that something which all VMs share was removed.
// VMs' own chains and elements come and go, and are their supervisors' business.
func removesShared(shared []table, m netlink.Message) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < nfgenmsg {
		return false
	}
	i := slices.IndexFunc(shared, func(t table) bool { return t.family == nftables.TableFamily(m.Data[0]) })
	if i < 0 {
		return false
	}
	// The table's name is attribute 1 of all four; where the chain's or set's is, differs.
	var nameType uint16
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_DELTABLE:
	case unix.NFT_MSG_DELCHAIN:
		nameType = unix.NFTA_CHAIN_NAME
	case unix.NFT_MSG_DELRULE:
		nameType = unix.NFTA_RULE_CHAIN
	case unix.NFT_MSG_DELSET:
		nameType = unix.NFTA_SET_NAME
	default:
		return false
	}
	inTable, name := "", ""
	err := attributes(m.Data[nfgenmsg:], func(d *netlink.AttributeDecoder) {
		switch d.Type() {
		case unix.NFTA_TABLE_NAME:
			inTable = d.String()
		case nameType:
			name = d.String()
		}
	})
	if err != nil || inTable != shared[i].name {
		return false
	}
	return nameType == 0 ||
		slices.ContainsFunc(shared[i].chains, func(c chain) bool { return c.name == name }) ||
		slices.ContainsFunc(shared[i].sets, func(s set) bool { return s.name == name })
}
