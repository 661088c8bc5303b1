package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// everything is the declaration of a VM with every layer that there is.
const everything = `
image: small
vmm: %s
vcpus: 1
memory: 256MiB
nameservers: [203.0.113.1]
overlay: {%s}
volumes:
  - {name: state, mount: /var/lib/state, size: 64MiB}
secrets:
  given: {file: %s}
  made: {generate: 32}
ports: ["127.0.0.1:18080:8080"]
run:
  argv: [httpd, -f, -v, -p, "8080", -h, /srv/www]
  user: app
  ready: {http: {port: 8080, path: /index.html}}
  stop: {timeout: 5s}
`

// TestLifeOfAVM takes one VM through all that it can do, in order: under
// emulation each start costs seconds.
func TestLifeOfAVM(t *testing.T) {
	w := newWorld(t)
	w.prepareStore(t)
	given := filepath.Join(t.TempDir(), "given")
	writeSecret(t, given, "the first secret")
	w.declare(t, "life", fmt.Sprintf(everything, vmmName(), "tmpfs: 32MiB", given))
	t.Cleanup(func() { w.clawvm(t, "down", "--timeout", "1s", "life") })

	up := w.must(t, "up", "life")
	exec := func(t *testing.T, script string) result {
		t.Helper()
		return w.clawvm(t, "exec", "life", "--", "sh", "-c", script)
	}
	says := func(t *testing.T, script, want string) {
		t.Helper()
		if r := exec(t, script); r.code != 0 || strings.TrimSpace(r.stdout) != want {
			t.Errorf("%s\n says %q (exit code %d, %s), want %q", script, r.stdout, r.code, strings.TrimSpace(r.stderr), want)
		}
	}
	fails := func(t *testing.T, script string) {
		t.Helper()
		if r := exec(t, script); r.code == 0 {
			t.Errorf("%s works, and must not: %q", script, r.stdout)
		}
	}

	t.Run("up says how to go on", func(t *testing.T) {
		for _, want := range []string{
			"life is ready after", "127.0.0.1:18080->8080/tcp", "exec life -- id",
			"no limits apply: cgroup v2 is not mounted at /sys/fs/cgroup", // see world
		} {
			if !strings.Contains(up, want) {
				t.Errorf("up does not say %q:\n%s", want, up)
			}
		}
		if again := w.must(t, "up", "life"); !strings.Contains(again, "is up already") {
			t.Errorf("a second up says %q", again)
		}
	})
	t.Run("ls", func(t *testing.T) {
		s := w.status(t, "life")
		if s.State != "ready" || s.Health != "ready" || s.VMM != vmmName() || !strings.HasPrefix(s.Address, "192.168.83.") {
			t.Errorf("status is %+v", s)
		}
		if out := w.must(t, "ls"); !strings.Contains(out, "life") || !strings.Contains(out, "127.0.0.1:18080->8080/tcp") {
			t.Errorf("ls prints\n%s", out)
		}
	})
	t.Run("top", func(t *testing.T) {
		var list []struct {
			Name              string
			CPU               float64
			Memory, MemoryMax int64
			Sent              uint64
			Disk              int64
			Tasks             int
		}
		says(t, "nslookup example.test >/dev/null && echo answered", "answered") // or the guest has sent nothing yet
		out := w.must(t, "top", "--json", "life")
		if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 1 {
			t.Fatalf("top prints %s (%v)", out, err)
		}
		u := list[0]
		if u.Name != "life" || u.CPU <= 0 || u.Memory < 50<<20 || u.Memory > 2*u.MemoryMax || u.Sent == 0 || u.Disk == 0 || u.Tasks < 10 {
			t.Errorf("top says %+v", u)
		}
		if out := w.must(t, "top"); !strings.HasPrefix(out, "NAME") || !strings.Contains(out, "life") {
			t.Errorf("top prints %s", out)
		}
		if r := w.clawvm(t, "top", "nobody"); r.code != 4 {
			t.Errorf("top of a VM that isn't declared: exit code %d, %s", r.code, r.stderr)
		}
	})
	t.Run("exec", func(t *testing.T) {
		says(t, "id -u; id -g", "20001\n20001")
		says(t, "hostname", "life")
		if r := exec(t, "exit 42"); r.code != 42 {
			t.Errorf("exit code %d, want 42", r.code)
		}
		if r := w.clawvm(t, "exec", "life", "no-such-program"); r.code != 127 {
			t.Errorf("a command that isn't there: exit code %d, want 127", r.code)
		}
		if r := w.clawvmIn(t, strings.NewReader("through\n"), "exec", "-i", "life", "cat"); r.stdout != "through\n" {
			t.Errorf("standard input: %q", r.stdout)
		}
		if r := w.clawvm(t, "exec", "--root", "life", "id", "-u"); strings.TrimSpace(r.stdout) != "0" {
			t.Errorf("exec --root is uid %q %s", r.stdout, r.stderr)
		}
	})
	t.Run("secrets", func(t *testing.T) {
		says(t, "cat /run/secrets/given", "the first secret")
		says(t, "stat -c '%a %u %h' /run/secrets/given", "400 20001 1")
		says(t, "grep -c . /run/secrets/made", "1")
		fails(t, "echo x > /run/secrets/given")
		says(t, "grep ' /run/secrets ' /proc/mounts | cut -d' ' -f4 | tr , '\\n' | grep -xE 'ro|nosuid|nodev|noexec' | sort | tr '\\n' ' '", "nodev noexec nosuid ro")
		if out := w.must(t, "exec", "life", "--", "sh", "-c", "env; cat /proc/*/environ /proc/cmdline 2>/dev/null; true"); strings.Contains(out, "first secret") {
			t.Error("the secret is in an environment or on the kernel's command line")
		}
	})
	t.Run("secret rotation", func(t *testing.T) {
		writeSecret(t, given, "the second secret")
		w.must(t, "secret", "rotate", "life")
		says(t, "cat /run/secrets/given", "the second secret")
		writeSecret(t, given, "the third secret") // the source's change alone is enough
		eventually(t, "the guest sees the third secret", 20*time.Second, func() bool {
			return strings.TrimSpace(exec(t, "cat /run/secrets/given").stdout) == "the third secret"
		})
		if err := os.WriteFile(given, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if r := w.clawvm(t, "secret", "rotate", "life"); r.code == 0 || !strings.Contains(r.stderr, given) {
			t.Errorf("an empty source: exit code %d, %q", r.code, r.stderr)
		}
		says(t, "cat /run/secrets/given", "the third secret")
		writeSecret(t, given, "the third secret")
	})
	t.Run("overlay and volume", func(t *testing.T) {
		fails(t, "echo x > /usr/bin/marker")
		fails(t, "echo x > /etc/passwd")
		fails(t, "echo x > /run/clawvm.test")
		says(t, "echo x > /tmp/mine && cat /tmp/mine", "x")
		says(t, "echo kept > /var/lib/state/kept && sync && cat /var/lib/state/kept", "kept")
		if r := w.clawvm(t, "exec", "--root", "life", "--", "sh", "-c", "echo x > /srv/forgotten && cat /srv/forgotten"); strings.TrimSpace(r.stdout) != "x" {
			t.Errorf("root can't write to the overlay: %+v", r)
		}
	})
	t.Run("sandbox", func(t *testing.T) {
		says(t, "grep -E '^(NoNewPrivs|CapEff|CapBnd)' /proc/self/status | tr -s '\\t ' ' ' | sort", "CapBnd: 0000000000000000\nCapEff: 0000000000000000\nNoNewPrivs: 1")
	})
	t.Run("published port", func(t *testing.T) {
		if got := get(t, "http://127.0.0.1:18080/index.html"); got != "served by the guest\n" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("network", func(t *testing.T) {
		// In two steps, and without wget: the busybox of the test's guest is static,
		// and its libc can't look names up without its shared parts.
		says(t, "nslookup example.test | grep -c 'Address.*203.0.113.1'", "1")
		says(t, "printf 'GET /from-guest HTTP/1.0\\r\\n\\r\\n' | nc -w 20 203.0.113.1 80 | tail -n 1", "hello from the internet")
		asked := strings.Join(w.asked(), "\n")
		if !strings.Contains(asked, uplink.Addr().String()+" /from-guest") {
			t.Errorf("the internet was asked %q, want the host's own address as the source (masquerade)", asked)
		}
		fails(t, "nc -w 20 169.254.169.254 80 </dev/null")
		fails(t, "nslookup nobody.test")
		eventually(t, "the log has query and connection", 20*time.Second, func() bool {
			log := w.must(t, "net", "life")
			return strings.Contains(log, "example.test") && strings.Contains(log, "203.0.113.1") && strings.Contains(log, "169.254.169.254")
		})
		lines := w.must(t, "net", "--json", "life")
		for _, want := range []string{`"kind":"query"`, `"kind":"open"`, `"verdict":"refused"`, `"vm":"life"`} {
			if !strings.Contains(lines, want) {
				t.Errorf("the JSON log has no %s:\n%s", want, lines)
			}
		}
	})
	t.Run("the host is closed to the guest", func(t *testing.T) {
		l, err := net.Listen("tcp4", "0.0.0.0:2222")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		began := time.Now()
		fails(t, "nc -w 20 192.168.83.1 2222 </dev/null")
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("refused after %s, want at once", took)
		}
	})
	t.Run("logs", func(t *testing.T) {
		eventually(t, "the workload's log shows a request", 20*time.Second, func() bool {
			return strings.Contains(w.must(t, "logs", "life"), "response:200")
		})
		line := regexp.MustCompile(`^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \S`)
		if out := w.must(t, "logs", "-t", "-n", "1", "--since", "1h", "life"); !line.MatchString(out) {
			t.Errorf("logs -t prints %q", out)
		}
		w.must(t, "exec", "--root", "life", "--", "sh", "-c", "echo to the console >/dev/console")
		eventually(t, "the console's log has a line", 20*time.Second, func() bool {
			return regexp.MustCompile(`(?m)^20\S+Z to the console`).MatchString(w.must(t, "logs", "--console", "-t", "life"))
		})
		if out := w.must(t, "logs", "--until", "1h", "life"); out != "" {
			t.Errorf("an hour ago the workload wrote %q", out)
		}
		if out := w.must(t, "logs", "--json", "-n", "1", "life"); !strings.HasPrefix(out, `{"time":"20`) || !strings.Contains(out, `"vm":"life"`) {
			t.Errorf("logs --json prints %q", out)
		}
	})
	t.Run("reboot from inside", func(t *testing.T) {
		w.clawvm(t, "exec", "--root", "life", "reboot", "-f")
		eventually(t, "the guest is up again", commandLimit, func() bool {
			s := w.status(t, "life")
			return s.Reboots == 1 && s.State == "ready"
		})
		says(t, "cat /var/lib/state/kept", "kept")
		fails(t, "cat /srv/forgotten") // the overlay is a tmpfs
		if got := get(t, "http://127.0.0.1:18080/index.html"); got != "served by the guest\n" {
			t.Errorf("the published port after the reboot: %q", got)
		}
	})
	controllers := mountCgroups(t)
	t.Run("down and up", func(t *testing.T) {
		began := time.Now()
		w.must(t, "down", "life")
		if took := time.Since(began); took > 30*time.Second {
			t.Errorf("down took %s: the guest did not end by itself", took)
		}
		if r := w.clawvm(t, "status", "life"); r.code != 3 {
			t.Errorf("status of a VM that is down: exit code %d, want 3", r.code)
		}
		out := w.must(t, "up", "life")
		says(t, "cat /var/lib/state/kept", "kept")
		shown := w.clawvm(t, "status", "life").stdout
		if strings.Contains(controllers, "memory") {
			if strings.Contains(out, "no limits") || !strings.Contains(shown, "cpu weight 100, tasks 1024") || !strings.Contains(shown, "/life\n") {
				t.Errorf("with the controllers %s up says\n%s\nand status\n%s", controllers, out, shown)
			}
		} else if why := "cgroup v2 has no cpu, memory, pids on this host"; !strings.Contains(out, "no limits apply: "+why) || !strings.Contains(shown, "none apply: "+why) {
			t.Errorf("without controllers up says\n%s\nand status\n%s", out, shown)
		}
	})
	t.Run("poweroff from inside", func(t *testing.T) {
		w.clawvm(t, "exec", "--root", "life", "poweroff", "-f")
		eventually(t, "the VM is down", 60*time.Second, func() bool { return w.status(t, "life").State == "stopped" })
	})
}

// mountCgroups gives the world the host's cgroup v2, until the test's end, and
// returns its controllers: none where they are cgroup v1's.
func mountCgroups(t *testing.T) string {
	t.Helper()
	const at = "/sys/fs/cgroup"
	if err := syscall.Mount("cgroup2", at, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(at, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	controllers, err := os.ReadFile(at + "/cgroup.controllers")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(controllers))
}

func writeSecret(t *testing.T, file, text string) {
	t.Helper()
	tmp := file + ".new"
	if err := os.WriteFile(tmp, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, file); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, url string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Errorf("GET %s: %v", url, err)
		return ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("GET %s: %v", url, err)
	}
	return string(body)
}
