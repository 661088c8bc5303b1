package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"

	"github.com/clawvm/clawvm/secrets"
)

// Unit is the name of the systemd unit that owns a VM. A VM's name needs no
// escaping there.
func Unit(name string) string { return unitPrefix + name + unitSuffix }

const (
	unitPrefix = "clawvm@"
	unitSuffix = ".service"
)

// systemdRuns is there where systemd is PID 1 (sd_booted(3)).
const systemdRuns = "/run/systemd/system"

// ErrNoSystemd is why there are no units to speak to.
var ErrNoSystemd = errors.New("no systemd")

// underSystemd says why the VMs of a root can't be units; nil: they can.
func underSystemd(l Layout) error {
	if !l.IsSystem() {
		return fmt.Errorf("%w for this root: units run the VMs of /, and this is %s", ErrNoSystemd, l.Root)
	}
	if st, err := os.Stat(systemdRuns); err != nil || !st.IsDir() {
		return fmt.Errorf("%w: it is not this host's PID 1 (there is no %s)", ErrNoSystemd, systemdRuns)
	}
	return nil
}

// Units speaks to systemd about the units of VMs.
type Units struct{ conn *dbus.Conn }

// OpenUnits connects to systemd, over the system bus or without one. The error is
// [ErrNoSystemd] where systemd is not PID 1, or for a root other than "/". The
// caller closes it.
func OpenUnits(ctx context.Context, l Layout) (*Units, error) {
	if err := underSystemd(l); err != nil {
		return nil, err
	}
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot speak to systemd: %w", err)
	}
	return &Units{conn}, nil
}

// Close hangs up.
func (u *Units) Close() { u.conn.Close() }

// UnitState is what systemd says of a VM's unit, in its own words.
type UnitState struct {
	Installed bool   `json:"installed"` // clawvm@.service is there
	Active    string `json:"active,omitempty"`
	Sub       string `json:"sub,omitempty"`
	Enabled   bool   `json:"enabled"`
}

// Owned says whether systemd has a supervisor of the VM, or is about to start one.
func (s UnitState) Owned() bool {
	switch s.Active {
	case "active", "activating", "deactivating", "reloading", "refreshing", "maintenance":
		return true
	}
	return false
}

// State asks for a VM's unit.
func (u *Units) State(ctx context.Context, name string) (UnitState, error) {
	properties, err := u.conn.GetUnitPropertiesContext(ctx, Unit(name))
	if err != nil {
		return UnitState{}, fmt.Errorf("cannot ask systemd for %s: %w", Unit(name), err)
	}
	text := func(key string) string {
		s, _ := properties[key].(string)
		return s
	}
	return UnitState{
		Installed: text("LoadState") == "loaded", Active: text("ActiveState"), Sub: text("SubState"),
		Enabled: strings.HasPrefix(text("UnitFileState"), "enabled"),
	}, nil
}

// notInstalled is the error of a host without the template.
func notInstalled(name string) error {
	return fmt.Errorf("cannot use %s: the unit %s%s is not installed; `make install` puts it in place", Unit(name), unitPrefix, unitSuffix)
}

// replaceJobs: a request that is new overrides what systemd was asked for before,
// as systemctl's do.
const replaceJobs = "replace"

// jobDone is the result of a job that worked (systemd1, JobRemoved).
const jobDone = "done"

// Start brings up the VM name: as its unit where systemd is PID 1 and has it, else
// as [Launch] does. It returns when the supervisor answers; unit is empty where
// systemd has no part in it. A VM that runs already is no error: started is
// false.
func Start(ctx context.Context, l Layout, name string) (started bool, unit string, err error) {
	if _, err := l.Dial(name).Status(ctx); err == nil {
		return false, "", nil
	}
	units, err := OpenUnits(ctx, l)
	if errors.Is(err, ErrNoSystemd) {
		started, err = Launch(ctx, l, name)
		return started, "", err
	}
	if err != nil {
		return false, "", fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	defer units.Close()
	state, err := units.State(ctx, name)
	if err != nil {
		return false, "", err
	}
	if !state.Installed {
		started, err = Launch(ctx, l, name)
		return started, "", err
	}
	if err := visibleToUnit(l, name); err != nil {
		return false, "", err
	}
	return true, Unit(name), units.start(ctx, l, name, state)
}

// ownDirs are those that the unit has of its own (PrivateTmp=).
var ownDirs = []string{"/tmp/", "/var/tmp/"}

// visibleToUnit refuses a declaration that the unit would not find.
func visibleToUnit(l Layout, name string) error {
	file, err := l.Declaration(name)
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		return fmt.Errorf("cannot start VM %s: %w", name, err)
	}
	for _, dir := range ownDirs {
		if strings.HasPrefix(real, dir) {
			return coded(ExitDeclaration, fmt.Errorf("cannot start VM %s: its declaration is %s, and %s has a %s of its own; move the file, or give it to `clawvm --root DIR up`, which starts VMs without systemd",
				name, real, Unit(name), strings.TrimSuffix(dir, "/")))
		}
	}
	return nil
}

// start starts the unit, and returns when the supervisor answers.
func (u *Units) start(ctx context.Context, l Layout, name string, state UnitState) error {
	unit := Unit(name)
	// A unit that waits for its next try, or has used up its tries, is started
	// now, because a person asks for it.
	if state.Sub == "auto-restart" {
		if err := u.stop(ctx, name); err != nil {
			return err
		}
	}
	// The error of a unit that has nothing to forget tells nothing.
	_ = u.conn.ResetFailedUnitContext(ctx, unit)
	before, beforeErr := readEnd(l.VM(name).LastEnd()) // as Launch does
	result := make(chan string, 1)
	if _, err := u.conn.StartUnitContext(ctx, unit, replaceJobs, result); err != nil {
		return fmt.Errorf("cannot start VM %s: systemd does not start %s: %w", name, unit, err)
	}
	tick := time.NewTicker(launchPoll)
	defer tick.Stop()
	for {
		select {
		case r := <-result:
			if r == jobDone {
				return nil
			}
			if _, err := l.Dial(name).Status(ctx); err == nil {
				return nil // it has a new try already, which is followed
			}
			if e, err := readEnd(l.VM(name).LastEnd()); err == nil && e.Failed() && e.Kind != EndSupervisor && (beforeErr != nil || e.Since(before)) {
				return coded(e.Code, errors.New(e.Reason))
			}
			return fmt.Errorf("cannot start VM %s: systemd could not start %s (%s): `journalctl -u %s -n 20` shows why", name, unit, r, unit)
		case <-tick.C:
			if _, err := l.Dial(name).Status(ctx); err == nil {
				return nil
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// stop stops the unit and waits until it has.
func (u *Units) stop(ctx context.Context, name string) error {
	result := make(chan string, 1)
	if _, err := u.conn.StopUnitContext(ctx, Unit(name), replaceJobs, result); err != nil {
		return fmt.Errorf("cannot take VM %s down: systemd does not stop %s: %w", name, Unit(name), err)
	}
	select {
	case r := <-result:
		if r != jobDone {
			return fmt.Errorf("cannot take VM %s down: systemd could not stop %s (%s): `journalctl -u %s -n 20` shows why", name, Unit(name), r, Unit(name))
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("VM %s is not down yet: %w", name, context.Cause(ctx))
	}
}

// StopUnit makes sure that systemd does not run the VM any more, nor starts it again:
// it stops the unit and waits until that is done, or ctx ends. The guest gets the
// grace of whoever asked the supervisor for the VM's end first; SIGTERM, which is
// what systemd says, carries none. owned is false, and nothing was done, where
// the VM is none of systemd's.
func StopUnit(ctx context.Context, l Layout, name string) (owned bool, err error) {
	units, err := OpenUnits(ctx, l)
	if errors.Is(err, ErrNoSystemd) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot take VM %s down: %w", name, err)
	}
	defer units.Close()
	state, err := units.State(ctx, name)
	if err != nil || !state.Owned() {
		return false, err
	}
	return true, units.stop(ctx, name)
}

// Enable lets systemd start the VM at boot.
func (u *Units) Enable(ctx context.Context, name string) error {
	state, err := u.State(ctx, name)
	if err != nil {
		return err
	}
	if !state.Installed {
		return notInstalled(name)
	}
	if _, _, err := u.conn.EnableUnitFilesContext(ctx, []string{Unit(name)}, false, true); err != nil {
		return fmt.Errorf("cannot enable %s: %w", Unit(name), err)
	}
	return u.reload(ctx)
}

// Disable undoes Enable. One that is not enabled is no error.
func (u *Units) Disable(ctx context.Context, name string) error {
	if _, err := u.conn.DisableUnitFilesContext(ctx, []string{Unit(name)}, false); err != nil {
		return fmt.Errorf("cannot disable %s: %w", Unit(name), err)
	}
	return u.reload(ctx)
}

// DisableGone disables the unit of a VM that nothing declares any more; without
// systemd, or where it is not enabled, it does nothing.
func DisableGone(ctx context.Context, l Layout, name string) error {
	var missing *NotDeclaredError
	if _, err := l.Declaration(name); !errors.As(err, &missing) || !enabledVMs(l)[name] {
		return nil
	}
	units, err := OpenUnits(ctx, l)
	if err != nil {
		return err
	}
	defer units.Close()
	return units.Disable(ctx, name)
}

// reload lets systemd read its links anew.
func (u *Units) reload(ctx context.Context) error {
	if err := u.conn.ReloadContext(ctx); err != nil {
		return fmt.Errorf("cannot let systemd read its units again: %w", err)
	}
	return nil
}

// wantsDirs are where an enabled VM has its link: clawvm.target's is what the
// template asks for, and an administrator may have added others.
var wantsDirs = []string{
	"/etc/systemd/system/clawvm.target.wants", "/etc/systemd/system/multi-user.target.wants",
	"/run/systemd/system/clawvm.target.wants", "/run/systemd/system/multi-user.target.wants",
}

// enabledVMs are the VMs that systemd starts at boot. It looks at the links, as
// systemctl does, since asking for a thousand units takes seconds.
func enabledVMs(l Layout) map[string]bool {
	if underSystemd(l) != nil {
		return nil
	}
	return enabledIn(wantsDirs)
}

func enabledIn(dirs []string) map[string]bool {
	all := map[string]bool{}
	for _, dir := range dirs {
		// A directory that is not there, or can't be read, enables nothing.
		links, _ := filepath.Glob(filepath.Join(dir, unitPrefix+"*"+unitSuffix))
		for _, link := range links {
			all[strings.TrimSuffix(strings.TrimPrefix(filepath.Base(link), unitPrefix), unitSuffix)] = true
		}
	}
	return all
}

// credentialsVariable names the directory of the credentials that systemd gave to
// this process (systemd.exec(5)).
const credentialsVariable = "CREDENTIALS_DIRECTORY"

// unitCredentials is that directory of a VM's unit.
func unitCredentials(name string) string { return "/run/credentials/" + Unit(name) }

// findCredentials says where the secrets that are credentials are found by this
// process: by a supervisor in its own environment; by another command where the
// VM's unit has them, or will have them when it is started.
func findCredentials(ctx context.Context, l Layout, name string, list []secrets.Secret, supervisor bool) error {
	given := os.Getenv(credentialsVariable)
	var asked bool
	var loads []string
	for i := range list {
		s := &list[i]
		if s.Credential == "" {
			continue
		}
		if supervisor {
			s.Credentials = given
			continue
		}
		if l.IsSystem() {
			if _, err := os.Stat(filepath.Join(unitCredentials(name), s.Credential)); err == nil {
				s.Credentials = unitCredentials(name)
				continue
			}
		}
		if !asked {
			asked = true
			var err error
			if loads, err = unitLoads(ctx, l, name); err != nil {
				return err
			}
		}
		s.Awaited = matches(loads, s.Credential)
		if !s.Awaited && underSystemd(l) == nil {
			s.Credentials = unitCredentials(name) // where it is missing, and the message says so
		}
	}
	return nil
}

// matches says whether one of the names, or patterns, that a unit loads is id.
func matches(loads []string, id string) bool {
	for _, pattern := range loads {
		if ok, err := filepath.Match(pattern, id); ok && err == nil {
			return true
		}
	}
	return false
}

// unitLoads lists the credentials that the VM's unit is given when it starts.
func unitLoads(ctx context.Context, l Layout, name string) ([]string, error) {
	units, err := OpenUnits(ctx, l)
	if errors.Is(err, ErrNoSystemd) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer units.Close()
	properties, err := units.conn.GetUnitTypePropertiesContext(ctx, Unit(name), "Service")
	if err != nil {
		return nil, fmt.Errorf("cannot ask systemd for the credentials of %s: %w", Unit(name), err)
	}
	var loads []string
	for _, key := range []string{"LoadCredential", "LoadCredentialEncrypted", "SetCredential", "SetCredentialEncrypted"} {
		pairs, _ := properties[key].([][]any)
		for _, p := range pairs {
			if id, ok := p[0].(string); ok {
				loads = append(loads, id)
			}
		}
	}
	patterns, _ := properties["ImportCredential"].([]string)
	return append(loads, patterns...), nil
}
