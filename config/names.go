package config

import (
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"
)

// NamePattern is what a VM may be called: short enough for every path, unit and device that it is part of.
var NamePattern = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

var (
	imagePattern    = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$`)
	digestPattern   = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	kernelPattern   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._+~-]{0,127}$`)
	volumePattern   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,15}$`)
	secretPattern   = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]*$`)
	userPattern     = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	devicePattern   = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.-]*$`)
	hostnamePattern = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?)*$`)
	variablePattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	modelPattern    = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*(/[A-Za-z0-9@._:-]+)+$`)
	providerPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,53}$`) // with "provider-" the 64 of the gateway's own names
	telegramPattern = regexp.MustCompile(`^[1-9][0-9]{0,19}$`)
)

// ValidName says why a VM can't be called so, or nothing.
func ValidName(name string) error {
	if NamePattern.MatchString(name) {
		return nil
	}
	return fmt.Errorf("%s is no name for a VM: a lower-case letter, then lower-case letters, digits and -, %d at most", quoted(name), maxNameLength)
}

// systemPaths are what a volume or share must neither cover nor lie under: the image's programs, which are read-only, what
// the guest's init mounts itself (/run/secrets among it), and the kernel's own.
var systemPaths = []string{"/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr"}

// checkMount says what is wrong with a mount point in the guest, or nothing.
func checkMount(p string) (wrong, want string) {
	const example = "an absolute path such as /var/lib/data"
	switch {
	case !strings.HasPrefix(p, "/"):
		return quoted(p) + " is a relative path", example
	case len(p) > 4095 || unprintable(p):
		return "isn't a path of printable characters", example
	case path.Clean(p) != p:
		return quoted(p) + " has a part that leads nowhere", path.Clean(p)
	case p == "/":
		return "is the guest's root, which is the image", example
	}
	for _, s := range systemPaths {
		if p == s || strings.HasPrefix(p, s+"/") {
			return quoted(p) + " is in " + s + ", which belongs to the system", example
		}
	}
	return "", ""
}

// checkUser says what is wrong with a user's name or uid in the guest, or nothing.
func checkUser(u string) (wrong, want string) {
	if userPattern.MatchString(u) {
		return "", ""
	}
	const example = "the name of a user of the image, or a uid below 4294967295"
	if u == "" || strings.Trim(u, "0123456789") != "" {
		return quoted(u) + " is neither the name of a user nor a uid", example
	}
	if _, err := strconv.ParseUint(u, 10, 32); err != nil || u == "4294967295" { // -1 means "leave it" to chown
		return u + " is no uid", example
	}
	return "", ""
}

func unprintable(s string) bool {
	return strings.ContainsFunc(s, func(c rune) bool { return !strconv.IsPrint(c) })
}

// quoted is a text for a message, bounded.
func quoted(s string) string {
	const limit = 64
	if len(s) <= limit {
		return strconv.Quote(s)
	}
	return strconv.Quote(strings.ToValidUTF8(s[:limit], "")) + "…"
}
