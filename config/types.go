// Package config is the declaration of a VM: its types, strict decoding from YAML or JSON, defaults and validation.
//
// It is pure but for reading the declaration itself: whatever needs the host (is the image there, is the secret's file
// private, is there memory for it) is looked at where it is used. All problems of a declaration are reported at once, each
// with its place, the field, what is wrong and what would be right (Problems).
package config

import (
	"net/netip"
	"slices"
	"time"
)

// VM is one declared microVM with its defaults filled in.
type VM struct {
	Name  string // the file's name without its ending
	File  string // where it was read from, for messages
	Image string // a name in the store, or "sha256:" and 64 hex digits

	VCPUs  int
	Memory Size
	Limits Limits
	VMM    string // VMMAuto, VMMCloudHypervisor or VMMQEMU
	Kernel string // empty: chosen; else an absolute path, or the name of a kernel in the store

	Address     netip.Addr // zero: allocated, and kept for the name
	MAC         string     // empty: derived from the address
	TAP         string     // empty: derived from the address
	Hostname    string     // the name unless it is declared
	NoGateway   bool       // the guest gets no route
	Nameservers []netip.Addr

	Overlay Overlay
	Volumes []Volume
	Shares  []Share
	Secrets []Secret // sorted by name
	Ports   []Port
	Egress  Egress
	Restart string // RestartNo, RestartOnFailure or RestartAlways

	// Health is nil where nobody looks after the workload was ready.
	Health *Health

	// At most one of the two is set. With neither, the guest comes up, answers its agent, and runs nothing.
	Run      *Run
	OpenClaw *OpenClaw

	places map[string]place // where each declared field stands; absent: a default
}

// What VM.VMM may say.
const (
	VMMAuto            = "auto"
	VMMCloudHypervisor = "cloud-hypervisor"
	VMMQEMU            = "qemu"
)

// What VM.Restart may say.
const (
	RestartNo        = "no"
	RestartOnFailure = "on-failure"
	RestartAlways    = "always"
)

// What Egress.Mode may say.
const (
	EgressOpen      = "open"      // everything but other VMs, the host and special addresses; logged
	EgressAllowlist = "allowlist" // what Egress.Allow says
	EgressNone      = "none"      // nothing leaves the VM
)

// Overlay is the writable layer over the image. Exactly one of the two is set.
type Overlay struct {
	Size  Size // a disk of this size, kept until the VM is removed
	Tmpfs Size // a tmpfs of at most this size, forgotten when the VM ends
}

// Volume is a disk that outlives the VM.
type Volume struct {
	Name  string
	Mount string // absolute path in the guest
	Size  Size
}

// Share is a host directory that the guest mounts over virtiofs.
type Share struct {
	Source   string // absolute path on the host
	Mount    string // absolute path in the guest
	ReadOnly bool
}

// Secret is a file under /run/secrets in the guest. Exactly one of File, Credential, Generate and Stdin is set.
type Secret struct {
	Name       string
	File       string // absolute path on the host
	Credential string // its ID among those that systemd gives to the VM's unit (LoadCredential=)
	Generate   int    // bytes of entropy
	Stdin      bool   // given by `clawvm secret set`
	Owner      string // a user of the image or a uid; empty: the workload's user
	Mode       uint32
}

// Port publishes a TCP port of the guest on the host.
type Port struct {
	HostAddress netip.Addr
	HostPort    uint16
	GuestPort   uint16
}

// Egress is what the VM may reach.
type Egress struct {
	Mode  string  // EgressOpen, EgressAllowlist or EgressNone
	Allow []Allow // of EgressAllowlist, bundles taken apart; with none, nothing is reached
	// AllowPrivate: private addresses, and those of CGNAT, are reached as public ones are.
	AllowPrivate bool
}

// Equal says whether both are the same.
func (e Egress) Equal(o Egress) bool {
	return e.Mode == o.Mode && e.AllowPrivate == o.AllowPrivate && slices.EqualFunc(e.Allow, o.Allow, Allow.Equal)
}

// Run is a workload in its general form.
type Run struct {
	Argv      []string
	Env       map[string]string
	User      string // a user of the image or a uid
	Cwd       string
	Ready     Ready
	Stop      Stop
	NoRestart []int // exit codes after which the workload is not started again
}

// Ready says when a workload is ready. At most one of TCP, HTTP and Exec is set; with none, it is ready once it is started.
type Ready struct {
	TCP     int // a port that accepts connections
	HTTP    *HTTPReady
	Exec    []string      // a command that ends with 0
	Timeout time.Duration // 0: the limit of `up`
}

// Health says how it is looked, after the workload was ready, whether it still does what it is for. At most one of TCP, HTTP and
// Exec is set; none only with the profile OpenClaw, which knows what to ask.
type Health struct {
	TCP      int
	HTTP     *HTTPReady
	Exec     []string
	Interval time.Duration // from one look to the next
	Timeout  time.Duration // of one look
	Retries  int           // so many failures in a row, and it is unhealthy
	Restart  bool          // an unhealthy workload is stopped, and VM.Restart decides what follows
}

// HTTPReady is a GET that answers with a status.
type HTTPReady struct {
	Port   int
	Path   string
	Status int
}

// Stop says how a workload is asked to end.
type Stop struct {
	Signal  string        // without SIG
	Timeout time.Duration // then it is killed
}

// OpenClaw is the profile of the OpenClaw gateway. What its fields call a file is the name of a secret.
type OpenClaw struct {
	Model     string // provider/model; empty: none
	Port      int
	Auth      OpenClawAuth
	Telegram  *OpenClawTelegram
	Providers map[string]OpenClawProvider
	Config    map[string]any // merged over the gateway's configuration, last; a null deletes
}

// OpenClawAuth is how clients of the gateway prove themselves.
type OpenClawAuth struct {
	Mode      string // AuthToken or AuthPassword
	TokenFile string // the secret that holds the token or the password
}

// What OpenClawAuth.Mode may say.
const (
	AuthToken    = "token"
	AuthPassword = "password"
)

// OpenClawTelegram is the gateway's Telegram channel.
type OpenClawTelegram struct {
	TokenFile string   // the secret that holds the bot's token
	AllowFrom []string // ids of the users that it listens to
}

// OpenClawProvider is a provider of models.
type OpenClawProvider struct {
	KeyFile string // the secret that holds its API key
}

// Host is what holds for all VMs of a host.
type Host struct {
	File    string // where it was read from; empty: nothing was, these are the defaults
	Bridge  string
	Address netip.Prefix // the bridge's own address and its subnet
	UIDBase uint32       // the first of the uids that VMs' processes run as

	defaults *node // merged under every declaration
}
