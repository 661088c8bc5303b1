package boot

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Actions of a seccomp filter, from linux/seccomp.h.
const (
	seccompAllow = 0x7fff0000
	seccompErrno = 0x00050000
)

// Offsets in struct seccomp_data. Arguments are 64 bits wide, their low half first on the machines that we run on.
const (
	dataNumber = 0
	dataArch   = 4
	dataArg0   = 16
)

// allowedFamilies are the address families that a workload may make sockets of. What is missing reaches past the network's rules
// (AF_VSOCK: the host's agent port) or is kernel code that no workload needs (AF_ALG and dozens more). Without AF_NETLINK node's
// os.networkInterfaces() throws.
var allowedFamilies = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK}

// refusedCalls are the system calls that a workload can do without and that have led out of sandboxes most often. io_uring opens
// sockets without the socket call and so past this filter. clone3 passes its flags in memory, where a filter can't see them: C
// libraries fall back to clone on ENOSYS.
var refusedCalls = []uint32{
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_CLONE3,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL,
	unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_SETNS, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT,
	unix.SYS_FSOPEN, unix.SYS_FSMOUNT, unix.SYS_FSCONFIG, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT,
	unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_QUOTACTL, unix.SYS_ACCT,
}

// filter builds the workload's seccomp filter for a machine: its audit architecture, and the bit of call numbers that marks
// another ABI of the same architecture (x32 on amd64; 0 for none). Calls of a foreign architecture (int 0x80) number
// differently, so they would pass any other check: they are refused altogether.
func filter(arch, foreignBit uint32) ([]bpf.RawInstruction, error) {
	ret := func(errno unix.Errno) bpf.Instruction { return bpf.RetConstant{Val: seccompErrno | uint32(errno)} }
	prog := []bpf.Instruction{
		bpf.LoadAbsolute{Off: dataArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: arch, SkipTrue: 1},
		ret(unix.ENOSYS),
		bpf.LoadAbsolute{Off: dataNumber, Size: 4},
	}
	if foreignBit != 0 {
		prog = append(prog,
			bpf.JumpIf{Cond: bpf.JumpLessThan, Val: foreignBit, SkipTrue: 1},
			ret(unix.ENOSYS))
	}
	for _, nr := range refusedCalls {
		errno := unix.EPERM
		if nr == unix.SYS_CLONE3 || nr == unix.SYS_IO_URING_SETUP {
			errno = unix.ENOSYS // what callers take as "use the older way"
		}
		prog = append(prog,
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nr, SkipTrue: 1},
			ret(errno))
	}
	// socket and socketpair: the family is the first argument.
	families := []bpf.Instruction{bpf.LoadAbsolute{Off: dataArg0, Size: 4}}
	for i, f := range allowedFamilies {
		families = append(families, bpf.JumpIf{Cond: bpf.JumpEqual, Val: f, SkipTrue: uint8(len(allowedFamilies) - i)})
	}
	families = append(families, ret(unix.EAFNOSUPPORT), bpf.RetConstant{Val: seccompAllow})
	prog = append(prog,
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_SOCKET, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_SOCKETPAIR, SkipTrue: uint8(len(families))})
	prog = append(prog, families...)
	// clone and unshare: the flags are the first argument; no user namespace, in which all capabilities would be back.
	prog = append(prog,
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_CLONE, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_UNSHARE, SkipTrue: 3},
		bpf.LoadAbsolute{Off: dataArg0, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: unix.CLONE_NEWUSER, SkipTrue: 1},
		ret(unix.EPERM),
		bpf.RetConstant{Val: seccompAllow})
	return bpf.Assemble(prog)
}

// applyFilter puts the filter on the calling thread. It needs no_new_privs.
func applyFilter() error {
	m, ok := machines[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("no seccomp filter is known for %s", runtime.GOARCH)
	}
	raw, err := filter(m.arch, m.foreignBit)
	if err != nil {
		return fmt.Errorf("cannot build the seccomp filter: %w", err)
	}
	insns := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		insns[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(insns)), Filter: &insns[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return fmt.Errorf("cannot set the seccomp filter: %w", err)
	}
	return nil
}

type machine struct{ arch, foreignBit uint32 }

var machines = map[string]machine{
	"amd64": {unix.AUDIT_ARCH_X86_64, 0x40000000},
	"arm64": {unix.AUDIT_ARCH_AARCH64, 0},
}
