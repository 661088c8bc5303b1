package vmm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	const ch, q = "/usr/bin/cloud-hypervisor", "/usr/bin/qemu-system-x86_64"
	both := Facts{Flags: true, CloudHypervisor: ch, QEMU: q}
	for _, c := range []struct {
		name, declared string
		facts          Facts
		want, why, err string
	}{
		{"both", "", both, CloudHypervisor, "it is installed, and KVM works", ""},
		{"both, said", "auto", both, CloudHypervisor, "it is installed, and KVM works", ""},
		{"qemu only", "auto", Facts{Flags: true, QEMU: q}, QEMU, "with KVM, since cloud-hypervisor is not installed", ""},
		{"kvm without flags", "auto", Facts{CloudHypervisor: ch, QEMU: q}, QEMU, "emulating, since the CPU shows neither vmx nor svm", ""},
		{"no device", "auto", Facts{Flags: true, NoKVM: "/dev/kvm isn't there", CloudHypervisor: ch, QEMU: q}, QEMU, "emulating, since /dev/kvm isn't there", ""},
		{"broken override", "auto", Facts{Flags: true, QEMU: q, NoCloudHypervisor: "X is set, but no"}, QEMU, "with KVM, since X is set, but no", ""},
		{"nothing", "auto", Facts{}, "", "", "apt-get install qemu-system-x86"},
		{"hardware, nothing", "auto", Facts{Flags: true}, "", "", "cannot choose a VMM: cloud-hypervisor is not installed, nor is qemu-system-x86_64;"},
		{"cloud-hypervisor that can't emulate", "auto", Facts{CloudHypervisor: ch}, "", "", "the CPU shows neither vmx nor svm, so QEMU has to emulate"},
		{"explicit qemu", "qemu", both, QEMU, "as declared, with KVM", ""},
		{"explicit qemu, emulating", "qemu", Facts{QEMU: q}, QEMU, "as declared; emulating, since the CPU shows neither vmx nor svm", ""},
		{"explicit qemu, none", "qemu", Facts{Flags: true, CloudHypervisor: ch}, "", "", "cannot use qemu: qemu-system-x86_64 is not installed"},
		{"explicit cloud-hypervisor", "cloud-hypervisor", both, CloudHypervisor, "as declared", ""},
		{"explicit cloud-hypervisor, none", "cloud-hypervisor", Facts{Flags: true, QEMU: q}, "", "", "cannot use cloud-hypervisor: it is not installed; a static binary"},
		{"explicit cloud-hypervisor, no kvm", "cloud-hypervisor", Facts{CloudHypervisor: ch, QEMU: q}, "", "", "it needs KVM"},
		{"unknown", "xen", both, "", "", `cannot use VMM "xen"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			name, why, err := Choose(c.declared, c.facts)
			if name != c.want || why != c.why || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %q, %q, %v", name, why, err)
			}
		})
	}
}

func TestHasFlags(t *testing.T) {
	for cpuinfo, want := range map[string]bool{
		"flags\t\t: fpu vmx\n":        true,
		"flags: svm":                  true,
		"flags\t\t: fpu vmxish":       false,
		"model name: vmx\nflags: fpu": false,
		"":                            false,
		"vmx flags\t: vmx":            false,
	} {
		if hasFlags(cpuinfo) != want {
			t.Errorf("%q: not %v", cpuinfo, want)
		}
	}
}

func TestLookKVM(t *testing.T) {
	dir := t.TempDir()
	if no, group := lookKVM(filepath.Join(dir, "kvm")); !strings.HasSuffix(no, "kvm isn't there") || group != -1 {
		t.Errorf("%q, %d", no, group)
	}
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if no, _ := lookKVM(path); !strings.Contains(no, "is not KVM") {
		t.Errorf("%q", no)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if no, _ := lookKVM(path); os.Getuid() == 0 && !strings.Contains(no, "only root may open") {
		t.Errorf("%q", no)
	}
}

func TestLookHost(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"qemu-system-x86_64", "cloud-hypervisor", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	t.Setenv(CloudHypervisorEnv, "")
	f := LookHost()
	if f.QEMU != filepath.Join(dir, "qemu-system-x86_64") || f.CloudHypervisor != filepath.Join(dir, "cloud-hypervisor") {
		t.Errorf("%+v", f)
	}
	t.Setenv(CloudHypervisorEnv, filepath.Join(dir, "other"))
	if f := LookHost(); f.CloudHypervisor != filepath.Join(dir, "other") {
		t.Errorf("%+v", f)
	}
	// One that is named but not there isn't replaced by another.
	t.Setenv(CloudHypervisorEnv, filepath.Join(dir, "missing"))
	if f := LookHost(); f.CloudHypervisor != "" || !strings.Contains(f.NoCloudHypervisor, "no such file") {
		t.Errorf("%+v", f)
	}
}

func TestTail(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	tail := NewTail(&Machine{Log: w})
	for range 3 {
		if n, err := tail.Write(make([]byte, tailSize)); n != tailSize || err != nil {
			t.Fatal(n, err) // a log that breaks is no reason to stop
		}
	}
	if _, err := tail.Write([]byte("the end \n")); err != nil {
		t.Fatal(err)
	}
	if got := tail.String(); !strings.HasSuffix(got, "the end") || len(got) > tailSize {
		t.Errorf("%d bytes: %q", len(got), got[max(0, len(got)-20):])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}
