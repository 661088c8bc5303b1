package egress

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// The prefixes of the rules that log to a VM's group. What follows in a prefix is the reason of a refusal.
const (
	PrefixAllowed = "microvm-egress: "
	PrefixRefused = "microvm-refused: "
)

const (
	datagramSize = 64 << 10 // the kernel batches a page of logged packets; conntrack's messages are shorter
	openKept     = 4096     // connections whose name is remembered until they end
	lossInterval = time.Second
	drainLimit   = time.Second // for what is still in the sockets when Watch ends
)

// Flows logs one VM's connections, as the kernel reports them on the files of OpenFlows and OpenConntrack.
type Flows struct {
	VM       string
	Address  netip.Addr     // the VM's
	Resolver netip.AddrPort // where the gate answers its DNS; those are logged as queries and not again here
	Names    *Names         // where the resolver notes names; may be nil
	Log      func(Event)    // called from two goroutines; must not block
	// Why explains a refusal whose rule gives no reason; may be nil.
	Why func(proto string, to netip.AddrPort) string

	mu   sync.Mutex
	open *simplelru.LRU[flow, string]

	packets, ends loss
}

// Watch reads both files until ctx ends, and then what has arrived by then, and returns nil; or it returns the error that ended
// it. It needs no privilege, and leaves the files open. Use a Flows for one Watch.
//
// A connection's end is reported when the kernel forgets it: a closed TCP connection 10–120 s after its last packet, UDP
// after 30–120 s, and some seconds more; see CutFlows for those that haven't ended by then. Losses are logged once a second.
func (f *Flows) Watch(ctx context.Context, flows, conntrack *os.File) error {
	f.open = newLRU[flow, string](openKept, nil)
	f.packets.what, f.ends.what = "connections that were begun are missing", "connections that ended are missing"
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return f.read(ctx, flows, f.packet, &f.packets) })
	group.Go(func() error { return f.read(ctx, conntrack, f.end, &f.ends) })
	group.Go(func() error {
		tick := time.NewTicker(lossInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				f.reportLoss()
			}
		}
	})
	err := group.Wait()
	f.reportLoss()
	if err != nil {
		return fmt.Errorf("cannot watch the connections of VM %s: %w", f.VM, err)
	}
	return nil
}

// read hands each message of a netlink socket to handle, which returns how many before it were lost.
func (f *Flows) read(ctx context.Context, file *os.File, handle func(netlink.Message) uint64, lost *loss) error {
	conn, err := pollable(file)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() {
		// It can only fail on a closed file, and then nobody waits.
		if err := conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
			return
		}
	})
	defer stop()
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, datagramSize)
	if ctx.Err() != nil {
		return f.drain(conn, buf, handle, lost)
	}
	for {
		n, err := receive(raw, buf)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			lost.overrun()
		case errors.Is(err, os.ErrDeadlineExceeded):
			return f.drain(conn, buf, handle, lost)
		case err != nil:
			return err
		default:
			if !each(buf[:n], func(m netlink.Message) { lost.add(handle(m)) }) {
				lost.add(1)
			}
		}
	}
}

// drain reads what is there without waiting for more.
func (f *Flows) drain(conn *os.File, buf []byte, handle func(netlink.Message) uint64, lost *loss) error {
	end := time.Now().Add(drainLimit)
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	for time.Now().Before(end) {
		var n int
		var rerr error
		if err := raw.Control(func(fd uintptr) { n, rerr = receiveNow(fd, buf) }); err != nil {
			return err
		}
		switch {
		case rerr == unix.EAGAIN:
			return nil
		case rerr == unix.ENOBUFS:
			lost.overrun()
		case rerr != nil:
			return rerr
		default:
			if !each(buf[:n], func(m netlink.Message) { lost.add(handle(m)) }) {
				lost.add(1)
			}
		}
	}
	return nil
}

// pollable returns the file's socket under another descriptor that the runtime can wait on: one that was
// inherited may block.
func pollable(file *os.File) (*os.File, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var derr error
	if err := raw.Control(func(old uintptr) {
		if fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); derr == nil {
			derr = unix.SetNonblock(fd, true)
		}
	}); err != nil {
		return nil, err
	}
	if derr != nil {
		return nil, os.NewSyscallError("duplicate socket", derr)
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

func receive(raw syscall.RawConn, buf []byte) (n int, err error) {
	rerr := raw.Read(func(fd uintptr) bool {
		n, err = receiveNow(fd, buf)
		return err != unix.EAGAIN
	})
	return n, errors.Join(rerr, err)
}

// receiveNow reads one datagram; 0 bytes for one that the kernel didn't send, or that doesn't fit.
func receiveNow(fd uintptr, buf []byte) (int, error) {
	for {
		n, from, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue
		}
		return min(n, len(buf)), nil
	}
}

// each hands over the messages of a datagram, and reports whether it was whole.
func each(b []byte, handle func(netlink.Message)) bool {
	for len(b) >= netlinkHeaderSize {
		size := int(binary.NativeEndian.Uint32(b))
		if size < netlinkHeaderSize || size > len(b) {
			return false
		}
		var m netlink.Message
		m.Header = netlink.Header{
			Length:   uint32(size),
			Type:     netlink.HeaderType(binary.NativeEndian.Uint16(b[4:])),
			Flags:    netlink.HeaderFlags(binary.NativeEndian.Uint16(b[6:])),
			Sequence: binary.NativeEndian.Uint32(b[8:]),
			PID:      binary.NativeEndian.Uint32(b[12:]),
		}
		m.Data = b[netlinkHeaderSize:size]
		handle(m)
		b = b[min((size+3)&^3, len(b)):]
	}
	return len(b) == 0
}

// packet logs a packet that began a connection or was refused.
func (f *Flows) packet(m netlink.Message) (missing uint64) {
	if m.Header.Type != unix.NFNL_SUBSYS_ULOG<<8|nfulnlMsgPacket || len(m.Data) < netfilterHeaderSize {
		return 0
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[netfilterHeaderSize:])
	if err != nil {
		return 1
	}
	ad.ByteOrder = binary.BigEndian
	var prefix string
	var payload []byte
	var etherType uint16
	for ad.Next() {
		switch ad.Type() {
		case nfulaPacketHdr:
			if b := ad.Bytes(); len(b) >= 2 {
				etherType = binary.BigEndian.Uint16(b)
			}
		case nfulaPayload:
			payload = ad.Bytes()
		case nfulaPrefix:
			prefix = ad.String()
		case nfulaSeq:
			missing = f.packets.gap(ad.Uint32())
		}
	}
	if ad.Err() != nil {
		return missing + 1
	}
	if e, ok := f.opened(prefix, etherType, payload); ok {
		f.Log(e)
	}
	return missing
}

// opened makes the event of a logged packet.
func (f *Flows) opened(prefix string, etherType uint16, payload []byte) (Event, bool) {
	e := Event{Time: time.Now().UTC(), VM: f.VM, Kind: KindOpen}
	reason, refused := strings.CutPrefix(prefix, strings.TrimSpace(PrefixRefused))
	if !refused && !strings.HasPrefix(prefix, strings.TrimSpace(PrefixAllowed)) {
		return e, false // not a rule of ours
	}
	e.Verdict = Allowed
	if refused {
		e.Verdict, e.Reason = Refused, strings.Trim(reason, ": ")
	}
	c, detail, err := parsePacket(etherType, payload)
	if err != nil {
		e.Reason = strings.TrimPrefix(e.Reason+", "+err.Error(), ", ")
		return e, true
	}
	if !refused && c.destination == f.Resolver {
		return e, false
	}
	e.Proto, e.Source, e.Destination, e.Type = protoName(c.proto), endpoint(c.source), endpoint(c.destination), detail
	e.Name = f.Names.Lookup(c.destination.Addr())
	if refused && e.Reason == "" && f.Why != nil {
		e.Reason = f.Why(e.Proto, c.destination)
	}
	if !refused && e.Name != "" {
		f.mu.Lock()
		f.open.Add(c, e.Name)
		f.mu.Unlock()
	}
	return e, true
}

// end logs a connection that the kernel has forgotten.
func (f *Flows) end(m netlink.Message) (missing uint64) {
	if m.Header.Type != unix.NFNL_SUBSYS_CTNETLINK<<8|ipctnlMsgCtDelete {
		return 0
	}
	var ev conntrack.Event
	if err := ev.Unmarshal(m); err != nil || ev.Flow == nil {
		return 1
	}
	if e, ok := f.closed(ev.Flow); ok {
		f.Log(e)
	}
	return 0
}

// closed makes the event of an ended connection.
func (f *Flows) closed(c *conntrack.Flow) (Event, bool) {
	orig, reply := c.TupleOrig, c.TupleReply
	k := flow{
		proto:       orig.Proto.Protocol,
		source:      netip.AddrPortFrom(orig.IP.SourceAddress, orig.Proto.SourcePort),
		destination: netip.AddrPortFrom(orig.IP.DestinationAddress, orig.Proto.DestinationPort),
	}
	if k.source.Addr() != f.Address || netip.AddrPortFrom(reply.IP.SourceAddress, reply.Proto.SourcePort) == f.Resolver {
		return Event{}, false
	}
	e := Event{
		Time: time.Now().UTC(), VM: f.VM, Kind: KindClose, Proto: protoName(k.proto),
		Source: endpoint(k.source), Destination: endpoint(k.destination),
		BytesOut: c.CountersOrig.Bytes, BytesIn: c.CountersReply.Bytes,
	}
	if k.proto == unix.IPPROTO_ICMP {
		k.source, k.destination = netip.AddrPortFrom(k.source.Addr(), 0), netip.AddrPortFrom(k.destination.Addr(), 0)
		e.Type = fmt.Sprintf("%d/%d", orig.Proto.ICMPType, orig.Proto.ICMPCode)
	}
	if begun, ended := c.Timestamp.Start, c.Timestamp.Stop; begun.Unix() > 0 && ended.After(begun) {
		e.Seconds = float64(ended.Sub(begun).Milliseconds()) / 1000
	}
	f.mu.Lock()
	name, known := f.open.Get(k)
	f.open.Remove(k)
	f.mu.Unlock()
	if !known {
		name = f.Names.Lookup(k.destination.Addr())
	}
	e.Name = name
	return e, true
}

func (f *Flows) reportLoss() {
	for _, l := range []*loss{&f.packets, &f.ends} {
		if e, ok := l.take(); ok {
			e.VM = f.VM
			f.Log(e)
		}
	}
}

// A loss counts what the kernel could not deliver: exactly where messages are numbered, else that it happened.
type loss struct {
	what string

	mu       sync.Mutex
	count    uint64
	overruns uint64
	next     uint32
	numbered bool
}

func (l *loss) add(n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count += n
}

func (l *loss) overrun() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.overruns++
}

// gap returns how many numbers are missing before one.
func (l *loss) gap(seq uint32) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	missing := seq - l.next // wraps as the kernel's does
	if !l.numbered || missing > 1<<31 {
		missing = 0 // the first, or one from before the last
	}
	l.next, l.numbered = seq+1, true
	return uint64(missing)
}

func (l *loss) take() (Event, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.count == 0 && l.overruns == 0 {
		return Event{}, false
	}
	e := Event{Time: time.Now().UTC(), Kind: KindLost, Count: l.count, Reason: l.what}
	if l.overruns > 0 {
		e.Reason += ": the gate did not keep up"
	}
	l.count, l.overruns = 0, 0
	return e, true
}
