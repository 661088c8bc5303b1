package network

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"
)

// makeTAP makes a TAP and hands its file to set, which does with the link what
// is to be done. Only when set returns nil does the TAP become persistent: killed
// at any moment before, it is gone with its file, and no TAP without an owner's
// mark is left.
//
// Owner and group are both set: with the group left out only root may open it.
func makeTAP(name string, uid, gid int, set func() error) error {
	if uid < 0 || gid < 0 {
		// A group of -1 is refused by the kernel, and the library leaks the file then.
		return fmt.Errorf("user %d and group %d: both must be given", uid, gid)
	}
	// The library opens without O_CLOEXEC; the lock keeps a fork from
	// happening in between, as a child that holds the file keeps the TAP busy.
	syscall.ForkLock.RLock()
	tap, err := water.New(water.Config{DeviceType: water.TAP, PlatformSpecificParams: water.PlatformSpecificParams{
		Name:        name,
		Permissions: &water.DevicePermissions{Owner: uint(uid), Group: uint(gid)},
	}})
	file, isFile := (*os.File)(nil), false
	if err == nil {
		if file, isFile = tap.ReadWriteCloser.(*os.File); isFile {
			err = control(file, func(fd int) error { syscall.CloseOnExec(fd); return nil })
		}
	}
	syscall.ForkLock.RUnlock()
	if tap == nil {
		return err
	}
	if !isFile && err == nil {
		err = errors.New("the TAP's descriptor isn't a file")
	}
	if err == nil {
		err = set()
	}
	if err == nil {
		err = control(file, func(fd int) error {
			return os.NewSyscallError("TUNSETPERSIST", unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1))
		})
	}
	return errors.Join(err, tap.Close())
}

// control calls f with a file's descriptor and returns what f returns.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// OpenTAP opens a TAP that EnsurePort made, for a VMM that takes it by
// descriptor: whole Ethernet frames, each with a virtio-net header before it
// (IFF_TAP|IFF_NO_PI|IFF_VNET_HDR, one queue). One process can have it open; a
// second gets EBUSY. The caller closes it; the TAP stays.
func OpenTAP(name string) (*os.File, error) {
	f, err := openTAP(name)
	if err != nil {
		return nil, fmt.Errorf("cannot open TAP %s: %w", name, err)
	}
	return f, nil
}

func openTAP(name string) (*os.File, error) {
	if err := checkLink(name); err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("open /dev/net/tun", err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, req))
	if err == nil {
		// TUNSETIFF makes a TAP where there is none. Ours are persistent; that one
		// isn't, and goes when it is closed.
		err = os.NewSyscallError("TUNGETIFF", unix.IoctlIfreq(fd, unix.TUNGETIFF, req))
		if err == nil && req.Uint16()&unix.IFF_PERSIST == 0 {
			err = errors.New("there is no such TAP")
		}
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil
}
