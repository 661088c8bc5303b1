package gate

import (
	"fmt"

	"github.com/elastic/go-seccomp-bpf"
)

// calls are the system calls that a gate makes: the Go runtime's own, files in the
// log directory, and sockets. What is missing is refused with EPERM: a program
// can't be run, a process not be looked into, nothing be mounted, no namespace be
// made or entered, no kernel interface of another kind be opened.
var calls = []string{
	// The runtime: memory, threads, time, signals, randomness.
	"brk", "mmap", "munmap", "mprotect", "madvise", "mremap", "mincore",
	"clone", "exit", "exit_group", "futex", "gettid", "getpid", "tgkill", "sched_yield", "sched_getaffinity",
	"set_robust_list", "rseq", "arch_prctl", "prctl", "prlimit64", "getrlimit", "restart_syscall",
	"nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres", "gettimeofday", "time",
	"timer_create", "timer_settime", "timer_delete", "setitimer",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "getrandom", "uname",
	"getuid", "geteuid", "getgid", "getegid",
	// Files: the logs, and what is open already.
	"read", "write", "pread64", "pwrite64", "readv", "writev", "close", "lseek", "fcntl", "dup", "dup3",
	"open", "openat", "openat2", "stat", "lstat", "fstat", "newfstatat", "statx", "getdents64", "readlink", "readlinkat", "getcwd",
	"mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "fsync", "fdatasync", "ftruncate",
	"fchmod", "fchmodat", "chmod", "flock", "pipe2", "splice", "sendfile", "copy_file_range", "utimensat",
	// Sockets, and waiting for them.
	"socket", "socketpair", "connect", "bind", "listen", "accept", "accept4", "shutdown",
	"getsockname", "getpeername", "setsockopt", "getsockopt",
	"sendto", "recvfrom", "sendmsg", "recvmsg", "sendmmsg", "recvmmsg",
	"epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2", "poll", "ppoll", "eventfd2",
}

// restrictCalls refuses all other system calls, in every thread, for good. It
// needs no_new_privs. A call of another architecture is refused like any other:
// the policy's default is to refuse.
func restrictCalls() error {
	filter := seccomp.Filter{
		NoNewPrivs: true,
		Flag:       seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionErrno,
			Syscalls:      []seccomp.SyscallGroup{{Action: seccomp.ActionAllow, Names: calls}},
		},
	}
	if err := seccomp.LoadFilter(filter); err != nil {
		return fmt.Errorf("cannot restrict the gate's system calls: %w", err)
	}
	return nil
}
