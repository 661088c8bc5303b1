package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/network/egress"
)

// checkHostKernel says which kernel runs, and whether what it has not loaded yet can still be loaded.
func checkHostKernel(context.Context, *look) []Finding {
	release, err := runningKernel()
	if err != nil {
		return []Finding{broken("host-kernel", Unknown, err)}
	}
	modular, err := os.ReadFile("/proc/modules")
	if err == nil && len(modular) > 0 && !hasModules(release) {
		return found("host-kernel", Warning, "reboot into the kernel that is installed",
			"%s runs, and its modules are gone from /lib/modules: what isn't loaded can't be", release)
	}
	return found("host-kernel", OK, "", "%s", release)
}

func runningKernel() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}

func hasModules(release string) bool {
	for _, dir := range []string{"/lib/modules", "/run/booted-system/kernel-modules/lib/modules"} {
		if _, err := os.Stat(filepath.Join(dir, release)); err == nil {
			return true
		}
	}
	return false
}

// networkTrials are what VMs need of the kernel's network, each tried in a namespace where the former ones were.
var networkTrials = []struct {
	name    string
	try     func() error
	modules string // that have it, where it isn't built in
	works   string
}{
	{"bridge", network.TryBridge, "bridge", "a bridge can be made"},
	{"tap", network.TryTAP, "tun", "a TAP can be made and opened"},
	{"nftables", network.TryRules, "nf_tables nft_chain_nat nft_masq nft_reject_inet nft_fib_inet nft_log nft_ct nft_connlimit", "the kernel takes all rules, in the families inet and bridge"},
	{"connection-log", tryLogs, "nfnetlink_log nf_log_syslog nf_conntrack_netlink", "connections can be logged and counted"},
}

// tryLogs opens what a gate reads connections from.
func tryLogs() error {
	if _, err := egress.EnableAccounting(); err != nil {
		return err
	}
	f, err := egress.OpenFlows(1)
	if err != nil {
		return err
	}
	c, err := egress.OpenConntrack(netip.MustParseAddr("192.168.83.2"))
	if err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(f.Close(), c.Close())
}

// checkNetwork tries what VMs need of the kernel's network, in a namespace that is gone afterwards.
func checkNetwork(context.Context, *look) []Finding {
	var all []Finding
	err := network.InNamespace(func() {
		failed := ""
		for _, t := range networkTrials {
			if failed == "bridge" && t.name == "tap" {
				all = append(all, Finding{Check: t.name, Severity: Unknown, Seen: "could not look without a bridge"})
				continue
			}
			if err := t.try(); err != nil {
				failed = t.name
				all = append(all, lacking(t.name, t.modules, err))
				continue
			}
			all = append(all, Finding{Check: t.name, Severity: OK, Seen: t.works})
		}
	})
	if err != nil {
		return []Finding{broken("network", Unknown, err)}
	}
	return all
}

// lacking is the finding of something that the kernel does not do.
func lacking(name, modules string, err error) Finding {
	f := broken(name, Error, err)
	f.Seen, f.Do = oneLine(err), "modprobe -a "+modules
	if release, err := runningKernel(); err == nil && !hasModules(release) {
		f.Do = fmt.Sprintf("the running kernel %s has no modules in /lib/modules: reboot into one that has them, or that has built in: %s", release, modules)
	}
	return f
}

// checkSysctls reads the kernel's parameters that VMs' traffic depends on.
func checkSysctls(context.Context, *look) []Finding {
	return sysctls(func(path string) (string, error) {
		b, err := os.ReadFile("/proc/sys/" + path)
		return strings.TrimSpace(string(b)), err
	})
}

// conntrackFull is the part of the table of connections, in percent, from which it is nearly full: when it is, new connections are dropped.
const conntrackFull = 80

// sysctls judges the parameters that read gives.
func sysctls(read func(path string) (string, error)) []Finding {
	var all []Finding
	add := func(name string, s Severity, do, format string, args ...any) {
		all = append(all, Finding{Check: name, Severity: s, Seen: fmt.Sprintf(format, args...), Do: do})
	}
	switch v, err := read("net/ipv4/ip_forward"); {
	case err != nil:
		all = append(all, broken("ip-forward", Unknown, err))
	case v != "1":
		add("ip-forward", Note, "", "net.ipv4.ip_forward is %s; `up` sets it to 1", v)
	default:
		add("ip-forward", OK, "", "on")
	}
	switch v, err := read("net/ipv4/conf/all/rp_filter"); {
	case err != nil:
		all = append(all, broken("rp-filter", Unknown, err))
	case v == "1":
		add("rp-filter", Note, "", "strict: on a host with several uplinks, answers to VMs that come by another one are dropped")
	default:
		add("rp-filter", OK, "", "not strict for all links")
	}
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-arptables"} {
		v, err := read("net/bridge/" + name)
		if err == nil && v == "1" {
			add(name, Note, "", "on: frames on bridges pass the routed packets' filters, too; clawvm works with it")
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			all = append(all, broken(name, Unknown, err))
		}
	}
	count, cerr := readNumber(read, "net/netfilter/nf_conntrack_count")
	most, merr := readNumber(read, "net/netfilter/nf_conntrack_max")
	if err := errors.Join(cerr, merr); err == nil && most > 0 {
		if used := 100 * count / most; used >= conntrackFull {
			add("conntrack", Warning, fmt.Sprintf("sysctl net.netfilter.nf_conntrack_max=%d", 4*most), "%d of %d connections are tracked; above, new ones are dropped", count, most)
		} else {
			add("conntrack", OK, "", "%d of %d connections", count, most)
		}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) { // no module, no table yet
		all = append(all, broken("conntrack", Unknown, err))
	}
	switch n, err := readNumber(read, "user/max_user_namespaces"); {
	case errors.Is(err, fs.ErrNotExist):
		add("user-namespaces", Warning, "images can be built elsewhere and imported: clawvm image import", "this kernel has none, and `clawvm image build` needs them")
	case err != nil:
		all = append(all, broken("user-namespaces", Unknown, err))
	case n == 0:
		add("user-namespaces", Warning, "sysctl user.max_user_namespaces=15000", "user.max_user_namespaces is 0, and `clawvm image build` needs them")
	default:
		add("user-namespaces", OK, "", "allowed")
	}
	return all
}

func readNumber(read func(string) (string, error), path string) (int64, error) {
	v, err := read(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(v, 10, 64)
}

// The controllers of cgroup v2 that VMs' limits need.
var controllers = []string{"memory", "cpu", "pids"}

func checkCgroup(context.Context, *look) []Finding {
	const root = "/sys/fs/cgroup"
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return []Finding{broken("cgroup", Unknown, fmt.Errorf("cannot look at %s: %w", root, err))}
	}
	list := ""
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		b, err := os.ReadFile(root + "/cgroup.controllers")
		if err != nil {
			return []Finding{broken("cgroup", Unknown, err)}
		}
		list = string(b)
	}
	return cgroup(st.Type == unix.CGROUP2_SUPER_MAGIC, list)
}

// cgroup judges the controllers that the root of cgroup v2 offers.
func cgroup(v2 bool, list string) []Finding {
	const do = "boot with systemd.unified_cgroup_hierarchy=1 and without cgroup_disable="
	if !v2 {
		return found("cgroup", Warning, do, "/sys/fs/cgroup is not cgroup v2: VMs have no limits")
	}
	var missing []string
	for _, c := range controllers {
		if !strings.Contains(" "+strings.TrimSpace(list)+" ", " "+c+" ") {
			missing = append(missing, c)
		}
	}
	if len(missing) > 0 {
		return found("cgroup", Warning, do, "cgroup v2 without %s: such limits do not apply", strings.Join(missing, ", "))
	}
	return found("cgroup", OK, "", "v2 with %s", strings.Join(controllers, ", "))
}
