package config

import (
	"net/netip"
	"time"
)

// What holds where nothing is declared.
const (
	DefaultVCPUs       = 4
	DefaultMemory      = 2 << 30
	DefaultCPUWeight   = 100  // the kernel's own default
	DefaultTasks       = 1024 // a VM with all vCPUs and shares that it may have takes some 400
	DefaultOverlay     = 4 << 30
	DefaultSecretMode  = 0o400
	DefaultStopSignal  = "TERM"
	DefaultStopTimeout = 30 * time.Second
	// Of health: docker's interval and retries, and a time that a busy program can keep.
	DefaultHealthInterval = 30 * time.Second
	DefaultHealthTimeout  = 5 * time.Second
	DefaultHealthRetries  = 3

	DefaultUser        = "nobody" // no image needs a user of its own for it, and it isn't root
	DefaultPort        = 18789    // the OpenClaw gateway's own default
	DefaultTokenSecret = "gateway-token"
	DefaultBridge      = "microbr"
	// DefaultUIDBase lies above what useradd, systemd's containers (to 1878982656) and subordinate ids use, and below 2³¹, above which some tools fail.
	DefaultUIDBase = 2000000000
)

// DefaultAddress is the bridge's address where none is declared.
func DefaultAddress() netip.Prefix { return netip.MustParsePrefix("192.168.83.1/24") }

// DefaultNameservers are the resolvers that a VM's queries go to where none are declared.
func DefaultNameservers() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("1.1.1.1")}
}

// Limits, each with its reason.
const (
	maxFile   = 1 << 20 // bytes; a declaration is some 1 KiB, its `config` may hold more
	maxTokens = 21_000  // the YAML parser takes quadratic time: 300 ms for so many, and egress.allow has two for each of 10,000 entries
	maxDepth  = 64      // levels; the deepest of our own are 5
	maxShown  = 50      // problems printed for one declaration

	minMemory         = 128 << 20  // Debian's cloud kernel and the init do not come up with less
	minMemoryOpenClaw = 1536 << 20 // with less the gateway is killed for want of memory at its first message
	maxMemory         = 16 << 40
	maxVCPUs          = 64
	maxCPUs           = 256    // processors' time: more than 64 vCPUs, and what serves them, can take
	maxCPUWeight      = 10_000 // the kernel's (cgroup v2, cpu.weight)
	minTasks          = 64     // a VM with one vCPU and no shares takes some 30
	maxTasks          = 1 << 20
	minOverhead       = 64 << 20 // the least that a VMM takes, and some of the disks' pages
	minDisk           = 16 << 20 // less than this leaves ext4 no room for its journal
	maxDisk           = 64 << 40
	diskBlock         = 4096 // an ext4 has blocks of this size
	mebibyte          = 1 << 20
	maxNameLength     = 32
	maxVolumeName     = 16 // an ext4 label has 16 bytes, a virtio serial 20
	maxMounts         = 20 // volumes and shares together: both VMMs have 32 PCI slots, some 10 are in use
	maxPorts          = 64
	maxSecrets        = 256
	maxSecretName     = 64
	maxCredential     = 255 // a file's name
	minGenerate       = 16  // bytes: 128 bits
	maxGenerate       = 1024
	maxTAP            = 15      // IFNAMSIZ less its zero
	maxHostname       = 64      // HOST_NAME_MAX
	maxLabel          = 63      // RFC 1123
	maxNameservers    = 4       // each query may wait for all of them, and a guest waits 5 s
	minUIDBase        = 100_000 // below are the host's own users
	maxTimeout        = time.Hour
	maxRetries        = 1000
)

func (vm *VM) fillDefaults() {
	vm.VCPUs, vm.Memory, vm.VMM = DefaultVCPUs, DefaultMemory, VMMAuto
	vm.Limits = Limits{CPUWeight: DefaultCPUWeight, Tasks: DefaultTasks}
	vm.Hostname, vm.Nameservers = vm.Name, DefaultNameservers()
	vm.Overlay = Overlay{Size: DefaultOverlay}
	vm.Egress.Mode, vm.Restart = EgressOpen, RestartOnFailure
}
