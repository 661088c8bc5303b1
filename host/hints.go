package host

import (
	"fmt"
	"net/netip"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/secrets"
)

// Hints are commands, ready to paste, that reach what a VM's declaration
// publishes. What can't be found out is left away: they are help, not an answer.
func Hints(l Layout, name string) []string {
	_, vm, err := l.load(name)
	if err != nil || vm.OpenClaw == nil {
		return nil
	}
	var hints []string
	for _, p := range vm.Ports {
		if int(p.GuestPort) != vm.OpenClaw.Port {
			continue
		}
		at := netip.AddrPortFrom(reachable(p.HostAddress), p.HostPort)
		hints = append(hints, fmt.Sprintf("curl http://%s/startupz", at))
		for _, s := range vm.Secrets {
			if s.Name == vm.OpenClaw.Auth.TokenFile && vm.OpenClaw.Auth.Mode == config.AuthToken {
				token := secrets.Secret{Name: s.Name, File: s.File, Credential: s.Credential, Credentials: unitCredentials(name), Generate: s.Generate, Stdin: s.Stdin}.Source(l.VM(name).KeptSecrets())
				hints = append(hints, fmt.Sprintf(`curl -H "Authorization: Bearer $(cat %s)" -H 'Content-Type: application/json' -d '{"tool":"sessions_list","args":{}}' http://%s/tools/invoke`, token, at))
			}
		}
	}
	return hints
}

// reachable is an address to connect to for one that is listened on.
func reachable(a netip.Addr) netip.Addr {
	if !a.IsUnspecified() {
		return a
	}
	if a.Is6() {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}
