package world

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Processes are the VM's, by kind.
func (w *World) Processes(t testing.TB, vm string) map[string][]int {
	t.Helper()
	found := map[string][]int{}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		var pid int
		fmt.Sscan(filepath.Base(d), &pid)
		raw, err := os.ReadFile(d + "/cmdline")
		if err != nil || len(raw) == 0 {
			continue // gone, or a zombie
		}
		args := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
		env, err := os.ReadFile(d + "/environ")
		if err != nil {
			continue
		}
		ours := strings.Contains(string(env), ":"+vm+"\x00") && strings.Contains(string(env), "CLAWVM_MARK=")
		switch {
		case filepath.Base(args[0]) == "clawvm" && slices.Contains(args, "run") && args[len(args)-1] == vm:
			found["supervisor"] = append(found["supervisor"], pid)
		case !ours:
		case args[len(args)-1] == "gate":
			found["gate"] = append(found["gate"], pid)
		case strings.Contains(args[0], "virtiofsd"):
			found["virtiofsd"] = append(found["virtiofsd"], pid)
		case strings.Contains(args[0], "qemu") || strings.Contains(args[0], "cloud-hypervisor"):
			found["vmm"] = append(found["vmm"], pid)
		default:
			found["other"] = append(found["other"], pid)
		}
	}
	return found
}

// carrier is what ip(8) says of whether a link has one, which a bridge is told up to
// a second after its last port has gone.
var carrier = regexp.MustCompile(` (DOWN|UP|LOWERLAYERDOWN|UNKNOWN)\b|NO-CARRIER,|,LOWER_UP`)

func withoutCarrier(line string) string {
	return strings.Join(strings.Fields(carrier.ReplaceAllString(line, "")), " ")
}

// Snapshot is what the host has, by kind, in words that stay the same as long as
// the things do.
func (w *World) Snapshot(t testing.TB) map[string][]string {
	t.Helper()
	shot, err := Look(w.Root, func(argv ...string) (string, error) {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		return string(out), err
	})
	if err != nil {
		t.Fatal(err)
	}
	return shot
}

// Look is the snapshot of a host on which run runs commands, and of the clawvm
// root there.
func Look(root string, run func(argv ...string) (output string, err error)) (map[string][]string, error) {
	dirs := []string{"find"}
	for _, d := range []string{"run/clawvm", "var/lib/clawvm/vms", "var/lib/clawvm/leases"} {
		dirs = append(dirs, filepath.Join(root, d))
	}
	shot := map[string][]string{}
	for kind, argv := range map[string][]string{
		"links":      {"ip", "-br", "link"},
		"addresses":  {"ip", "-br", "addr"},
		"neighbours": {"ip", "neigh", "show", "nud", "permanent"},
		"rules":      {"nft", "list", "ruleset"},
		"policy":     {"ip", "rule"},
		"listeners":  {"sh", "-c", "ss -tulnH | awk '{print $1, $5}' | sort"},
		"mounts":     {"cat", "/proc/self/mounts"},
		"files":      append(dirs, "-printf", `%y %p\n`),
	} {
		out, err := run(argv...)
		if err != nil {
			return nil, fmt.Errorf("%v: %w\n%s", argv, err, out)
		}
		shot[kind] = strings.Split(strings.TrimSpace(out), "\n")
	}
	// Whose connections are counted changes with what the VMs do.
	shot["rules"] = slices.DeleteFunc(shot["rules"], func(line string) bool {
		return strings.Contains(line, " ct count over ") && !strings.Contains(line, " add @")
	})
	for _, kind := range []string{"links", "addresses"} {
		for i, line := range shot[kind] {
			shot[kind][i] = withoutCarrier(line)
		}
	}
	return shot, nil
}

// Compare fails the test for each difference between two snapshots.
func (w *World) Compare(t testing.TB, want, got map[string][]string) {
	t.Helper()
	Compare(t, want, got)
}

// Compare fails the test for each difference between two snapshots.
func Compare(t testing.TB, want, got map[string][]string) {
	t.Helper()
	for kind := range want {
		for _, line := range got[kind] {
			if !slices.Contains(want[kind], line) {
				t.Errorf("%s: left behind: %s", kind, line)
			}
		}
		for _, line := range want[kind] {
			if !slices.Contains(got[kind], line) {
				t.Errorf("%s: missing: %s", kind, line)
			}
		}
	}
}
