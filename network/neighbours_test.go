package network

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

func TestNeighbours(t *testing.T) {
	if !isolated(t) {
		return
	}
	shell := func(t *testing.T, line string) {
		t.Helper()
		words := strings.Fields(line)
		if _, err := exec.LookPath(words[0]); err != nil {
			t.Skip(words[0] + " is not installed")
		}
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	see := func(t *testing.T) string {
		t.Helper()
		var b strings.Builder
		for _, n := range get(testBridge.Neighbours())(t) {
			fmt.Fprintf(&b, "%v %s %q told=%v\n", n, n.Hook, n.Firewall, n.Told)
		}
		return b.String()
	}
	get(EnsureBridge(testBridge))(t)
	must(t, testRules(t, testBridge).Ensure(openGuest))
	if got := see(t); got != "" {
		t.Errorf("our own tables are no neighbours: %s", got)
	}
	for _, c := range []struct {
		name, before string
		want         string
		after        []string
		then         string
	}{
		{"docker",
			"iptables -N DOCKER-USER && iptables -A FORWARD -j DOCKER-USER && iptables -P FORWARD DROP",
			"ip filter FORWARD forward \"docker\" told=false\n",
			[]string{"iptables -I DOCKER-USER -i microbr -j ACCEPT"},
			"ip filter FORWARD forward \"docker\" told=true\n"},
		{"docker by mark",
			"iptables -N DOCKER-USER && iptables -A FORWARD -j DOCKER-USER && iptables -P FORWARD DROP",
			"ip filter FORWARD forward \"docker\" told=false\n",
			[]string{"iptables -I DOCKER-USER -m mark --mark 0x53000000/0xff000000 -j ACCEPT"},
			"ip filter FORWARD forward \"docker\" told=true\n"},
		{"ufw",
			"iptables -N ufw-before-input && iptables -P INPUT DROP",
			"ip filter INPUT input \"ufw\" told=false\n",
			[]string{"iptables -A ufw-before-input -i microbr -j ACCEPT"},
			"ip filter INPUT input \"ufw\" told=true\n"},
		{"firewalld",
			"nft 'table inet firewalld { chain filter_FORWARD { type filter hook forward priority 10; policy accept; ct state established accept; reject with icmpx admin-prohibited; }; }'",
			"inet firewalld filter_FORWARD forward \"firewalld\" told=false\n",
			[]string{`nft 'insert rule inet firewalld filter_FORWARD iifname "microbr" accept'`},
			"inet firewalld filter_FORWARD forward \"firewalld\" told=true\n"},
		{"an administrator's own",
			"nft 'table inet mine { chain in { type filter hook input priority 0; policy accept; tcp dport 22 accept; counter drop; }; }'",
			"inet mine in input \"\" told=false\n",
			[]string{"nft insert rule inet mine in meta mark '&' 0xff000000 == 0x53000000 accept"},
			"inet mine in input \"\" told=true\n"},
		{"another bridge's rule says nothing of ours",
			`nft 'table ip mine { chain f { type filter hook forward priority 0; policy drop; iifname "microbr1" accept; }; }'`,
			"ip mine f forward \"\" told=false\n",
			[]string{"nft 'add chain ip mine f { policy accept; }'"}, ""},
		{"drops some only",
			"nft 'table ip mine { chain f { type filter hook forward priority 0; policy accept; tcp dport 25 drop; }; }'",
			"", nil, ""},
		{"of IPv6, of the output, of bridged frames",
			"nft 'table ip6 mine { chain f { type filter hook forward priority 0; policy drop; }; }' && " +
				"nft 'table ip mine { chain o { type filter hook output priority 0; policy drop; }; }' && " +
				"nft 'table bridge mine { chain f { type filter hook forward priority 0; policy drop; }; }'",
			"", nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			shell(t, c.before)
			if got := see(t); got != c.want {
				t.Errorf("seen:\n%swant:\n%s", got, c.want)
			}
			for _, line := range c.after {
				shell(t, line)
			}
			if got := see(t); got != c.then {
				t.Errorf("told:\n%swant:\n%s", got, c.then)
			}
			shell(t, "nft flush ruleset")
		})
	}
}

// On a kernel that has everything the trial works, leaves nothing, and says which part a kernel lacks.
func TestTrial(t *testing.T) {
	if !isolated(t) {
		return
	}
	before := linksNow(t)
	must(t, InNamespace(func() {
		must(t, TryBridge())
		must(t, TryTAP())
		must(t, TryRules())
	}))
	if after := linksNow(t); after != before {
		t.Errorf("left over:\n%snot\n%s", after, before)
	}
	if got := get(exec.Command("nft", "list", "ruleset").Output())(t); len(got) > 0 {
		t.Errorf("left over:\n%s", got)
	}
	g := get(trialGuest.filled(trialBridge))(t)
	whole := merged(sharedTables(trialBridge), guestTables(trialBridge, g))[0]
	must(t, InNamespace(func() {
		if what, err := refusedPart(whole); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}))
	lame := whole
	lame.chains = append(append([]chain(nil), whole.chains...), chain{name: "lame", rules: []rule{newRule("", vmapBySource("nowhere"))}})
	must(t, InNamespace(func() {
		if what, err := refusedPart(lame); err == nil || what != "the rule `ip saddr vmap @nowhere`" {
			t.Errorf("%s: %v", what, err)
		}
	}))
}
