package integration

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/network/egress"
)

// listed is the declaration of a VM with an allowlist.
const listed = `
image: small
vmm: %s
vcpus: 1
memory: 256MiB
nameservers: [203.0.113.1]
overlay: {tmpfs: 32MiB}
egress: %s
run: {argv: [sleep, "100000"], user: app}
`

// changeLimit is how long a change of the list may take, the command's own start included. On an idle machine it is 0.1 s.
const changeLimit = 5 * time.Second

// TestAllowlist takes a guest with an allowlist through what it may reach and what not, and looks for the reason in its log.
func TestAllowlist(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	w.Know(t, "api.one.test. 60 A 203.0.113.1", "www.cdn.test. 60 CNAME edge.two.test.", "edge.two.test. 60 A 203.0.113.3", "two.test. 60 A 203.0.113.3",
		"rebind.cdn.test. 60 A 10.0.0.1", "metadata.cdn.test. 60 A 169.254.169.254", "both.cdn.test. 60 A 192.168.1.1", "both.cdn.test. 60 A 203.0.113.3",
		"stray.cdn.test. 60 CNAME gone.test.")
	declare := func(policy string) { w.declare(t, "listed", fmt.Sprintf(listed, vmmName(), policy)) }
	declare(`{allow: ["api.one.test:80", "*.cdn.test:80"]}`)
	t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "listed") })
	w.must(t, "up", "listed")

	says := func(t *testing.T, script string) string {
		t.Helper()
		r := w.clawvm(t, "exec", "listed", "--", "sh", "-c", script)
		return strings.TrimSpace(r.stdout)
	}
	// One look-up, whose answers are in one line.
	lookup := func(t *testing.T, name, want string) {
		t.Helper()
		got := says(t, "nslookup "+name+" 2>&1 | sed -n '/^Name/,$p; /can.t find/p' | grep -v '^$' | tr '\\n' ' '")
		if !strings.Contains(got, want) {
			t.Errorf("nslookup %s: %q, want %q in it", name, got, want)
		}
	}
	reach := func(t *testing.T, to, want string) {
		t.Helper()
		host, port, _ := strings.Cut(to, ":")
		got := says(t, "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 20 "+host+" "+port+" 2>&1 | tail -n 1")
		if !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", to, got, want)
		}
	}
	const hello, refused = "hello from the internet", "onnection refused"
	// logged waits for a line of the log.
	logged := func(t *testing.T, what string, match func(egress.Event) bool) {
		t.Helper()
		var all string
		for deadline := time.Now().Add(10 * time.Second); ; {
			all = w.must(t, "net", "--json", "listed")
			for line := range strings.Lines(all) {
				var e egress.Event
				if err := json.Unmarshal([]byte(line), &e); err != nil {
					t.Fatalf("%v: %s", err, line)
				}
				if match(e) {
					return
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("the log doesn't say %s:\n%s", what, all)
			}
		}
	}
	denied := func(t *testing.T, kind, what, reason string) {
		t.Helper()
		logged(t, what+" refused: "+reason, func(e egress.Event) bool {
			return e.Kind == kind && e.Verdict == egress.Refused && (e.Name == what || e.Destination == what) && strings.Contains(e.Reason, reason)
		})
	}

	t.Run("nothing before a look-up", func(t *testing.T) {
		reach(t, "203.0.113.1:80", refused)
		denied(t, egress.KindOpen, "203.0.113.1:80", "not in egress.allow")
	})
	t.Run("an allowed name", func(t *testing.T) {
		lookup(t, "api.one.test", "203.0.113.1")
		reach(t, "203.0.113.1:80", hello)
		logged(t, "which rule allowed it", func(e egress.Event) bool { return e.Name == "api.one.test" && e.Rule == "api.one.test:80" })
		logged(t, "the connection with its name", func(e egress.Event) bool {
			return e.Kind == egress.KindOpen && e.Verdict == egress.Allowed && e.Destination == "203.0.113.1:80" && e.Name == "api.one.test"
		})
		reach(t, "203.0.113.1:443", refused)
		denied(t, egress.KindOpen, "203.0.113.1:443", "tcp 443 is not among its ports in egress.allow: api.one.test:80")
		reach(t, "203.0.113.3:80", refused)
	})
	t.Run("a forbidden name, whoever is asked", func(t *testing.T) {
		lookup(t, "two.test", "can't find two.test: NXDOMAIN")
		lookup(t, "two.test 8.8.8.8", "can't find two.test: NXDOMAIN")
		lookup(t, "cdn.test", "NXDOMAIN")
		denied(t, egress.KindQuery, "two.test", "not in egress.allow")
		lookup(t, "api.one.test 8.8.8.8", "203.0.113.1")
		reach(t, "203.0.113.1:853", refused)
		denied(t, egress.KindOpen, "203.0.113.1:853", "DNS over TLS")
		lookup(t, "-type=txt api.one.test", "")
		denied(t, egress.KindQuery, "api.one.test", "only addresses")
	})
	t.Run("another name of the same", func(t *testing.T) {
		lookup(t, "www.cdn.test", "203.0.113.3")
		reach(t, "203.0.113.3:80", hello)
		lookup(t, "stray.cdn.test", "")
	})
	t.Run("answers that lead inside", func(t *testing.T) {
		lookup(t, "rebind.cdn.test", "NXDOMAIN")
		denied(t, egress.KindQuery, "rebind.cdn.test", "10.0.0.1 is private")
		lookup(t, "metadata.cdn.test", "NXDOMAIN")
		denied(t, egress.KindQuery, "metadata.cdn.test", "link-local")
		lookup(t, "both.cdn.test", "203.0.113.3")
		if got := says(t, "nslookup both.cdn.test"); strings.Contains(got, "192.168.1.1") {
			t.Errorf("the private address is in the answer: %s", got)
		}
	})
	t.Run("other ways out", func(t *testing.T) {
		for _, to := range []string{"192.168.83.1:22", "10.0.0.1:80", "169.254.169.254:80", "203.0.113.2:80"} {
			reach(t, to, refused)
		}
		denied(t, egress.KindOpen, "10.0.0.1:80", "10.0.0.1 is private")
		if got := says(t, "ping -c 1 -W 3 203.0.113.1 2>&1; echo $?"); strings.HasSuffix(got, "0") {
			t.Errorf("a ping is answered: %s", got)
		}
		out := w.must(t, "net", "--denied", "listed")
		if !strings.Contains(out, "refused: 10.0.0.1 is private") || strings.Contains(out, " allowed") {
			t.Errorf("net --denied prints\n%s", out)
		}
	})
	t.Run("what was looked up outlives a flush of the rules", func(t *testing.T) {
		if _, err := exec.LookPath("nft"); err != nil {
			t.Skip("needs the nft program")
		}
		if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		reach(t, "203.0.113.3:80", hello)
		reach(t, "203.0.113.1:443", refused)
	})
	t.Run("a list that changes", func(t *testing.T) {
		// A connection that stands, and speaks once more when the name is gone.
		// The server would answer and keep it.
		request := func(path string) string { return "printf 'GET " + path + " HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'" }
		says(t, "("+request("/before")+"; sleep 6; "+request("/after")+"; sleep 1000) | (nc 203.0.113.3 80; echo over > /tmp/over) >/dev/null 2>&1 &")
		logged(t, "the connection", func(e egress.Event) bool {
			return e.Kind == egress.KindOpen && e.Destination == "203.0.113.3:80" && e.Verdict == egress.Allowed
		})
		declare(`{allow: ["api.one.test:80", "two.test:443"]}`)
		begun := time.Now()
		out := w.must(t, "reload", "listed")
		if took := time.Since(begun); took > changeLimit {
			t.Errorf("a reload took %s", took)
		}
		if !strings.Contains(out, `egress.allow ["api.one.test:80", "*.cdn.test:80"] → ["api.one.test:80", two.test]`) {
			t.Errorf("reload prints %q", out)
		}
		reach(t, "203.0.113.3:80", refused)
		lookup(t, "www.cdn.test", "NXDOMAIN")
		reach(t, "203.0.113.1:80", hello)
		lookup(t, "two.test", "203.0.113.3")
		reach(t, "203.0.113.3:443", refused) // by the server, which isn't there
		logged(t, "that it was let through", func(e egress.Event) bool {
			return e.Destination == "203.0.113.3:443" && e.Verdict == egress.Allowed && e.Name == "two.test"
		})
		eventually(t, "the connection of a name that is gone ends", time.Minute, func() bool { return says(t, "cat /tmp/over") == "over" })
		asked := strings.Join(w.asked(), " ")
		if !strings.Contains(asked, "/before") || strings.Contains(asked, "/after") {
			t.Errorf("the server was asked %s", asked)
		}
	})
	t.Run("exceptions", func(t *testing.T) {
		if out := w.must(t, "allow", "listed"); out != "api.one.test:80\ntwo.test\n" {
			t.Errorf("allow prints %q", out)
		}
		begun := time.Now()
		out := w.must(t, "allow", "listed", "edge.two.test:80", "--for", "20s")
		if took := time.Since(begun); took > changeLimit {
			t.Errorf("allow took %s", took)
		}
		if !strings.Contains(out, "edge.two.test:80  until ") {
			t.Errorf("allow --for prints %q", out)
		}
		lookup(t, "edge.two.test", "203.0.113.3")
		reach(t, "203.0.113.3:80", hello)
		w.must(t, "deny", "listed", "api.one.test")
		lookup(t, "api.one.test", "NXDOMAIN")
		reach(t, "203.0.113.1:80", refused)
		if out := w.must(t, "allow", "listed"); !strings.Contains(out, "api.one.test:80  denied until listed is taken down\n") {
			t.Errorf("allow prints %q", out)
		}
		w.must(t, "reload", "listed")
		lookup(t, "api.one.test", "NXDOMAIN") // a reload leaves exceptions
		eventually(t, "the time is over", time.Minute, func() bool {
			return !strings.Contains(w.must(t, "allow", "listed"), "edge.two.test")
		})
		eventually(t, "it is refused again", 10*time.Second, func() bool {
			return strings.Contains(says(t, "nc -w 20 203.0.113.3 80 2>&1 </dev/null"), refused)
		})
		lookup(t, "edge.two.test", "NXDOMAIN")
		w.must(t, "allow", "listed", "api.one.test:80")
		lookup(t, "api.one.test", "203.0.113.1")
		for _, c := range []struct{ what, host, want string }{
			{"deny", "gone.test", "cannot deny gone.test: it is not allowed"},
			{"allow", "https://gone.test/x", "want gone.test"},
			{"allow", "10.0.0.0/8", "10.0.0.0/8 is private"},
		} {
			if r := w.clawvm(t, c.what, "listed", c.host); r.code != 78 || !strings.Contains(r.stderr, c.want) {
				t.Errorf("%s %s: exit code %d, %s", c.what, c.host, r.code, r.stderr)
			}
		}
	})
	t.Run("other modes", func(t *testing.T) {
		declare("{mode: open}")
		w.must(t, "reload", "listed")
		reach(t, "203.0.113.3:80", hello)
		reach(t, "10.0.0.1:80", refused)
		if r := w.clawvm(t, "allow", "listed", "two.test"); r.code != 78 || !strings.Contains(r.stderr, "its egress mode is open") {
			t.Errorf("allow with open egress: exit code %d, %s", r.code, r.stderr)
		}
		declare("{allow: []}")
		w.must(t, "reload", "listed")
		reach(t, "203.0.113.3:80", refused)
		lookup(t, "api.one.test", "NXDOMAIN")
	})
}
