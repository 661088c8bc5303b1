package server

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/vmm"
)

// wellVM is what doctor looks at on the server.
const wellVM = `image: well
vcpus: 1
memory: 256MiB
overlay: {size: 16MiB}
nameservers: [127.0.0.1]
`

// doctor runs `clawvm doctor` on the server as its administrator would, well and with one thing after another broken. The programs
// are there already.
func doctor(t *testing.T, h *emuhost.Host, dir string, cloudHypervisor bool) {
	ctx, cancel := context.WithTimeout(t.Context(), tableLimit)
	defer cancel()
	run(t, "build", "-trimpath", "-o", dir+"/nameserver", "./nameserver")
	if err := h.CopyIn(ctx, dir+"/nameserver", inside+"/nameserver"); err != nil {
		t.Fatal(err)
	}
	script := func(text string) {
		t.Helper()
		began := time.Now()
		defer func() { t.Logf("%s: %v", strings.SplitN(text, "\n", 2)[0], time.Since(began).Round(time.Millisecond)) }()
		if out, errs, code, err := h.Script(ctx, text); err != nil || code != 0 {
			t.Fatalf("%s\ncode %d, %v\n%s%s", text, code, err, out, errs)
		}
	}
	script(`mkdir -p /etc/clawvm/vms /tmp/well/bin /tmp/well/etc
		cp /usr/local/bin/busybox /tmp/well/bin/
		echo root:x:0:0:root:/:/bin/busybox > /tmp/well/etc/passwd
		` + inside + `/bin/clawvm image import /tmp/well well
		systemd-run -q --unit=nameserver ` + inside + `/nameserver 127.0.0.1:53
		cat > /etc/clawvm/vms/well.yaml <<'END'
` + wellVM + `END
`)
	defer script("systemctl stop nameserver || true; rm -rf /etc/clawvm /var/lib/clawvm /var/log/clawvm /run/clawvm /tmp/well")

	type finding struct{ Check, VM, Severity, Seen, Do string }
	ask := func(t *testing.T, env ...string) ([]finding, int) {
		t.Helper()
		var out, errs bytes.Buffer
		code, err := h.Exec(ctx, emuhost.Command{Argv: []string{inside + "/bin/clawvm", "doctor", "--json", "--timeout", "1m", "well"}, Env: env, Stdout: &out, Stderr: &errs})
		if err != nil {
			t.Fatal(err)
		}
		var all []finding
		if err := json.Unmarshal(out.Bytes(), &all); err != nil {
			t.Fatalf("%v: %s%s", err, &out, &errs)
		}
		return all, code
	}
	expect := func(t *testing.T, all []finding, check, severity, seen, do string) {
		t.Helper()
		var found []finding
		for _, f := range all {
			if f.Check != check {
				continue
			}
			found = append(found, f)
			if f.Severity == severity && strings.Contains(f.Seen, seen) && strings.Contains(f.Do, do) {
				return
			}
		}
		t.Errorf("want %s %s: …%s… → …%s…; found %+v", severity, check, seen, do, found)
	}

	well, code := ask(t)
	for _, f := range well {
		if f.Severity == "error" || f.Severity == "unknown" {
			t.Errorf("on a server that is well: %+v", f)
		}
	}
	if code != 0 && code != 10 {
		t.Errorf("exit code %d on a server that is well", code)
	}
	chosen := "qemu "
	if cloudHypervisor {
		chosen = vmm.CloudHypervisor + " v"
	}
	for check, seen := range map[string]string{"kvm": "a guest runs", "cpu": "svm; this host is a VM itself", "qemu": "with KVM", "cgroup": "v2 with memory, cpu, pids",
		"nftables": "takes all rules", "tap": "can be made", "connection-log": "can be", "nameserver": "127.0.0.1 answered", "up VMM": chosen, "up disks": "makes the overlay"} {
		expect(t, well, check, "ok", seen, "")
	}
	if out, _, _, err := h.Run(ctx, inside+"/bin/clawvm", "doctor", "--timeout", "1m", "well"); err != nil || !strings.Contains(out, "\nVM well\n") {
		t.Errorf("%v: %s", err, out)
	} else {
		t.Logf("for people:\n%s", out)
	}

	for _, c := range []struct {
		name, harm, mend          string
		env                       []string
		check, severity, seen, do string
	}{
		{name: "kvm for root only", harm: "chmod 600 /dev/kvm", mend: "chmod 660 /dev/kvm",
			check: "kvm", severity: "warning", seen: "only root may open /dev/kvm", do: "chmod 660 /dev/kvm"},
		{name: "no kvm", harm: "modprobe -r kvm_amd", mend: "modprobe kvm_amd && udevadm wait --timeout=60 /dev/kvm",
			check: "kvm", severity: "warning", seen: "/dev/kvm isn't there", do: "modprobe kvm_intel or kvm_amd"},
		{name: "Docker", harm: "nft 'table ip filter { chain DOCKER-USER { }; chain FORWARD { type filter hook forward priority 0; policy drop; jump DOCKER-USER; }; }'", mend: "nft delete table ip filter",
			check: "firewall", severity: "error", seen: "ip filter FORWARD drops at its end", do: "iptables -I DOCKER-USER"},
		{name: "firewalld", harm: "nft 'table inet firewalld { chain filter_INPUT { type filter hook input priority 10; ct state established accept; reject with icmpx admin-prohibited; }; }'", mend: "nft delete table inet firewalld",
			check: "firewall", severity: "error", seen: "inet firewalld filter_INPUT", do: "firewall-cmd --permanent"},
		{name: "no device for TAPs", harm: "mv /dev/net/tun /dev/net/away", mend: "mv /dev/net/away /dev/net/tun",
			check: "tap", severity: "error", seen: "/dev/net/tun", do: "modprobe -a tun"},
		{name: "old cloud-hypervisor", harm: "printf '#!/bin/sh\\necho cloud-hypervisor v48.0\\n' > /tmp/old && chmod 755 /tmp/old", mend: "rm /tmp/old", env: []string{"CLAWVM_CLOUD_HYPERVISOR=/tmp/old"},
			check: vmm.CloudHypervisor, severity: "error", seen: "v48.0", do: "v53.0"},
		{name: "a unit without a declaration", harm: "mkdir -p /etc/systemd/system/x.wants && touch /etc/systemd/system/clawvm@.service && ln -s ../clawvm@.service /etc/systemd/system/x.wants/clawvm@gone.service",
			mend:  "rm -r /etc/systemd/system/x.wants /etc/systemd/system/clawvm@.service",
			check: "systemd", severity: "warning", seen: "nothing declares VM gone", do: "systemctl disable clawvm@gone"},
		{name: "silent name server", harm: "systemctl stop nameserver", mend: "true",
			check: "nameserver", severity: "error", seen: "127.0.0.1 gave no answer", do: "nameservers"},
	} {
		t.Run(c.name, func(t *testing.T) {
			script(c.harm)
			defer script(c.mend)
			ill, _ := ask(t, c.env...)
			expect(t, ill, c.check, c.severity, c.seen, c.do)
		})
	}
}
