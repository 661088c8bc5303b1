package server

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/vmm"
)

// The gateway's limits, in the wall's time.
const (
	installLimit = 40 * time.Minute
	gatewayLimit = 4 * time.Hour
	// gatewaySlow is how many seconds of the wall one of the server's takes there:
	// with 16 the gateway's own limits hold on half of a 2-core machine.
	gatewaySlow = 16
)

// gateway is the example's declaration, on the VMM to try. The server has no route.
const gateway = `
image: openclaw
vmm: cloud-hypervisor
vcpus: 1
memory: 2GiB
overlay: {tmpfs: 256MiB}
volumes:
  - {name: state, mount: /var/lib/openclaw, size: 2GiB}
secrets:
  gateway-token: {generate: 32}
ports: ["127.0.0.1:18789:18789"]
openclaw:
  auth: {mode: token, tokenFile: gateway-token}
`

// TestGatewayUnderCloudHypervisor runs the real OpenClaw gateway under the real
// cloud-hypervisor on the emulated server. It takes more than an hour, so it has
// to be asked for: CLAWVM_TEST_GATEWAY names a clawvm root that has the image.
func TestGatewayUnderCloudHypervisor(t *testing.T) {
	root := os.Getenv("CLAWVM_TEST_GATEWAY")
	if root == "" {
		t.Skip("takes more than an hour: CLAWVM_TEST_GATEWAY=DIR asks for it, where DIR is a clawvm root with the image openclaw")
	}
	program := cloudHypervisor()
	if program == "" {
		t.Skipf("no cloud-hypervisor to carry along: neither %s nor the PATH has one", vmm.CloudHypervisorEnv)
	}
	// First a server in the machine's time, to install; then the same disk with a
	// slow clock, under which the gateway's own time limit of 5 s holds.
	disk := filepath.Join(t.TempDir(), "server.raw")
	t.Run("install", func(t *testing.T) { install(t, disk, root, program) })
	if t.Failed() {
		return
	}
	h := emuhost.Start(t, emuhost.Options{Disk: disk, MemoryMB: 6144, Slow: gatewaySlow})
	ctx, cancel := context.WithTimeout(t.Context(), gatewayLimit)
	defer cancel()
	script := func(what, text string) string {
		began := time.Now()
		var out bytes.Buffer
		code, err := h.Exec(ctx, emuhost.Command{Argv: []string{"bash", "-c", text}, Stdout: &out, Stderr: &out})
		t.Logf("%s (%s on the wall): code %d, %v\n%s", what, time.Since(began).Round(time.Second), code, err, &out)
		if err != nil || code != 0 {
			t.Errorf("%s failed", what)
		}
		return out.String()
	}
	script("devices", "modprobe -a tun kvm-amd && udevadm wait --timeout=600 /dev/kvm /dev/net/tun")
	script("up", "date; clawvm up openclaw; code=$?; date; exit $code")
	if out := script("ls", "clawvm ls; clawvm status openclaw"); !strings.Contains(out, "cloud-hypervisor") {
		t.Error("it is not under cloud-hypervisor")
	}
	if out := script("startupz", "curl -s -m 600 -w ' %{http_code}' http://127.0.0.1:18789/startupz"); !strings.HasSuffix(out, " 200") {
		t.Errorf("/startupz says %q", out)
	}
	script("id", "clawvm exec openclaw -- id && clawvm exec openclaw -- ls -ln /run/secrets")
	script("console", "clawvm logs --console openclaw | tail -n 40")
	script("workload", "clawvm logs openclaw | tail -n 40")
	script("down", "clawvm down openclaw")
}

func install(t *testing.T, disk, root, program string) {
	h := emuhost.Start(t, emuhost.Options{Disk: disk})
	ctx, cancel := context.WithTimeout(t.Context(), installLimit)
	defer cancel()
	dir := t.TempDir()
	run(t, "build", "-trimpath", "-ldflags=-s -w", "-o", dir+"/bin/", "../../cmd/...")
	declaration := filepath.Join(dir, "openclaw.yaml")
	if err := os.WriteFile(declaration, []byte(gateway), 0o644); err != nil {
		t.Fatal(err)
	}
	for to, from := range map[string]string{
		"/usr/bin/clawvm":                 dir + "/bin/clawvm",
		"/usr/lib/clawvm/clawvm-init":     dir + "/bin/clawvm-init",
		"/usr/local/bin/cloud-hypervisor": program,
		"/etc/clawvm/vms/openclaw.yaml":   declaration,
	} {
		if err := h.CopyIn(ctx, from, to); err != nil {
			t.Fatal(err)
		}
	}
	h.Must(t, "mkdir", "-p", "/var/lib/clawvm")
	// The store goes over as it is: owners, modes and times are the image's.
	in, done := tarOf(t, filepath.Join(root, "var/lib/clawvm"), "store")
	var said bytes.Buffer
	code, err := h.Exec(ctx, emuhost.Command{
		Argv:  []string{"tar", "-C", "/var/lib/clawvm", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-"},
		Stdin: in, Stdout: &said, Stderr: &said,
	})
	if err != nil || code != 0 {
		t.Fatalf("cannot copy the store: code %d, %v: %s", code, err, &said)
	}
	if err := done(); err != nil {
		t.Fatal(err)
	}
	t.Log(h.Must(t, "clawvm", "image", "ls"))
	h.Must(t, "sync")
}
