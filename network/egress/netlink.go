package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/mdlayher/netlink"
	vnetlink "github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// What follows runs in the privileged process, in the network namespace of the rules.

const (
	// receiveBuffer holds what arrives while the gate is busy: with 8 MiB 200,000 logged packets a second arrived whole.
	receiveBuffer = 8 << 20
	copyRange     = 128 // bytes of each packet: the longest IPv4 header (60) and a TCP header without options (20) fit
	flushTimeout  = 1   // in 1/100 s: packets reach the gate in batches, none later than this (the kernel's own value is 1 s)

	accountingSysctl = "/proc/sys/net/netfilter/nf_conntrack_acct"
	timestampSysctl  = "/proc/sys/net/netfilter/nf_conntrack_timestamp"
)

// linux/netfilter/nfnetlink_log.h and nfnetlink_conntrack.h
const (
	nfulnlMsgPacket, nfulnlMsgConfig         = 0, 1
	nfulaCfgCmd, nfulaCfgMode                = 1, 2
	nfulaCfgTimeout, nfulaCfgFlags           = 4, 6
	nfulnlCmdBind, nfulnlCopyPacket          = 1, 2
	nfulnlFlagSeq                            = 1
	nfulaPacketHdr, nfulaPayload             = 1, 9
	nfulaPrefix, nfulaSeq                    = 10, 12
	ipctnlMsgCtDelete                        = 2
	ctaTupleOrig, ctaTupleIP, ctaIPv4Src     = 1, 1, 1
	nfnlgrpConntrackDestroy                  = 3
	netlinkHeaderSize, netfilterHeaderSize   = 16, 4
	attributeHeaderSize, netfilterAttributes = 4, netlinkHeaderSize + netfilterHeaderSize
)

// ErrGroupTaken says that another process reads the packets of this log group already.
var ErrGroupTaken = errors.New("another process reads this log group")

// OpenFlows opens the log group that a VM's rules log to, for Flows.Watch. It needs CAP_NET_ADMIN; whoever inherits the file
// needs none. The error is ErrGroupTaken when the group has a reader, as it can have only one.
func OpenFlows(group uint16) (*os.File, error) {
	f, err := openNetfilter("nflog", 0, nil)
	if err != nil {
		return nil, fmt.Errorf("cannot open log group %d: %w", group, err)
	}
	if err := bindGroup(f, group); err != nil {
		return nil, fmt.Errorf("cannot open log group %d: %w", group, errors.Join(err, f.Close()))
	}
	return f, nil
}

// OpenConntrack opens the events of connections that end and that an IPv4 address began, for Flows.Watch; other addresses'
// are filtered out in the kernel. It needs CAP_NET_ADMIN for the size of its buffer; whoever inherits the file needs none.
// Bytes and times are in the events of connections begun after EnableAccounting.
func OpenConntrack(a netip.Addr) (*os.File, error) {
	filter, err := sourceFilter(a)
	if err != nil {
		return nil, fmt.Errorf("cannot open connection events of %s: %w", a, err)
	}
	f, err := openNetfilter("conntrack", 1<<(nfnlgrpConntrackDestroy-1), filter)
	if err != nil {
		return nil, fmt.Errorf("cannot open connection events of %s: %w", a, err)
	}
	return f, nil
}

// EnableAccounting makes the kernel count connections' bytes and note when they began. It holds for the network namespace,
// and for connections begun afterwards. changed says that it did not before.
func EnableAccounting() (changed bool, err error) {
	for _, path := range []string{accountingSysctl, timestampSysctl} {
		was, err := os.ReadFile(path)
		if err == nil && strings.TrimSpace(string(was)) != "1" {
			changed = true
			err = os.WriteFile(path, []byte("1"), 0)
		}
		if err != nil {
			return changed, fmt.Errorf("cannot switch on the accounting of connections (is the module nf_conntrack loaded?): %w", err)
		}
	}
	return changed, nil
}

// CutFlows makes the kernel forget the connections that an IPv4 address began, but for those that keep wants, and returns how many
// there were; nil keeps none. What has been forgotten is decided anew by the rules, at its next packet. A process that watches gets
// the ends, with bytes, at once; so it is also what to do before a VM's gate ends, and when its address goes to another. It needs
// CAP_NET_ADMIN.
func CutFlows(a netip.Addr, keep func(proto string, to netip.AddrPort) bool) (int, error) {
	n, err := vnetlink.ConntrackDeleteFilters(vnetlink.ConntrackTable, unix.AF_INET, flowsOf{a, keep})
	if err != nil {
		return int(n), fmt.Errorf("cannot end the connections of %s: %w", a, err)
	}
	return int(n), nil
}

// flowsOf are the connections that an address began, but for some.
type flowsOf struct {
	from netip.Addr
	keep func(proto string, to netip.AddrPort) bool
}

// MatchConntrackFlow says whether a connection is one of them.
func (f flowsOf) MatchConntrackFlow(c *vnetlink.ConntrackFlow) bool {
	from, ok := netip.AddrFromSlice(c.Forward.SrcIP)
	if !ok || from.Unmap() != f.from {
		return false
	}
	to, ok := netip.AddrFromSlice(c.Forward.DstIP)
	return !ok || f.keep == nil || !f.keep(protoName(c.Forward.Protocol), netip.AddrPortFrom(to.Unmap(), c.Forward.DstPort))
}

// openNetfilter opens a netfilter socket, filtered before it joins its groups.
func openNetfilter(name string, groups uint32, filter []unix.SockFilter) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer); err != nil {
		return nil, errors.Join(os.NewSyscallError("set receive buffer (needs CAP_NET_ADMIN)", err), f.Close())
	}
	if len(filter) > 0 {
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
			return nil, errors.Join(os.NewSyscallError("attach filter", err), f.Close())
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, errors.Join(os.NewSyscallError("bind", err), f.Close())
	}
	return f, nil
}

// bindGroup sends the configuration as one message: in steps it failed now and then while packets arrived.
func bindGroup(f *os.File, group uint16) error {
	msg, err := groupMessage(group)
	if err != nil {
		return err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		serr = unix.Sendto(int(fd), msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if serr == nil {
			serr = acknowledged(int(fd))
		}
	})
	if err != nil {
		return err
	}
	if serr == unix.EPERM || serr == unix.EBUSY { // EPERM: the buffer's size was forced, so it isn't for want of privilege
		return ErrGroupTaken
	}
	return os.NewSyscallError("bind log group", serr)
}

func groupMessage(group uint16) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Bytes(nfulaCfgCmd, []byte{nfulnlCmdBind})
	ae.Bytes(nfulaCfgMode, append(binary.BigEndian.AppendUint32(nil, copyRange), nfulnlCopyPacket, 0))
	ae.Uint32(nfulaCfgTimeout, flushTimeout)
	ae.Uint16(nfulaCfgFlags, nfulnlFlagSeq)
	attrs, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	header := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, group)
	msg := netlink.Message{
		Header: netlink.Header{
			Type:     unix.NFNL_SUBSYS_ULOG<<8 | nfulnlMsgConfig,
			Flags:    netlink.Request | netlink.Acknowledge,
			Length:   uint32(netlinkHeaderSize + netfilterHeaderSize + len(attrs)),
			Sequence: 1,
		},
		Data: append(header, attrs...),
	}
	return msg.MarshalBinary()
}

// acknowledged reads the answer to the configuration, which is there when sending returns. Packets may come before it; they are
// of the moment before the caller knew that the group is open.
func acknowledged(fd int) error {
	buf := make([]byte, datagramSize)
	for {
		n, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			return err
		}
		if n < netlinkHeaderSize+4 || binary.NativeEndian.Uint16(buf[4:]) != unix.NLMSG_ERROR {
			continue
		}
		if code := int32(binary.NativeEndian.Uint32(buf[netlinkHeaderSize:])); code != 0 {
			return unix.Errno(-code)
		}
		return nil
	}
}

// sourceFilter passes conntrack messages whose original direction has this source: CTA_TUPLE_ORIG → CTA_TUPLE_IP → CTA_IP_V4_SRC.
func sourceFilter(a netip.Addr) ([]unix.SockFilter, error) {
	if !a.Is4() {
		return nil, errors.New("not an IPv4 address")
	}
	b := a.As4()
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegA, Val: netfilterAttributes},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaTupleOrig},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 9},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaTupleIP},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttrNested},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 6},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaIPv4Src},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttrNested},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 3},
		bpf.TAX{},
		bpf.LoadIndirect{Off: attributeHeaderSize, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: binary.BigEndian.Uint32(b[:]), SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: 1<<32 - 1},
	})
	if err != nil {
		return nil, err
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return filter, nil
}
