package vmm

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// The kernel's structs have these sizes; one that is wrong would write over what lies beside it.
func TestKVMStructs(t *testing.T) {
	for _, s := range []struct {
		name       string
		have, want uintptr
	}{
		{"kvm_regs", unsafe.Sizeof(kvmRegs{}), 144},
		{"kvm_segment", unsafe.Sizeof(kvmSegment{}), 24},
		{"kvm_sregs", unsafe.Sizeof(kvmSregs{}), 312},
		{"kvm_userspace_memory_region", unsafe.Sizeof(kvmRegion{}), 32},
		{"exit_reason", unsafe.Offsetof(kvmRunState{}.exitReason), 8},
		{"io", unsafe.Offsetof(kvmRunState{}.ioDirection), 32},
		{"io.data_offset", unsafe.Offsetof(kvmRunState{}.ioData), 40},
	} {
		if s.have != s.want {
			t.Errorf("%s: %d, want %d", s.name, s.have, s.want)
		}
	}
}

// Where the processor can, the guest runs; TestTables' server is such a one.
func TestTryKVM(t *testing.T) {
	f := LookHost()
	if !f.Hardware() {
		t.Skip("no KVM that a stock kernel boots in: " + f.noHardware())
	}
	if err := TryKVM(t.Context()); err != nil {
		t.Error(err)
	}
}

// A guest that runs for ever is ended, and whenever the time is over, nothing of the guest is touched after it.
func TestTryKVMEnds(t *testing.T) {
	vm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no KVM: %v", err)
	}
	if err := vm.Close(); err != nil {
		t.Fatal(err)
	}
	was := trialProgram
	defer func() { trialProgram = was }()
	trialProgram = []byte{0xeb, 0xfe} // jmp to itself
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := TryKVM(ctx); err == nil || !strings.Contains(err.Error(), "does not end") {
		t.Error(err)
	}
	trialProgram = []byte{0xf4} // hlt, without a word
	if err := TryKVM(t.Context()); err == nil || !strings.Contains(err.Error(), "exit reason 5") {
		t.Error(err)
	}
	trialProgram = was
	for i := range 50 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*20*time.Microsecond)
		if err := TryKVM(ctx); err != nil && !strings.Contains(err.Error(), "does not end") {
			t.Error(err)
		}
		cancel()
	}
}

func TestTryKVMRefused(t *testing.T) {
	if err := tryKVM(t.Context(), filepath.Join(t.TempDir(), "kvm")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := tryKVM(t.Context(), "/dev/null"); err == nil || !strings.Contains(err.Error(), "cannot make a VM in /dev/null") {
		t.Error(err)
	}
}
