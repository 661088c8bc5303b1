package vmm

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
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
	if err := TryKVM(); err != nil {
		t.Error(err)
	}
}

func TestTryKVMRefused(t *testing.T) {
	if err := tryKVM(filepath.Join(t.TempDir(), "kvm")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := tryKVM("/dev/null"); err == nil || !strings.Contains(err.Error(), "cannot make a VM in /dev/null") {
		t.Error(err)
	}
}
