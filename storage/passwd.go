package storage

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxPasswd bounds what is read of an image's /etc/passwd; a real one has a
// few kilobytes.
const maxPasswd = 1 << 20

// ErrNoUser means that an image has no such user.
var ErrNoUser = errors.New("no such user in the image")

// noUserError is ErrNoUser with the users that there are.
type noUserError struct{ error }

func (noUserError) Is(target error) bool { return target == ErrNoUser }

// quotedList is names for a message; they are the image's own.
func quotedList(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = strconv.Quote(n)
	}
	return strings.Join(quoted, ", ")
}

// LookupUser finds a user of the image by its name, or by its number, in the
// image's own /etc/passwd. A number that isn't listed there is good too: its
// group is the same number and its home "/". The file is opened as if the
// image were the whole file system, so that no link leads out of it.
func (i *Image) LookupUser(name string) (uid, gid int, home string, err error) {
	text, err := i.readBeneath("etc/passwd", maxPasswd)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return 0, 0, "", fmt.Errorf("cannot look up the user %q: %w", name, err)
	}
	number, nerr := parseID(name)
	var known []string
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		f := strings.Split(lines.Text(), ":")
		if len(f) != 7 {
			continue
		}
		u, err1 := parseID(f[2])
		g, err2 := parseID(f[3])
		if errors.Join(err1, err2) != nil {
			continue
		}
		known = append(known, f[0])
		if f[0] != name && (nerr != nil || u != number) {
			continue
		}
		if !strings.HasPrefix(f[5], "/") {
			f[5] = "/"
		}
		return u, g, f[5], nil
	}
	if nerr == nil {
		return number, number, "/", nil
	}
	const shown = 40 // users; an image has about twenty
	if len(known) > shown {
		known = append(known[:shown], "…")
	}
	return 0, 0, "", noUserError{fmt.Errorf("cannot find user %q: the image's /etc/passwd has only %s; name one of them, or a number", name, quotedList(known))}
}

// parseID reads a user's or group's number; the largest is no id.
func parseID(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == math.MaxUint32 {
		err = strconv.ErrRange
	}
	return int(n), err
}

// readBeneath reads a regular file of the image, links resolved inside it.
func (i *Image) readBeneath(path string, limit int64) (text string, err error) {
	root, err := openDir(i.Root)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return "", fmt.Errorf("/%s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("/%s is no regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return "", err
	}
	if int64(len(data)) > limit {
		return "", fmt.Errorf("/%s has more than %d bytes", path, limit)
	}
	return string(data), nil
}
