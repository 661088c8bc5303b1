// Command trivial is a guest's init that does nothing but say that it runs: it
// loads the drivers of the agent's channel and writes one byte to it.
package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/vmm"
)

// portPoll is how often the channel is looked for: its driver finds it some time
// after it was loaded.
const portPoll = time.Millisecond

func main() {
	if err := run(); err != nil {
		println("init:", err.Error())
		if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
			println("init:", err.Error())
		}
	}
	select {}
}

func run() error {
	for _, m := range []struct{ what, where string }{{"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := unix.Mount(m.what, m.where, m.what, 0, ""); err != nil {
			return err
		}
	}
	// The kernel gives init what it does not know of its command line as environment.
	vsock := os.Getenv("channel") == "vsock"
	if err := loadModules(vsock); err != nil {
		return err
	}
	for {
		err := say(vsock)
		if err == nil || !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EAFNOSUPPORT) {
			return err
		}
		time.Sleep(portPoll)
	}
}

// loadModules loads, of the modules that every guest's initramfs has, those of
// the channel.
func loadModules(vsock bool) error {
	list, err := os.ReadFile(kernel.ModulesList)
	if err != nil {
		return err
	}
	console := false
	for _, path := range strings.Fields(string(list)) {
		name := strings.TrimSuffix(filepath.Base(path), ".ko")
		// Up to the console's driver come the bus and its, which all need.
		wanted := !console && (!vsock || name != "virtio_console") || vsock && strings.Contains(name, "vsock")
		console = console || name == "virtio_console"
		if !wanted {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.FinitModule(int(f.Fd()), "", 0), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// say writes the byte.
func say(vsock bool) error {
	if vsock {
		fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: vmm.AgentPort}); err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		_, err = unix.Write(fd, []byte{1})
		return err // the descriptor stays open as long as the guest runs
	}
	ports, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return err
	}
	for _, p := range ports {
		if name, err := os.ReadFile(p); err != nil || strings.TrimSpace(string(name)) != vmm.AgentPortName {
			continue
		}
		f, err := os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(p))), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = f.Write([]byte{1})
		return err
	}
	return os.ErrNotExist
}
