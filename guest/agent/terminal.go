package agent

import (
	"errors"
	"fmt"
	"os"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// openTerminal opens a pseudo-terminal. The master's reads have deadlines and end when it is closed: creack/pty leaves it in blocking
// mode, where a read that waits for a process left behind could never be ended, so the master is opened a second time, as it were.
func openTerminal() (master, slave *os.File, err error) {
	m, slave, err := pty.Open()
	if err != nil {
		return nil, nil, fmt.Errorf("no terminal: %w", err)
	}
	fd, err := unix.FcntlInt(m.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		if err = unix.SetNonblock(fd, true); err != nil {
			err = errors.Join(err, unix.Close(fd))
		}
	}
	if err = errors.Join(err, m.Close()); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("no terminal: %w", err), slave.Close())
	}
	return os.NewFile(uintptr(fd), "ptmx"), slave, nil
}

// setSize sets a terminal's window size. pty.Setsize would make the file blocking again.
func setSize(f *os.File, rows, cols uint16) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ioctlErr error
	err = raw.Control(func(fd uintptr) {
		ioctlErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
	return errors.Join(err, ioctlErr)
}
