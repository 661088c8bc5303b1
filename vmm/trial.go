package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// More of the kernel's include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h.
const (
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmSetTSSAddr          = 0xae47
	kvmRun                 = 0xae80
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmExitIO    = 2
	kvmExitHalt  = 5
	kvmExitIntr  = 10
	kvmExitIOOut = 1
)

// Where the trial guest's code is loaded, the port that it writes to, and what it writes there.
const (
	trialCode = 0x1000
	trialPort = 0x3f8
	trialByte = 'c'
	// trialTSS is where VMX keeps what it needs for real mode: below the top of 4 GiB, where no memory is, as all VMMs choose.
	trialTSS = 0xfffbd000
)

// trialProgram is the guest: it writes one byte to a port, and halts.
var trialProgram = []byte{
	0xba, trialPort & 0xff, trialPort >> 8, // mov dx, 0x3f8
	0xb0, trialByte, // mov al, 'c'
	0xee, // out dx, al
	0xf4, // hlt
}

// kvmRegs, kvmSegment, kvmSregs, kvmRegion and kvmRunState are the kernel's structs.
type kvmRegs struct {
	gpr         [16]uint64 // rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15
	rip, rflags uint64
}

type kvmSegment struct {
	base                           uint64
	limit                          uint32
	selector                       uint16
	typ, present, dpl, db, s, l, g uint8
	avl, unusable, padding         uint8
}

type kvmSregs struct {
	cs   kvmSegment
	rest [312 - 24]byte
}

type kvmRegion struct {
	slot, flags uint32
	guest       uint64
	size        uint64
	user        uint64
}

type kvmRunState struct {
	requestInterrupt, immediateExit uint8
	_                               [6]uint8
	exitReason                      uint32
	readyForInterrupt, ifFlag       uint8
	_                               uint16
	cr8, apicBase                   uint64
	ioDirection, ioSize             uint8 // of the union that follows, its part for KVM_EXIT_IO
	ioPort                          uint16
	ioCount                         uint32
	ioData                          uint64 // where in the mapping the bytes are
}

// TryKVM runs a guest of four instructions in /dev/kvm: real mode, as every stock kernel begins. There are kernels in which the device
// opens and makes VMs, and no such guest runs. It takes a millisecond, ends with ctx at the latest, and nothing is left of it.
func TryKVM(ctx context.Context) error { return tryKVM(ctx, "/dev/kvm") }

func tryKVM(ctx context.Context, path string) (err error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	vm, err := unix.IoctlRetInt(fd, kvmCreateVM)
	if err != nil {
		return fmt.Errorf("cannot make a VM in %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, unix.Close(vm)) }()
	if err := unix.IoctlSetInt(vm, kvmSetTSSAddr, trialTSS); err != nil {
		return fmt.Errorf("cannot prepare a guest of %s: %w", path, err)
	}
	memory, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Munmap(memory)) }()
	copy(memory, trialProgram)
	region := kvmRegion{guest: trialCode, size: uint64(len(memory)), user: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if err := ioctl(vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return fmt.Errorf("cannot give memory to a guest of %s: %w", path, err)
	}
	return tryVCPU(ctx, fd, vm, path)
}

func tryVCPU(ctx context.Context, kvm, vm int, path string) (err error) {
	cpu, err := unix.IoctlRetInt(vm, kvmCreateVCPU)
	if err != nil {
		return fmt.Errorf("cannot make a virtual CPU in %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, unix.Close(cpu)) }()
	size, err := unix.IoctlRetInt(kvm, kvmGetVCPUMmapSize)
	if err != nil {
		return fmt.Errorf("cannot run a guest in %s: %w", path, err)
	}
	if size < int(unsafe.Sizeof(kvmRunState{})) {
		return fmt.Errorf("cannot run a guest in %s: its state has %d bytes only", path, size)
	}
	shared, err := unix.Mmap(cpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("cannot run a guest in %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(shared)) }()
	var sregs kvmSregs
	if err := ioctl(cpu, kvmGetSregs, unsafe.Pointer(&sregs)); err != nil {
		return fmt.Errorf("cannot read the registers of a guest of %s: %w", path, err)
	}
	sregs.cs.base, sregs.cs.selector = 0, 0
	if err := ioctl(cpu, kvmSetSregs, unsafe.Pointer(&sregs)); err != nil {
		return fmt.Errorf("cannot set the registers of a guest of %s: %w", path, err)
	}
	// The flags' bit 1 is always set.
	if err := ioctl(cpu, kvmSetRegs, unsafe.Pointer(&kvmRegs{rip: trialCode, rflags: 2})); err != nil {
		return fmt.Errorf("cannot set the registers of a guest of %s: %w", path, err)
	}
	return runTrial(ctx, cpu, shared, path)
}

// runTrial runs the guest until it halts, and looks that it wrote what it should.
func runTrial(ctx context.Context, cpu int, shared []byte, path string) error {
	run := (*kvmRunState)(unsafe.Pointer(&shared[0]))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	thread := unix.Gettid()
	// A guest that runs for ever is called back by a signal, which Go's runtime takes for one of its own. Not after the return, when
	// the memory is gone and the thread does something else.
	var mu sync.Mutex
	over := false
	stop := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		if over {
			return
		}
		run.immediateExit = 1
		if err := unix.Tgkill(os.Getpid(), thread, unix.SIGURG); err != nil {
			return // there is no such thread, which can't be: it is locked to this goroutine
		}
	})
	defer func() {
		stop()
		mu.Lock()
		defer mu.Unlock()
		over = true
	}()
	wrote := false
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(cpu), kvmRun, 0)
		switch {
		case errno == unix.EINTR || errno == 0 && run.exitReason == kvmExitIntr:
			if ctx.Err() != nil {
				return fmt.Errorf("a guest of four instructions does not end in %s", path)
			}
		case errno != 0:
			return fmt.Errorf("cannot run a guest in %s: %w", path, errno)
		case run.exitReason == kvmExitIO && run.ioDirection == kvmExitIOOut && run.ioPort == trialPort &&
			run.ioData < uint64(len(shared)) && shared[run.ioData] == trialByte:
			wrote = true
		case run.exitReason == kvmExitHalt && wrote:
			return nil
		default:
			return fmt.Errorf("a guest of four instructions does not run in %s (exit reason %d)", path, run.exitReason)
		}
	}
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
