package guest

import (
	"fmt"
	"net"
	"path"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Bounds of a document, far above what a declaration has, so that a wrong one is refused before the guest acts on it.
const (
	maxEntries = 256       // mounts, nameservers, arguments of a probe
	maxFiles   = 8192      // files: documents and skills can be many
	maxArgs    = 4096      // arguments and variables
	maxString  = 128 << 10 // one argument or variable: the kernel's MAX_ARG_STRLEN
	maxPath    = 4095      // the kernel's PATH_MAX without its zero byte
	maxTag     = 36        // a virtiofs tag
	maxSerial  = 20        // a virtio disk's serial
)

var (
	idPattern   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)
	hostPattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*$`)
	envPattern  = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	userPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?$`)
)

func (d *Document) check() error {
	if d.Version != DocumentVersion {
		return versionError(d.Version)
	}
	if !idPattern.MatchString(d.Name) || len(d.Name) > 63 {
		return fmt.Errorf("name %q isn't a VM's name", d.Name)
	}
	if !hostPattern.MatchString(d.Hostname) || len(d.Hostname) > 63 {
		return fmt.Errorf("hostname %q isn't a host name of at most 63 bytes", d.Hostname)
	}
	if d.Transport != TransportSerial && d.Transport != TransportVsock {
		return fmt.Errorf("transport %q is neither %q nor %q", d.Transport, TransportSerial, TransportVsock)
	}
	if d.Network != nil {
		if err := d.Network.check(); err != nil {
			return fmt.Errorf("network: %w", err)
		}
	}
	if err := d.Root.check(); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if len(d.Mounts) > maxEntries {
		return fmt.Errorf("%d mounts, at most %d are possible", len(d.Mounts), maxEntries)
	}
	for i := range d.Mounts {
		if err := d.Mounts[i].check(); err != nil {
			return fmt.Errorf("mounts[%d]: %w", i, err)
		}
	}
	if len(d.Files) > maxFiles {
		return fmt.Errorf("%d files, at most %d are possible: put them into the image or a share", len(d.Files), maxFiles)
	}
	for i := range d.Files {
		if err := d.Files[i].check(); err != nil {
			return fmt.Errorf("files[%d]: %w", i, err)
		}
	}
	if d.Workload != nil {
		if err := d.Workload.check(); err != nil {
			return fmt.Errorf("workload: %w", err)
		}
	}
	return nil
}

func (n *Network) check() error {
	if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 {
		return fmt.Errorf("mac %q isn't an Ethernet address", n.MAC)
	}
	if !n.Address.Is4() {
		return fmt.Errorf("address %q isn't an IPv4 address", n.Address)
	}
	if n.Gateway.IsValid() && (!n.Gateway.Is4() || n.Gateway == n.Address) {
		return fmt.Errorf("gateway %q isn't another IPv4 address", n.Gateway)
	}
	if len(n.Nameservers) > maxEntries || len(n.Search) > maxEntries {
		return fmt.Errorf("more than %d nameservers or search domains", maxEntries)
	}
	for _, a := range n.Nameservers {
		if !a.IsValid() || a.Zone() != "" {
			return fmt.Errorf("nameserver %q isn't an address", a)
		}
	}
	for _, s := range n.Search {
		if !hostPattern.MatchString(s) || len(s) > 253 {
			return fmt.Errorf("search domain %q isn't a domain", s)
		}
	}
	if n.MTU != 0 && (n.MTU < 576 || n.MTU > 65535) {
		return fmt.Errorf("mtu %d isn't between 576 and 65535", n.MTU)
	}
	return nil
}

func (r *Root) check() error {
	l := r.Lower
	switch {
	case (l.Share == "") == (l.Disk == ""):
		return fmt.Errorf("lower needs a share or a disk, one of them")
	case l.Share != "":
		if err := checkID(l.Share, maxTag); err != nil {
			return fmt.Errorf("lower share: %w", err)
		}
		if l.Type != "" {
			return fmt.Errorf("lower type %q belongs to a disk", l.Type)
		}
	default:
		if err := checkID(l.Disk, maxSerial); err != nil {
			return fmt.Errorf("lower disk: %w", err)
		}
		if l.Type != "erofs" && l.Type != "squashfs" && l.Type != "ext4" {
			return fmt.Errorf("lower type %q is none of erofs, squashfs, ext4", l.Type)
		}
	}
	u := r.Upper
	switch {
	case u.Tmpfs < 0 || (u.Tmpfs == 0) == (u.Disk == ""):
		return fmt.Errorf("upper needs a size for a tmpfs or a disk, one of them")
	case u.Disk != "":
		if err := checkID(u.Disk, maxSerial); err != nil {
			return fmt.Errorf("upper disk: %w", err)
		}
	}
	return nil
}

func checkID(id string, limit int) error {
	if !idPattern.MatchString(id) || len(id) > limit {
		return fmt.Errorf("%q isn't a name of letters, digits, dots, dashes and underscores with at most %d bytes", id, limit)
	}
	return nil
}

// reservedTargets belong to the init; a mount there or below would be hidden or would hide what the guest needs.
var reservedTargets = []string{"/proc", "/sys", "/dev", "/tmp"}

func (m *Mount) check() error {
	limit := maxTag
	switch m.Kind {
	case MountVolume:
		limit = maxSerial
	case MountShare, MountSecrets:
		if m.Owner != nil || m.Mode != 0 {
			return fmt.Errorf("owner and mode belong to a volume")
		}
	default:
		return fmt.Errorf("kind %q is none of %s, %s, %s", m.Kind, MountVolume, MountShare, MountSecrets)
	}
	if err := checkID(m.Source, limit); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if err := checkPath(m.Target); err != nil {
		return fmt.Errorf("target: %w", err)
	}
	for _, r := range reservedTargets {
		if m.Target == r || strings.HasPrefix(m.Target, r+"/") {
			return fmt.Errorf("target %s: nothing can be mounted at or below %s", m.Target, r)
		}
	}
	if m.Target == "/run" {
		return fmt.Errorf("target /run: nothing can be mounted there, only below")
	}
	if m.Mode&^0o7777 != 0 {
		return fmt.Errorf("mode %#o has more than permission bits", m.Mode)
	}
	if m.Owner != nil {
		return checkOwner(m.Owner.UID, m.Owner.GID)
	}
	return nil
}

func (f *File) check() error {
	if err := checkPath(f.Path); err != nil {
		return fmt.Errorf("path: %w", err)
	}
	if f.Mode&^0o7777 != 0 {
		return fmt.Errorf("%s: mode %#o has more than permission bits", f.Path, f.Mode)
	}
	if err := checkOwner(f.UID, f.GID); err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	return nil
}

func checkOwner(uid, gid int) error {
	const max = 1<<32 - 2 // 2³²-1 means "leave as it is" to chown
	if uid < 0 || gid < 0 || uid > max || gid > max {
		return fmt.Errorf("uid %d, gid %d: not between 0 and %d", uid, gid, max)
	}
	return nil
}

// checkPath accepts absolute clean paths other than the root.
func checkPath(p string) error {
	if !strings.HasPrefix(p, "/") || path.Clean(p) != p || p == "/" || len(p) > maxPath || strings.ContainsAny(p, "\x00\n") || !utf8.ValidString(p) {
		return fmt.Errorf("%q isn't an absolute path without dots, double or trailing slashes", p)
	}
	return nil
}

func (w *Workload) check() error {
	if err := CheckCommand(w.Argv, w.Env, w.User, w.Cwd); err != nil {
		return err
	}
	if err := w.Ready.check(); err != nil {
		return fmt.Errorf("ready: %w", err)
	}
	if w.Health != nil {
		if err := w.Health.check(); err != nil {
			return fmt.Errorf("health: %w", err)
		}
	}
	if _, ok := Signals[w.Stop.Signal]; !ok && w.Stop.Signal != "" {
		return fmt.Errorf("stop: signal %q is none of TERM, INT, QUIT, HUP, USR1, USR2, KILL", w.Stop.Signal)
	}
	if w.Stop.Timeout < 0 || w.Stop.Timeout > maxSeconds {
		return fmt.Errorf("stop: timeout %d isn't between 0 and %d seconds", w.Stop.Timeout, maxSeconds)
	}
	switch w.Restart {
	case RestartNo, RestartOnFailure, RestartAlways:
	default:
		return fmt.Errorf("restart %q is none of %s, %s, %s", w.Restart, RestartNo, RestartOnFailure, RestartAlways)
	}
	if len(w.NoRestart) > 256 {
		return fmt.Errorf("more than 256 codes in noRestart")
	}
	for _, c := range w.NoRestart {
		if c < 0 || c > 255 {
			return fmt.Errorf("noRestart: %d isn't an exit code", c)
		}
	}
	return nil
}

// maxSeconds bounds a time limit: a day.
const maxSeconds = 24 * 60 * 60

// Signals are the signals that a declaration, and who is connected to an exec, may name, with their numbers on Linux.
var Signals = map[string]int{
	"HUP": 1, "INT": 2, "QUIT": 3, "KILL": 9, "USR1": 10, "USR2": 12, "TERM": 15, "CONT": 18, "STOP": 19, "WINCH": 28,
}

// CheckCommand checks the parts of a command that a guest is asked to run: an empty user or directory means the default.
func CheckCommand(argv []string, env map[string]string, user, cwd string) error {
	if len(argv) == 0 || argv[0] == "" {
		return fmt.Errorf("argv is empty")
	}
	if len(argv) > maxArgs || len(env) > maxArgs {
		return fmt.Errorf("more than %d arguments or variables", maxArgs)
	}
	for i, a := range argv {
		if !validString(a) {
			return fmt.Errorf("argv[%d] has a zero byte, isn't UTF-8 or has more than %d bytes", i, maxString)
		}
	}
	for k, v := range env {
		if !envPattern.MatchString(k) {
			return fmt.Errorf("env: %q isn't a variable's name", k)
		}
		if !validString(k + "=" + v) {
			return fmt.Errorf("env: %s has a zero byte, isn't UTF-8 or has more than %d bytes", k, maxString)
		}
	}
	if user != "" && (!userPattern.MatchString(user) || len(user) > 128) {
		return fmt.Errorf("user %q is none of name, uid, name:group, uid:gid", user)
	}
	if cwd != "" && cwd != "/" {
		if err := checkPath(cwd); err != nil {
			return fmt.Errorf("cwd: %w", err)
		}
	}
	return nil
}

// validString says whether a string can be an argument; what isn't UTF-8 would be changed on its way through JSON.
func validString(s string) bool {
	return len(s) < maxString && utf8.ValidString(s) && !strings.ContainsRune(s, 0)
}

func (r *Ready) check() error {
	n := 0
	if r.TCP != 0 {
		n++
		if err := checkPort(r.TCP); err != nil {
			return fmt.Errorf("tcp: %w", err)
		}
	}
	if h := r.HTTP; h != nil {
		n++
		if err := checkPort(h.Port); err != nil {
			return fmt.Errorf("http: %w", err)
		}
		if !strings.HasPrefix(h.Path, "/") || len(h.Path) > maxPath || strings.ContainsAny(h.Path, "\x00\r\n ") || !utf8.ValidString(h.Path) {
			return fmt.Errorf("http: path %q doesn't start with a slash, or has a space or a line's end in it", h.Path)
		}
		if h.Status != 0 && (h.Status < 200 || h.Status > 599) {
			return fmt.Errorf("http: status %d isn't between 200 and 599", h.Status)
		}
	}
	if len(r.Exec) > 0 {
		n++
		if err := CheckCommand(r.Exec, nil, "", ""); err != nil {
			return fmt.Errorf("exec: %w", err)
		}
	}
	if n > 1 {
		return fmt.Errorf("more than one of tcp, http and exec")
	}
	if r.Timeout < 0 || r.Timeout > maxSeconds {
		return fmt.Errorf("timeout %d isn't between 0 and %d seconds", r.Timeout, maxSeconds)
	}
	return nil
}

func (h *Health) check() error {
	if err := h.Check.check(); err != nil {
		return err
	}
	if h.Check.TCP == 0 && h.Check.HTTP == nil && len(h.Check.Exec) == 0 || h.Check.Timeout != 0 {
		return fmt.Errorf("check needs one of tcp, http and exec, and nothing else")
	}
	for name, n := range map[string]int{"interval": h.Interval, "timeout": h.Timeout, "retries": h.Retries} {
		if n < 1 || n > maxSeconds {
			return fmt.Errorf("%s %d isn't between 1 and %d", name, n, maxSeconds)
		}
	}
	return nil
}

func checkPort(p int) error {
	if p < 1 || p > 65535 {
		return fmt.Errorf("port %d isn't between 1 and 65535", p)
	}
	return nil
}
