package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// dumpTries is how often a list is asked for again when the kernel says that it
// changed while it was read (NLM_F_DUMP_INTR). Such a list is incomplete: taking
// it for the truth would delete what lives. Two were enough where 1,200 lists
// were read under constant change.
const dumpTries = 20

// list reads a list from the kernel until it is whole.
func list[T any](read func() ([]T, error)) ([]T, error) {
	for try := 1; ; try++ {
		got, err := read()
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < dumpTries {
			continue
		}
		return got, err
	}
}

// findLink looks for a link; nil without an error means that there is none.
func findLink(name string) (netlink.Link, error) {
	for try := 1; ; try++ {
		l, err := netlink.LinkByName(name)
		var gone netlink.LinkNotFoundError
		switch {
		case err == nil:
			return l, nil
		case errors.As(err, &gone):
			return nil, nil
		case errors.Is(err, netlink.ErrDumpInterrupted) && try < dumpTries:
			continue
		}
		return nil, fmt.Errorf("cannot look for link %s: %w", name, err)
	}
}

func links() ([]netlink.Link, error) {
	l, err := list(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("cannot list the host's links: %w", err)
	}
	return l, nil
}

// sysctlDir is where the kernel's parameters are; it shows the network
// namespace of the thread that opens a file below it.
const sysctlDir = "/proc/sys"

// setSysctl writes a parameter, given as a path below sysctlDir, when it has
// another value, and returns the one that it had. A parameter that the kernel
// doesn't have is reported by an error that is fs.ErrNotExist.
func setSysctl(path, want string) (had string, err error) {
	file := filepath.Join(sysctlDir, path)
	name := strings.ReplaceAll(path, "/", ".")
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("cannot read %s: %w", name, err)
	}
	had = strings.TrimSpace(string(b))
	if had == want {
		return had, nil
	}
	if err := os.WriteFile(file, []byte(want), 0); err != nil {
		return had, fmt.Errorf("cannot set %s to %s: %w", name, want, err)
	}
	return had, nil
}

// closeLinkToIPv6 turns IPv6 off on a link of ours, and ICMP redirects: a
// redirect would tell a guest to look for its neighbour by itself, which the
// bridge keeps it from doing.
func closeLinkToIPv6(link string) error {
	if _, err := setSysctl("net/ipv6/conf/"+link+"/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// A kernel without IPv6 has no such file, and nothing to turn off.
	_, err := setSysctl("net/ipv4/conf/"+link+"/send_redirects", "0")
	return err
}
