package qemu

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/clawvm/clawvm/vmm"
)

// setup is what the command line depends on beside the machine.
type setup struct {
	kvm      bool   // hardware runs the guest, else it is emulated
	dataDir  string // QEMU's own files, for one that isn't installed where it was built for; "" for its default
	firmware string // qboot.rom, which starts sooner than the default SeaBIOS; "" where it isn't there

	// Numbers of inherited descriptors; 0 for one that isn't there.
	qmp, agent, tap int
}

const mib = 1 << 20

// emulatedCPU is the processor that QEMU translates: an old one, since code that finds newer vector instructions
// uses them, and they are slow when they are translated. It has all that x86-64-v2 asks for. RDRAND seeds the
// guest's random numbers at once.
const emulatedCPU = "Nehalem,+rdrand"

// args is QEMU's command line for a machine.
func args(m *vmm.Machine, s setup) []string {
	var a []string
	add := func(option string, values ...string) {
		a = append(a, option)
		if len(values) > 0 {
			a = append(a, strings.Join(values, ","))
		}
	}
	memory := strconv.FormatInt(m.Memory/mib, 10) + "M"
	vcpus := m.VCPUs

	add("-name", escape(m.Name))
	add("-nodefaults")
	add("-no-user-config")
	add("-display", "none")
	// The uid is set before QEMU starts, so that it need not change it, nor start programs.
	add("-sandbox", "on", "obsolete=deny", "elevateprivileges=deny", "spawn=deny", "resourcecontrol=deny")
	// A guest's reset ends QEMU: a machine is used once, and its virtiofsd with it.
	add("-no-reboot")

	// q35 without what no guest of ours uses. Not the machine type microvm: emulated, half of its starts hang.
	add("-machine", "q35", "memory-backend=memory", "sata=off", "usb=off", "smbus=off", "hpet=off", "vmport=off", "i8042=off", "graphics=off")
	switch {
	case s.kvm:
		add("-accel", "kvm")
		add("-cpu", "host")
	case m.InstructionClock:
		add("-accel", "tcg", "thread=single")
		add("-icount", "shift=0", "sleep=on")
		add("-cpu", emulatedCPU)
		vcpus = 1
	default:
		add("-accel", "tcg", "thread=multi")
		add("-cpu", emulatedCPU)
	}
	add("-smp", strconv.Itoa(vcpus))
	add("-m", memory)
	// Shared, since virtiofsd reads and writes the guest's memory.
	add("-object", "memory-backend-memfd", "id=memory", "size="+memory, "share=on")

	if s.dataDir != "" {
		add("-L", s.dataDir)
	}
	if s.firmware != "" {
		add("-bios", s.firmware)
	}
	add("-kernel", m.Kernel)
	add("-initrd", m.Initramfs)
	add("-append", m.Cmdline)

	add("-chardev", "socket", "id=qmp", "fd="+strconv.Itoa(s.qmp))
	add("-mon", "chardev=qmp", "mode=control")

	add("-device", "pvpanic-pci")
	add("-object", "rng-builtin", "id=random")
	add("-device", virtio("virtio-rng-pci"), "rng=random")
	add("-device", virtio("virtio-balloon-pci"), "free-page-reporting=on", "deflate-on-oom=on")

	add("-device", virtio("virtio-serial-pci"), "max_ports=4")
	if m.Console != nil {
		add("-chardev", "stdio", "id=console", "signal=off")
	} else {
		add("-chardev", "null", "id=console")
	}
	add("-device", "virtconsole", "chardev=console", "nr=0")
	if s.agent != 0 {
		add("-chardev", "socket", "id=agent", "fd="+strconv.Itoa(s.agent))
		add("-device", "virtserialport", "chardev=agent", "name="+vmm.AgentPortName, "nr=1")
	}

	for i, d := range m.Disks {
		node := fmt.Sprintf("disk%d", i)
		add("-blockdev", blockdev(node, d))
		// A full or broken host disk is an error in the guest; the default would stop the machine.
		add("-device", virtio("virtio-blk-pci"), "drive="+node, "serial="+escape(d.ID), "werror=report", "rerror=report")
	}
	for i, share := range m.Shares {
		id := fmt.Sprintf("share%d", i)
		add("-chardev", "socket", "id="+id, "path="+escape(share.Socket))
		// A queue as long as virtiofsd allows: reading a tree of small files is thousands of requests.
		add("-device", "vhost-user-fs-pci", "chardev="+id, "tag="+escape(share.Tag), "queue-size=1024")
	}
	if s.tap != 0 {
		add("-netdev", "tap", "id=net", "fd="+strconv.Itoa(s.tap))
		// Without its option ROM, which is for booting from the network and may not be installed.
		add("-device", virtio("virtio-net-pci"), "netdev=net", "mac="+m.MAC.String(), "romfile=")
	}
	return a
}

// virtio is a virtio device without the interface that was before virtio 1.0.
func virtio(device string) string { return device + ",disable-legacy=on" }

// escape doubles commas, which end a value.
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }

// blockdev describes a raw image: never probed for another format, which a guest could write into it.
func blockdev(node string, d vmm.Disk) string {
	type file struct {
		Driver   string `json:"driver"`
		Filename string `json:"filename"`
		Discard  string `json:"discard"`
	}
	b, err := json.Marshal(struct {
		Driver   string `json:"driver"`
		NodeName string `json:"node-name"`
		ReadOnly bool   `json:"read-only"`
		Discard  string `json:"discard"`
		File     file   `json:"file"`
	}{"raw", node, d.ReadOnly, "unmap", file{"file", d.Path, "unmap"}})
	if err != nil {
		return err.Error() // strings and a bool always marshal
	}
	return string(b)
}
