package host

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ForbidCores keeps the process, and those that it starts, from leaving a core
// dump, which would hold secrets or a guest's memory. The limit is one byte and
// not none: a dump that goes to a program (core_pattern with a |, as with
// systemd-coredump) is unlimited, but for this one value, which the kernel takes
// for no dump at all (fs/coredump.c).
func ForbidCores() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1}); err != nil {
		return fmt.Errorf("cannot forbid core dumps: %w", err)
	}
	return nil
}

// openFiles is how many files each process of a VM may have open, where its owner
// allows so many: cloud-hypervisor grows its table to 4096 at its start, a disk,
// a queue and a share take some each, and a forwarded connection takes two of
// the gate. virtiofsd sets its own.
const openFiles = 65536

// limitSupervisor sets what the supervisor, and by inheritance its children, are
// held to.
func limitSupervisor() error {
	// Secrets pass through it; no process without privileges may look into it.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid dumps of the supervisor: %w", err)
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("cannot read the limit of open files: %w", err)
	}
	files.Cur = min(openFiles, files.Max)
	// By package syscall: else it gives children the limit that this process had.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("cannot set the limit of open files: %w", err)
	}
	return nil
}

// Where the kernel is told whom to kill first when the host has no memory left
// (proc_pid_oom_score_adj(5)).
const (
	oomScoreFile = "/proc/self/oom_score_adj"
	// dispensable is how much sooner VMM and virtiofsd go than the supervisor,
	// in thousandths of the host's memory: before what the owner runs beside.
	dispensable = 500
	oomScoreMax = 1000
)

// asDispensable runs start while this process is one that the kernel kills
// sooner, since that is what a child inherits. To change the child's afterwards
// would miss what it forks by then, as virtiofsd does.
func asDispensable(start func() error) (err error) {
	text, err := os.ReadFile(oomScoreFile)
	if err != nil {
		return fmt.Errorf("cannot read the process's place among those to kill: %w", err)
	}
	own, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return fmt.Errorf("%s holds %q", oomScoreFile, text)
	}
	set := func(score int) error {
		return os.WriteFile(oomScoreFile, []byte(strconv.Itoa(score)), 0)
	}
	if err := set(min(own+dispensable, oomScoreMax)); err != nil {
		return fmt.Errorf("cannot let the VM be killed before its supervisor: %w", err)
	}
	serr := start()
	if err := set(own); err != nil {
		return fmt.Errorf("cannot set the supervisor's place among those to kill back: %w", err)
	}
	return serr
}
