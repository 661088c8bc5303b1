// Package guest declares the boot document: the one file that tells the guest's init everything it has to do. The host composes
// it and appends it to the initramfs as /clawvm/boot.json; it holds no secret.
package guest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
)

// DocumentVersion is the version of the boot document that this package writes and reads. An init refuses any other.
const DocumentVersion = 1

// DocumentPath is where the boot document lies in the initramfs.
const DocumentPath = "/clawvm/boot.json"

// ModulesPath is the initramfs' list of kernel modules: one absolute path a line, in the order of loading.
const ModulesPath = "/clawvm/modules.list"

// MaxDocument bounds an encoded document in bytes. Files travel in it, base64-encoded, and a VM's memory holds it while it boots.
const MaxDocument = 16 << 20

// Document says what a guest is and what its init does.
type Document struct {
	Version  int    `json:"version"`
	Name     string `json:"name"`     // the VM's name
	Hostname string `json:"hostname"` // at most 63 bytes

	Network  *Network  `json:"network,omitempty"` // nil: loopback only
	Root     Root      `json:"root"`
	Mounts   []Mount   `json:"mounts,omitempty"`   // mounted in this order
	Files    []File    `json:"files,omitempty"`    // written in this order, after the mounts
	Workload *Workload `json:"workload,omitempty"` // nil: the guest runs until it is shut down

	Transport string `json:"transport"` // TransportSerial or TransportVsock

	// InstructionClock says that the guest's clock counts instructions (QEMU's -icount); the agent never sets the clock then.
	InstructionClock bool `json:"instructionClock,omitempty"`
}

// How the agent reaches the host.
const (
	TransportSerial = "virtio-serial" // the virtio-serial port named AgentPortName
	TransportVsock  = "vsock"         // a connection to CID 2, port AgentPort
)

// AgentPortName is the name of the agent's virtio-serial port.
const AgentPortName = "agent"

// AgentPort is the vsock port on which the host listens for the agent.
const AgentPort = 1024

// Network is the guest's one interface. It holds its address as a /32; the gateway is on the link.
type Network struct {
	MAC         string       `json:"mac"`              // of the interface to configure, as 02:63:c0:a8:53:0a
	Address     netip.Addr   `json:"address"`          // IPv4
	Gateway     netip.Addr   `json:"gateway,omitzero"` // zero: no default route
	Nameservers []netip.Addr `json:"nameservers"`      // written to /etc/resolv.conf; with a gate its resolver, the gateway's address
	MTU         int          `json:"mtu,omitempty"`    // 0: the kernel's
	Search      []string     `json:"search,omitempty"` // search domains of /etc/resolv.conf
}

// Root is the overlay that becomes the guest's root file system.
type Root struct {
	Lower Lower `json:"lower"`
	Upper Upper `json:"upper"`
}

// Lower is the read-only image: exactly one of Share and Disk is set.
type Lower struct {
	Share string `json:"share,omitempty"` // tag of a virtiofs share
	Disk  string `json:"disk,omitempty"`  // serial (ID) of a virtio disk
	Type  string `json:"type,omitempty"`  // the disk's file system: erofs, squashfs, ext4
}

// Upper is the writable layer: exactly one of Tmpfs and Disk is set.
type Upper struct {
	Tmpfs int64  `json:"tmpfs,omitempty"` // bytes
	Disk  string `json:"disk,omitempty"`  // serial (ID) of a virtio disk with an ext4
}

// Kinds of mounts.
const (
	MountVolume  = "volume"  // Source is the serial (ID) of a virtio disk with an ext4
	MountShare   = "share"   // Source is the tag of a virtiofs share
	MountSecrets = "secrets" // Source is the tag of a virtiofs share; always read-only, nosuid, nodev, noexec
)

// SecretsTarget is where a guest finds its secrets.
const SecretsTarget = "/run/secrets"

// Mount is a file system that the guest mounts over its root.
type Mount struct {
	Kind     string `json:"kind"`
	Source   string `json:"source"`
	Target   string `json:"target"` // absolute and clean; made when it is missing
	ReadOnly bool   `json:"readOnly,omitempty"`
	NoSUID   bool   `json:"nosuid,omitempty"`
	NoDev    bool   `json:"nodev,omitempty"`
	NoExec   bool   `json:"noexec,omitempty"`
	Owner    *Owner `json:"owner,omitempty"` // of a fresh (empty, root-owned) volume's root; nil: left as it is
	Mode     uint32 `json:"mode,omitempty"`  // of a fresh volume's root; 0: left as it is
}

// Owner is a user and a group by number.
type Owner struct {
	UID int `json:"uid"`
	GID int `json:"gid"`
}

// File is a file that is written before the workload starts. Missing directories are made, root's and 0755; what is there is
// replaced, a symbolic link too.
type File struct {
	Path    string `json:"path"` // absolute and clean
	Mode    uint32 `json:"mode"` // permission bits; 0 means 0644
	UID     int    `json:"uid,omitempty"`
	GID     int    `json:"gid,omitempty"`
	Content []byte `json:"content"` // base64 in the encoding
}

// Restart policies.
const (
	RestartNo        = "no"
	RestartOnFailure = "on-failure"
	RestartAlways    = "always"
)

// Workload is the program that the guest is for.
type Workload struct {
	Argv      []string          `json:"argv"`           // Argv[0] without a slash is looked for on the PATH
	Env       map[string]string `json:"env,omitempty"`  // over HOME, USER, LOGNAME, SHELL, PATH from the image's passwd
	User      string            `json:"user,omitempty"` // name, uid, name:group or uid:gid of the image; "" is root, without any capability
	Cwd       string            `json:"cwd,omitempty"`  // "": the user's home if it is there, else /
	Ready     Ready             `json:"ready"`
	Stop      Stop              `json:"stop"`
	Restart   string            `json:"restart"`             // RestartNo, RestartOnFailure or RestartAlways
	NoRestart []int             `json:"noRestart,omitempty"` // exit codes that end it whatever Restart says
	Health    *Health           `json:"health,omitempty"`    // nil: nobody looks after it was ready
}

// Ready says when the workload is ready: at most one of TCP, HTTP and Exec is set; none means as soon as it is started.
type Ready struct {
	TCP     int        `json:"tcp,omitempty"` // a port that accepts, on the guest's address or on its loopback
	HTTP    *HTTPReady `json:"http,omitempty"`
	Exec    []string   `json:"exec,omitempty"`    // a command, run as the workload is, that exits with 0
	Timeout int        `json:"timeout,omitempty"` // seconds after a start until the agent reports that it isn't ready yet; 0: never
}

// Health says how it is looked, after the workload was ready, whether it still does what it is for.
type Health struct {
	Check    Ready `json:"check"`             // exactly one of TCP, HTTP and Exec
	Interval int   `json:"interval"`          // seconds from one look to the next
	Timeout  int   `json:"timeout"`           // seconds that a look may take
	Retries  int   `json:"retries"`           // so many failures in a row, and it is unhealthy
	Restart  bool  `json:"restart,omitempty"` // an unhealthy workload is stopped; that is a failure, and Restart of the workload decides
}

// HTTPReady is a GET that answers with a status.
type HTTPReady struct {
	Port   int    `json:"port"`
	Path   string `json:"path"`   // with its leading slash
	Status int    `json:"status"` // 0 means 200
}

// Stop says how the workload is asked to end.
type Stop struct {
	Signal  string `json:"signal,omitempty"`  // a key of Signals; "" means TERM
	Timeout int    `json:"timeout,omitempty"` // seconds until all that it started is killed; 0 means 30
}

// Encode checks the document and returns its bytes, the same for the same document.
func (d *Document) Encode() ([]byte, error) {
	if err := d.check(); err != nil {
		return nil, fmt.Errorf("cannot encode the boot document: %w", err)
	}
	data, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("cannot encode the boot document: %w", err)
	}
	if len(data)+1 > MaxDocument {
		return nil, fmt.Errorf("cannot encode the boot document: %d bytes, at most %d fit: put large files into the image or a share", len(data)+1, MaxDocument)
	}
	return append(data, '\n'), nil
}

// Decode reads what Encode wrote. Unknown fields, another version, impossible values and anything behind the document are errors.
func Decode(data []byte) (*Document, error) {
	d, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("cannot read the boot document: %w", err)
	}
	return d, nil
}

func decode(data []byte) (*Document, error) {
	if len(data) > MaxDocument {
		return nil, fmt.Errorf("%d bytes, at most %d are read", len(data), MaxDocument)
	}
	// The version first: with another one, an unknown field is only its consequence. Unmarshal also refuses what follows.
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return nil, err
	}
	if v.Version != DocumentVersion {
		return nil, versionError(v.Version)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var d Document
	if err := dec.Decode(&d); err != nil {
		return nil, err
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	return &d, nil
}

func versionError(v int) error {
	return fmt.Errorf("version %d, this init reads version %d: host and guest parts of clawvm must be of the same release", v, DocumentVersion)
}
