package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/storage"
	"github.com/clawvm/clawvm/vmm/cloudhypervisor"
	"github.com/clawvm/clawvm/vmm/qemu"
)

// machine is what the numbers depend on.
type machine struct {
	CPU      string            `json:"cpu"`
	CPUs     int               `json:"cpus"`
	Memory   int64             `json:"memory"` // bytes
	System   string            `json:"system"`
	Kernel   string            `json:"kernel"`
	Guest    string            `json:"guest"` // the guests' kernel
	KVM      string            `json:"kvm"`
	Load     string            `json:"load"` // when the bench began: 1, 5, 15 minutes
	Versions map[string]string `json:"versions"`
}

func (w *world) machine(ctx context.Context) machine {
	m := machine{CPUs: runtime.NumCPU(), CPU: field("/proc/cpuinfo", "model name", ":"), System: strings.Trim(field("/etc/os-release", "PRETTY_NAME", "="), `"`), Guest: w.kernel.Release, Versions: map[string]string{"go": runtime.Version()}}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		m.Memory = int64(info.Totalram) * int64(info.Unit)
	}
	m.KVM = "works"
	if !w.facts.Hardware() {
		m.KVM = "none: the guests are emulated"
	}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load = strings.Join(strings.Fields(string(load))[:3], " ")
	}
	// What is not installed has no version.
	if v, err := qemu.New(w.facts.QEMU).Version(ctx); err == nil {
		m.Versions["qemu"] = v
	}
	if w.facts.CloudHypervisor != "" {
		if v, err := cloudhypervisor.New(w.facts.CloudHypervisor).Version(ctx); err == nil {
			m.Versions["cloud-hypervisor"] = v
		}
	}
	if v, err := storage.FindVirtiofsd(ctx); err == nil {
		m.Versions["virtiofsd"] = v.Version
	}
	if out, err := exec.CommandContext(ctx, "unbound", "-V").Output(); err == nil {
		m.Versions["unbound"] = strings.TrimPrefix(strings.SplitN(string(out), "\n", 2)[0], "Version ")
	}
	return m
}

// field is the first value of a key in a file of lines.
func field(file, key, separator string) string {
	raw, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(raw)) {
		if k, v, ok := strings.Cut(line, separator); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// metric matches the pairs of value and unit in a line of Go's benchmark format.
var metric = regexp.MustCompile(`([0-9.e+-]+) (\S+)`)

// readBenchmark reads one benchmark's metrics from the output of go test -bench.
func readBenchmark(file, name string) (map[string]float64, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		begin, rest, ok := strings.Cut(lines.Text(), "\t")
		if begin = strings.TrimSpace(begin); !ok || begin != name && !strings.HasPrefix(begin, name+"-") {
			continue
		}
		metrics := map[string]float64{}
		for _, m := range metric.FindAllStringSubmatch(rest, -1) {
			v, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				return nil, err
			}
			metrics[m[2]] = v
		}
		return metrics, nil
	}
	return nil, fmt.Errorf("%s has no result of %s: it was skipped (unbound and dnsperf are needed) or failed", file, name)
}
