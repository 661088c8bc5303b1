package egress

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
)

// A nameServer is a fake upstream on the loopback, UDP and TCP on one port.
type nameServer struct {
	addr  netip.AddrPort
	udp   atomic.Int64
	tcp   atomic.Int64
	ports sync.Map // source ports seen
	ids   sync.Map
}

func record(t testing.TB, s string) dns.RR {
	t.Helper()
	rr, err := dns.NewRR(s)
	if err != nil {
		t.Fatal(err)
	}
	return rr
}

// newNameServer answers with what answer puts into the reply; nil: 192.0.2.1 to every A.
func newNameServer(t testing.TB, answer func(w dns.ResponseWriter, reply *dns.Msg)) *nameServer {
	t.Helper()
	ns := new(nameServer)
	udp, tcp := listenBoth(t)
	ns.addr = udp.LocalAddr().(*net.UDPAddr).AddrPort()
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		if a, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			ns.udp.Add(1)
			ns.ports.Store(a.Port, true)
		} else {
			ns.tcp.Add(1)
		}
		ns.ids.Store(m.Id, true)
		reply := new(dns.Msg).SetReply(m)
		if answer != nil {
			answer(w, reply)
			return
		}
		if m.Question[0].Qtype == dns.TypeA {
			reply.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, 1)}}
		}
		send(t, w, reply)
	})
	for _, s := range []*dns.Server{{PacketConn: udp, Handler: handler, UDPSize: 4096}, {Listener: tcp, Handler: handler}} {
		started, ended := make(chan struct{}), make(chan error, 1)
		s.NotifyStartedFunc = func() { close(started) }
		go func() { ended <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			if err := s.Shutdown(); err != nil {
				t.Error(err)
			}
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	return ns
}

func send(t testing.TB, w dns.ResponseWriter, m *dns.Msg) {
	if err := w.WriteMsg(m); err != nil {
		t.Logf("the fake name server could not answer: %v", err)
	}
}

// silent is the address of a name server that never answers.
func silent(t testing.TB) netip.AddrPort {
	t.Helper()
	needLoopback(t)
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// closedPort is the address of a name server that isn't there.
func closedPort(t testing.TB) netip.AddrPort {
	t.Helper()
	needLoopback(t)
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}
