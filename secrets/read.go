package secrets

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Why a source can't be used. The errors of Check and Write wrap them.
var (
	ErrNoCredentials = errors.New("there are no credentials")
	ErrMissing       = errors.New("there is no such file")
	ErrEmpty         = errors.New("the file is empty")
	ErrNotRegular    = errors.New("it isn't a regular file")
	ErrExposed       = errors.New("others may read it")
	ErrTooLarge      = errors.New("it is larger than 1 MiB")
	ErrUnavailable   = errors.New("it can't be read")
)

// open opens and checks a source without following a link in its last part, or waiting for a pipe's writer. The caller closes it.
// A link in a directory's name is followed: that is how sops and Kubernetes replace many secrets at once.
func open(path string) (*os.File, int64, error) {
	fd, err := unix.Open(path, readOnly, 0)
	return opened(fd, path, err)
}

// readOnly is how sources are opened: never a link, and without waiting for a pipe's writer.
const readOnly = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC

// openSource opens and checks the secret's source. What a service manager put into a directory is looked for there and nowhere
// else, by no link at all. The caller closes it.
func (s Secret) openSource(keep string) (*os.File, int64, error) {
	path := s.Source(keep)
	if s.Credential == "" {
		return open(path)
	}
	dir, err := unix.Open(s.Credentials, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return opened(-1, path, err)
	}
	fd, err := unix.Openat2(dir, s.Credential, &unix.OpenHow{Flags: readOnly, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS})
	f, size, err := opened(fd, path, err)
	return f, size, errors.Join(err, unix.Close(dir))
}

func opened(fd int, path string, err error) (*os.File, int64, error) {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil, 0, ErrMissing
	case errors.Is(err, unix.ELOOP):
		return nil, 0, fmt.Errorf("%w: it is a symbolic link; name what it points to", ErrNotRegular)
	case errors.Is(err, unix.ENXIO): // a socket, or a device that isn't there
		return nil, 0, ErrNotRegular
	case err != nil:
		return nil, 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	f := os.NewFile(uintptr(fd), path)
	size, err := checkFile(f, path)
	if err != nil {
		return nil, 0, errors.Join(err, closed(f))
	}
	return f, size, nil
}

func checkFile(f *os.File, path string) (int64, error) {
	info, err := f.Stat()
	switch {
	case err != nil:
		return 0, fmt.Errorf("%w: %w", ErrUnavailable, err)
	case !info.Mode().IsRegular():
		return 0, ErrNotRegular
	case info.Mode().Perm()&0o077 != 0:
		return 0, fmt.Errorf("%w (mode %04o); chmod 600 %s", ErrExposed, info.Mode().Perm(), path)
	case info.Size() == 0:
		return 0, ErrEmpty
	case info.Size() > MaxSize:
		return 0, ErrTooLarge
	}
	return info.Size(), nil
}

func closed(f *os.File) error {
	if err := f.Close(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return nil
}

// load reads the secret's source. The caller wipes the value.
func (s Secret) load(keep string) (*Value, error) {
	f, size, err := s.openSource(keep)
	if err != nil {
		return nil, err
	}
	v, err := readAll(f, int(size))
	if err := errors.Join(err, closed(f)); err != nil {
		v.wipe()
		return nil, err
	}
	return v, nil
}

// readAll reads at most MaxSize bytes. Its buffers are wiped when they are left for larger ones, which append's wouldn't be.
func readAll(r io.Reader, expect int) (*Value, error) {
	buffer := make([]byte, 0, min(expect, MaxSize)+1)
	for {
		n, err := r.Read(buffer[len(buffer):cap(buffer)])
		buffer = buffer[:len(buffer)+n]
		v := &Value{bytes: buffer}
		switch {
		case len(buffer) > MaxSize:
			v.wipe()
			return nil, ErrTooLarge
		case errors.Is(err, io.EOF) && len(buffer) == 0:
			return nil, ErrEmpty
		case errors.Is(err, io.EOF):
			return v, nil
		case err != nil:
			v.wipe()
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		if len(buffer) == cap(buffer) {
			larger := make([]byte, len(buffer), min(2*cap(buffer), MaxSize)+1)
			copy(larger, buffer)
			clear(buffer)
			buffer = larger
		}
	}
}
