package host

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host/gate"
)

func TestPlanPorts(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	free := func() uint16 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().(*net.TCPAddr).AddrPort().Port()
	}
	a, b := config.Port{HostAddress: local, HostPort: free(), GuestPort: 80}, config.Port{HostAddress: local, HostPort: free(), GuestPort: 80}
	with := func(p config.Port, change func(*config.Port)) config.Port {
		change(&p)
		return p
	}
	other := with(a, func(p *config.Port) { p.GuestPort = 81 })
	unknown := with(b, func(p *config.Port) { p.GuestPort = 9000 })
	wide := with(a, func(p *config.Port) { p.HostAddress = netip.IPv4Unspecified() })
	words := func(p *portPlan) string {
		s := fmt.Sprint("now ", p.now, " closed ", p.closed, " turned ", p.turned, " opened ")
		for _, o := range p.opened {
			s += o.port.String()
		}
		return s
	}
	plan := func(was, is []config.Port) (string, error) {
		l := &life{vm: &config.VM{Ports: was}, reachable: map[uint16]bool{80: true, 81: true}}
		p, err := l.planPorts(&config.VM{Ports: is})
		defer p.close()
		return words(p), err
	}
	list := func(p ...config.Port) []config.Port { return p }
	unknownPlan := &portPlan{now: list(unknown), opened: []openedPort{{port: unknown}}, closed: list(a)}
	if !gate.ConnectsAnywhere() {
		unknownPlan = &portPlan{closed: list(a)}
	}
	for name, c := range map[string]struct {
		was, is []config.Port
		want    *portPlan
	}{
		"the same":                        {list(a), list(a), &portPlan{now: list(a)}},
		"one more":                        {list(a), list(a, b), &portPlan{now: list(a, b), opened: []openedPort{{port: b}}}},
		"another":                         {list(a), list(b), &portPlan{now: list(b), closed: list(a), opened: []openedPort{{port: b}}}},
		"none":                            {list(a), nil, &portPlan{closed: list(a)}},
		"another of the guest":            {list(a), list(other), &portPlan{now: list(other), turned: list(other)}},
		"another address":                 {list(a), list(wide), &portPlan{now: list(a)}},
		"one that the gate is not let to": {list(a), list(unknown), unknownPlan},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := plan(c.was, c.is); err != nil || got != words(c.want) {
				t.Errorf("got  %s, %v\nwant %s", got, err, words(c.want))
			}
		})
	}
	taken, err := net.Listen("tcp", netip.AddrPortFrom(local, b.HostPort).String())
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if _, err := plan(list(a), list(a, b)); err == nil || !strings.Contains(err.Error(), "another program listens there") {
		t.Errorf("a port that is taken: %v", err)
	}
}
