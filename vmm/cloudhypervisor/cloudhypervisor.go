// Package cloudhypervisor runs machines under cloud-hypervisor, v52 or newer: one process for each, used once. It is driven
// over its REST API on a unix socket that the process inherits, and followed by its event monitor.
//
// Whatever goes wrong, the process is killed and never asked again: a second vm.boot after one that failed can
// answer well and boot a machine that lacks a device. A guest's reboot ends the process too, so that everything around the machine starts anew with it.
package cloudhypervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/clawvm/clawvm/vmm"
)

// BinaryVariable is the environment variable that names the program when it isn't on the PATH.
const BinaryVariable = "CLAWVM_CLOUD_HYPERVISOR"

// program is what is looked for on the PATH.
const program = "cloud-hypervisor"

// CloudHypervisor is an installed cloud-hypervisor.
type CloudHypervisor struct{ binary string }

var _ vmm.VMM = (*CloudHypervisor)(nil)

// New takes the program's path; "" means what CLAWVM_CLOUD_HYPERVISOR names, else cloud-hypervisor on the PATH.
// Whether it is there shows at the first use.
func New(binary string) *CloudHypervisor {
	if binary == "" {
		binary = os.Getenv(BinaryVariable)
	}
	if binary == "" {
		binary = program
	}
	return &CloudHypervisor{binary}
}

// Name is "cloud-hypervisor".
func (c *CloudHypervisor) Name() string { return program }

// OpenChannel makes the socket on which the guest's connections to vmm.AgentPort arrive: cloud-hypervisor connects to it each
// time that the guest dials. What an earlier process of this machine left there is removed first.
func (c *CloudHypervisor) OpenChannel(m *vmm.Machine) (*vmm.Channel, error) {
	dir, path := stateDir(m), agentPath(m)
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	// The directory was the VMM's, so nothing in it is trusted, and until all is made it is root's.
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("cannot clear %s: %w", dir, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the VMM's directory: %w", err)
	}
	host, err := listen(path)
	if err != nil {
		return nil, err
	}
	for _, p := range []string{path, dir} {
		if err := os.Lchown(p, m.UID, m.GID); err != nil {
			return nil, errors.Join(fmt.Errorf("cannot hand %s to the VMM: %w", p, err), host.Close())
		}
	}
	return &vmm.Channel{Host: host, Listening: true, Path: path}, nil
}

// listen makes a listening socket that only its owner may connect to, as a file to hand on.
func listen(path string) (f *os.File, err error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	defer func() { err = errors.Join(err, l.Close()) }()
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	if f, err = l.File(); err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	return f, nil
}

// maxSocketPath is the longest path of a unix socket (sun_path, without its end).
const maxSocketPath = 107

func checkSocketPath(path string) error {
	if len(path) > maxSocketPath {
		return fmt.Errorf("cannot make the socket %s: its path is %d bytes long, and %d is the most; use a shorter --root", path, len(path), maxSocketPath)
	}
	return nil
}

// removeLeftovers removes what a process of this machine leaves in its directory; that nothing is there is no error.
func removeLeftovers(m *vmm.Machine) error {
	var errs []error
	for _, path := range []string{apiPath(m), apiPath(m) + ".lock"} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("cannot remove what cloud-hypervisor left: %w", err))
		}
	}
	if err := os.RemoveAll(stateDir(m)); err != nil {
		errs = append(errs, fmt.Errorf("cannot remove what cloud-hypervisor left: %w", err))
	}
	return errors.Join(errs...)
}
