package cloudhypervisor

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/clawvm/clawvm/vmm"
)

// guestCID is the guest's address on its vsock. It is the same in every machine: with hybrid vsock the host's end is a
// socket in the machine's own directory, and no number is shared.
const guestCID = 3

const (
	// netQueue and shareQueue are cloud-hypervisor's own defaults, written down because a queue's size is
	// part of what was measured.
	netQueue   = 256
	shareQueue = 1024
)

// vmConfig is vm.create's body, as far as it is used: VmConfig of cloud-hypervisor v53's vmm/src/vm_config.rs. The server
// ignores unknown fields, so that a test compares each with what a real one understood.
type vmConfig struct {
	CPUs    cpusConfig    `json:"cpus"`
	Memory  memoryConfig  `json:"memory"`
	Payload payloadConfig `json:"payload"`
	Disks   []diskConfig  `json:"disks,omitempty"`
	Net     []netConfig   `json:"net,omitempty"`
	FS      []fsConfig    `json:"fs,omitempty"`
	Vsock   *vsockConfig  `json:"vsock,omitempty"`
	RNG     rngConfig     `json:"rng"`
	Balloon balloonConfig `json:"balloon"`
	Serial  consoleConfig `json:"serial"`
	Console consoleConfig `json:"console"`
	Pvpanic bool          `json:"pvpanic"`

	LandlockEnable bool           `json:"landlock_enable"`
	LandlockRules  []landlockRule `json:"landlock_rules,omitempty"`
}

type cpusConfig struct {
	BootVCPUs int  `json:"boot_vcpus"`
	MaxVCPUs  int  `json:"max_vcpus"`
	Nested    bool `json:"nested"` // on by default there
}

type memoryConfig struct {
	Size   int64 `json:"size"` // bytes
	Shared bool  `json:"shared"`
}

type payloadConfig struct {
	Kernel    string `json:"kernel"`
	Initramfs string `json:"initramfs,omitempty"`
	Cmdline   string `json:"cmdline,omitempty"`
}

type diskConfig struct {
	ID        string `json:"id"`
	Path      string `json:"path"`
	ReadOnly  bool   `json:"readonly"`
	ImageType string `json:"image_type"`
	Serial    string `json:"serial"`
}

type netConfig struct {
	ID        string `json:"id"`
	TAP       string `json:"tap"`
	MAC       string `json:"mac"`
	NumQueues int    `json:"num_queues"`
	QueueSize int    `json:"queue_size"`
}

type fsConfig struct {
	ID        string `json:"id"`
	Tag       string `json:"tag"`
	Socket    string `json:"socket"`
	NumQueues int    `json:"num_queues"`
	QueueSize int    `json:"queue_size"`
}

type vsockConfig struct {
	ID     string `json:"id"`
	CID    int    `json:"cid"`
	Socket string `json:"socket"`
}

type rngConfig struct {
	Source string `json:"src"`
}

type balloonConfig struct {
	Size              int64 `json:"size"`
	DeflateOnOOM      bool  `json:"deflate_on_oom"`
	FreePageReporting bool  `json:"free_page_reporting"`
}

type consoleConfig struct {
	Mode string `json:"mode"` // "Off", "Null", "Tty"
}

type landlockRule struct {
	Path   string `json:"path"`
	Access string `json:"access"` // "r", "rw"
}

// configure writes m in cloud-hypervisor's words. With landlock the process opens nothing but what the configuration names.
func configure(m *vmm.Machine, landlock bool) *vmConfig {
	c := &vmConfig{
		CPUs: cpusConfig{BootVCPUs: m.VCPUs, MaxVCPUs: m.VCPUs},
		// virtiofsd reads and writes the guest's memory, so it has to be shared with it; without one it stays the process's own.
		Memory:  memoryConfig{Size: m.Memory, Shared: len(m.Shares) > 0},
		Payload: payloadConfig{Kernel: m.Kernel, Initramfs: m.Initramfs, Cmdline: m.Cmdline},
		RNG:     rngConfig{Source: "/dev/urandom"},
		// Nothing is taken from the guest; it gives back what it has freed.
		Balloon: balloonConfig{DeflateOnOOM: true, FreePageReporting: true},
		Serial:  consoleConfig{Mode: "Off"},
		Console: consoleConfig{Mode: "Null"},
		Pvpanic: true,
	}
	if m.Console != nil {
		// "Tty" is the process's standard output, a terminal or not.
		c.Console.Mode = "Tty"
	}
	for _, d := range m.Disks {
		// Without a type the first sector couldn't be written, lest a raw image become another kind by what it holds.
		c.Disks = append(c.Disks, diskConfig{ID: "disk-" + d.ID, Path: d.Path, ReadOnly: d.ReadOnly, ImageType: "Raw", Serial: d.ID})
	}
	if m.TAP != "" {
		c.Net = []netConfig{{ID: "net", TAP: m.TAP, MAC: m.MAC.String(), NumQueues: 2, QueueSize: netQueue}}
	}
	for _, s := range m.Shares {
		c.FS = append(c.FS, fsConfig{ID: "share-" + s.Tag, Tag: s.Tag, Socket: s.Socket, NumQueues: 1, QueueSize: shareQueue})
	}
	if m.Agent != nil {
		c.Vsock = &vsockConfig{ID: "agent", CID: guestCID, Socket: vsockPath(m)}
	}
	if landlock {
		c.LandlockEnable = true
		if m.TAP != "" {
			// Its own rules leave out where it reads the TAP's flags.
			c.LandlockRules = []landlockRule{{Path: "/sys/class/net/" + m.TAP, Access: "r"}}
		}
	}
	return c
}

// check refuses what cloud-hypervisor would refuse in words that help less, or misunderstand.
func check(m *vmm.Machine) error {
	if m.VCPUs < 1 || m.Memory <= 0 || m.Kernel == "" {
		return errors.New("cannot start cloud-hypervisor: the machine needs a CPU, memory and a kernel")
	}
	if m.TAP != "" && len(m.MAC) == 0 {
		return fmt.Errorf("cannot start cloud-hypervisor: its network card %s has no MAC address", m.TAP)
	}
	for _, d := range m.Disks {
		if d.ID == "" || len(d.ID) > 20 {
			return fmt.Errorf("cannot start cloud-hypervisor: the disk %s is called %q, and a disk's serial has 1 to 20 bytes", d.Path, d.ID)
		}
	}
	return checkSocketPath(apiPath(m))
}

// stateDir is the directory that the process may write in, below the machine's, which it may not.
func stateDir(m *vmm.Machine) string { return filepath.Join(m.Dir, "ch") }

// vsockPath is where the process listens for the host's connections to the guest; the guest's arrive beside it.
func vsockPath(m *vmm.Machine) string { return filepath.Join(stateDir(m), "vsock") }

// agentPath is where a guest's connection to vmm.AgentPort arrives.
func agentPath(m *vmm.Machine) string { return fmt.Sprintf("%s_%d", vsockPath(m), vmm.AgentPort) }

// apiPath is the API's socket, which only root may connect to.
func apiPath(m *vmm.Machine) string { return filepath.Join(m.Dir, "ch-api.sock") }
