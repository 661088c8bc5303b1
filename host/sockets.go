package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/network/egress"
)

// sockets are the descriptors that the supervisor opens, with its privileges,
// for the gate to use without any.
type sockets struct {
	files        []namedFile
	resolverPort uint16   // on the bridge's address, UDP and TCP
	logGroup     uint16   // NFLOG
	console      *os.File // the write end, for the VMM
}

func (s *sockets) add(name string, f *os.File, err error) error {
	if err != nil {
		return err
	}
	s.files = append(s.files, namedFile{name, f})
	return nil
}

// close closes the supervisor's copies of what is the gate's.
func (s *sockets) close() error {
	var errs []error
	for _, f := range s.files {
		errs = append(errs, closeFile(f.file))
	}
	if s.console != nil {
		errs = append(errs, closeFile(s.console))
	}
	*s = sockets{}
	return errors.Join(errs...)
}

// closeFile closes f; that it is closed already is no error.
func closeFile(f *os.File) error {
	if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// resolverTries is how often a port is looked for that is free for both UDP and
// TCP; the kernel chooses among 28,000.
const resolverTries = 20

// openResolver binds UDP and TCP on the same free port of the bridge's address.
func (s *sockets) openResolver(address netip.Addr) error {
	var last error
	for range resolverTries {
		tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(address, 0)))
		if err != nil {
			return fmt.Errorf("cannot open the resolver's socket on %s: %w", address, err)
		}
		port := tcp.Addr().(*net.TCPAddr).AddrPort().Port()
		udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(address, port)))
		if err != nil {
			last = errors.Join(err, tcp.Close())
			continue
		}
		s.resolverPort = port
		tf, err := tcp.File()
		err = errors.Join(s.add(gate.FileDNSStream, tf, err), tcp.Close())
		uf, uerr := udp.File()
		return errors.Join(err, s.add(gate.FileDNSPacket, uf, uerr), udp.Close())
	}
	return fmt.Errorf("cannot find a port of %s that is free for UDP and TCP: %w", address, last)
}

// Groups of NFLOG are numbers of 16 bits, of which one reader may have each. A
// VM takes the one of its place in the subnet, or the next free one: another
// root's VM, or another program (ulogd uses small numbers), may have it.
const (
	firstLogGroup = 2048
	logGroupTries = 64
)

func (s *sockets) openFlows(index int) error {
	for i := range logGroupTries {
		group := uint16(firstLogGroup + (index+i*257)%(65536-firstLogGroup))
		f, err := egress.OpenFlows(group)
		if errors.Is(err, egress.ErrGroupTaken) {
			continue
		}
		s.logGroup = group
		return s.add(gate.FileFlows, f, err)
	}
	return fmt.Errorf("cannot find a free NFLOG group for the connection log after %d tries", logGroupTries)
}

// openPort listens on a published port.
func (s *sockets) openPort(i int, p config.Port) error {
	l, err := listenPort(p)
	if err != nil {
		return err
	}
	f, err := l.File()
	return errors.Join(s.add(gate.FilePort(i), f, err), l.Close())
}

// openConsole makes the pipe that carries the guest's console.
func (s *sockets) openConsole() error {
	fds := make([]int, 2)
	if err := unix.Pipe2(fds, unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("cannot make the console's pipe: %w", err)
	}
	s.console = os.NewFile(uintptr(fds[1]), "console")
	return s.add(gate.FileConsole, os.NewFile(uintptr(fds[0]), "console"), nil)
}

// openExec listens on the socket through which exec reaches the guest.
func (s *sockets) openExec(path string) error {
	l, err := listenUnix(path)
	if err != nil {
		return err
	}
	// The path stays for the gate's copy; whoever clears the run directory removes it.
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return errors.Join(s.add(gate.FileExec, f, err), l.Close())
}
