package agent

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/clawvm/clawvm/guest"
	"github.com/mdlayher/vsock"
)

// OpenPort opens the guest's end of the agent's virtio-serial port, which has one reader at a time. It is found by its name in
// sysfs, because there is no udev. fs.ErrNotExist means that it isn't there, or not yet.
func OpenPort(context.Context) (io.ReadWriteCloser, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, n := range names {
		name, err := os.ReadFile(n)
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(name)) == guest.AgentPortName {
			return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("no virtio-serial port is named %s: %w", guest.AgentPortName, fs.ErrNotExist)
}

// DialHost connects to the host's listener for the agent over vsock.
func DialHost(context.Context) (io.ReadWriteCloser, error) {
	conn, err := vsock.Dial(vsock.Host, guest.AgentPort, nil)
	if err != nil {
		return nil, err
	}
	return conn, nil
}
