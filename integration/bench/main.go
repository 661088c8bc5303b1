// Command bench measures what clawvm costs beside what it is made of: the time
// from command to ready beside the bare VMM's, the memory of its own processes,
// and the time of `clawvm ls`. The resolver beside unbound is measured by the
// benchmarks of package network/egress, whose results it takes in.
//
// It prints tables and writes one JSON file with the raw numbers and the facts
// of the machine. It works in namespaces of its own and leaves nothing behind.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/vmm"
)

// envInside says that the process is in namespaces of its own already.
const envInside = "CLAWVM_BENCH_INSIDE"

// options are the command line's.
type options struct {
	bin      string // directory of clawvm and clawvm-init; "": built here
	trivial  string // the trivial init; "": built here
	kernels  string // the directory with kernels/ in it
	out      string // directory of the result; "": none is written
	resolver string // output of network/egress's benchmarks
	commit   string
	pairs    int
	runs     int // of ls
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "", "`directory` of clawvm and clawvm-init (default: they are built)")
	flag.StringVar(&o.trivial, "trivial", "", "the trivial init, where it can't be built (`file`)")
	flag.StringVar(&o.kernels, "kernels", "/var/cache/clawvm-test/store", "store with a guest kernel (`directory`)")
	flag.StringVar(&o.out, "out", "", "`directory` for the JSON file with the results")
	flag.StringVar(&o.resolver, "resolver", "", "`file` with the output of network/egress's benchmarks")
	flag.StringVar(&o.commit, "commit", "", "which `version` of clawvm this is")
	flag.IntVar(&o.pairs, "pairs", 20, "pairs of starts")
	flag.IntVar(&o.runs, "runs", 20, "runs of ls")
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "bench: needs root: VMs need network devices and other users' processes")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if os.Getenv(envInside) == "" {
		// While there is a network.
		if err := pullKernel(ctx, o.kernels); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		os.Exit(again())
	}
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// pullKernel makes sure that there is a kernel for guests.
func pullKernel(ctx context.Context, store string) error {
	if _, err := kernel.Find("", store); err == nil {
		return nil
	}
	_, err := kernel.Pull(ctx, store, "", os.Stderr)
	return err
}

// again runs this program in network, mount and pid namespaces of its own, so
// that nothing that it starts outlives it. It returns the exit code.
func again() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envInside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: cannot make namespaces:", err)
		return 1
	}
	return 0
}

// results is the JSON file.
type results struct {
	Time    time.Time         `json:"time"`
	Commit  string            `json:"commit,omitempty"`
	Machine machine           `json:"machine"`
	Starts  map[string]starts `json:"starts"` // by VMM
	Memory  *memory           `json:"memory,omitempty"`
	Lists   []list            `json:"ls,omitempty"`
	// Resolver is the output of the benchmark: its metrics, by name.
	Resolver map[string]float64 `json:"resolver,omitempty"`
	// Skipped says what was not measured, and why.
	Skipped map[string]string `json:"skipped,omitempty"`
}

func run(ctx context.Context, o options) (err error) {
	w, err := newWorld(ctx, o)
	if err != nil {
		return err
	}
	r := results{
		Time: time.Now().UTC().Truncate(time.Second), Commit: o.commit, Machine: w.machine(ctx),
		Starts: map[string]starts{}, Skipped: map[string]string{},
	}
	for _, name := range []string{vmm.QEMU, vmm.CloudHypervisor} {
		if _, _, err := vmm.Choose(name, w.facts); err != nil {
			r.Skipped["starts with "+name] = err.Error()
			continue
		}
		if r.Starts[name], err = w.measureStarts(ctx, name, o.pairs); err != nil {
			return fmt.Errorf("starts with %s: %w", name, err)
		}
	}
	if len(r.Starts) > 0 {
		if r.Memory, err = w.measureMemory(ctx); err != nil {
			return fmt.Errorf("memory: %w", err)
		}
	}
	if r.Lists, err = w.measureLists(ctx, o.runs, len(r.Starts) > 0); err != nil {
		return fmt.Errorf("ls: %w", err)
	}
	if o.resolver == "" {
		r.Skipped["resolver"] = "no output of network/egress's benchmarks was given"
	} else if r.Resolver, err = readBenchmark(o.resolver, "BenchmarkBesideUnbound"); err != nil {
		r.Skipped["resolver"] = err.Error()
	}
	r.print(os.Stdout)
	if o.out == "" {
		return nil
	}
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	file := filepath.Join(o.out, r.Time.Format("2006-01-02T150405Z")+".json")
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	fmt.Println("\nraw numbers:", file)
	return os.WriteFile(file, append(raw, '\n'), 0o644)
}
