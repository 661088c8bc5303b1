// Package units holds what `make install` gives to systemd, networkd and
// NetworkManager.
package units

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/clawvm/clawvm/host"
)

// place puts the units where systemd-analyze finds them, as `make install` does,
// with a program that it finds too.
func place(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("systemd-analyze is not installed: it judges the units")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "clawvm"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	doc := filepath.Join(dir, "operations.md")
	if err := os.WriteFile(doc, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"clawvm@.service", "clawvm.target", "clawvm.slice"} {
		text := strings.NewReplacer("@BINDIR@", dir, "@DOCDIR@", dir).Replace(unit(t, name))
		if strings.Contains(text, "@DOCDIR@") || strings.Contains(text, "@BINDIR@") {
			t.Errorf("%s has a place that make install does not fill in", name)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func unit(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// newer are settings that systemd 252 (Debian 12) does not know, says so, and goes on.
var newer = regexp.MustCompile(`(?m)^.*Unknown key '(RestartSteps|RestartMaxDelaySec|DelegateSubgroup)' in section \[Service\], ignoring\.\n`)

func TestVerify(t *testing.T) {
	dir := place(t)
	cmd := exec.Command("systemd-analyze", "verify", "--recursive-errors=no", "--man=no",
		filepath.Join(dir, "clawvm@vm.service"), filepath.Join(dir, "clawvm.target"), filepath.Join(dir, "clawvm.slice"))
	if err := os.Symlink("clawvm@.service", filepath.Join(dir, "clawvm@vm.service")); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	// An older one ends with an error for what it ignores, too.
	if said := newer.ReplaceAllString(string(out), ""); said != "" || err != nil && len(out) == 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, said)
	}
}

// exposure is what a supervisor may be exposed to, in tenths (systemd-analyze(1)).
const exposure = 50

func TestHardened(t *testing.T) {
	dir := place(t)
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", fmt.Sprintf("--threshold=%d", exposure),
		filepath.Join(dir, "clawvm@.service")).CombinedOutput()
	if strings.Contains(string(out), "unrecognized option") {
		t.Skip("this systemd-analyze judges no unit that is not loaded")
	}
	if err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
}

// A user namespace, which virtiofsd makes for a share that can be written, can't
// mount /proc where a part of it is covered (mount_namespaces(7)). These cover some.
func TestProcIsWhole(t *testing.T) {
	text := unit(t, "clawvm@.service")
	for _, covers := range []string{"ProtectKernelLogs", "ProtectHostname", "ProtectKernelTunables", "ProcSubset"} {
		if regexp.MustCompile(`(?m)^` + covers + `=`).MatchString(text) {
			t.Errorf("the unit has %s=, with which no share can be written", covers)
		}
	}
}

// The codes for which trying again is no use are those of package host.
func TestExitCodes(t *testing.T) {
	m := regexp.MustCompile(`(?m)^RestartPreventExitStatus=(.*)$`).FindStringSubmatch(unit(t, "clawvm@.service"))
	want := fmt.Sprint(host.ExitNoSuchVM, " ", host.ExitCrashLoop, " ", host.ExitNoPerm, " ", host.ExitDeclaration, " ", host.ExitForGood)
	if m == nil || m[1] != want {
		t.Errorf("the unit is not tried again after %v, want %s", m, want)
	}
}

// Each thing that the unit keeps open is one that is named with its reason.
func TestReasons(t *testing.T) {
	text := unit(t, "clawvm@.service")
	m := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindStringSubmatch(text)
	if m == nil {
		t.Fatal("the unit bounds no capabilities")
	}
	comment := strings.Join(regexp.MustCompile(`(?m)^#.*$`).FindAllString(text, -1), "\n")
	for _, c := range strings.Fields(m[1]) {
		if !regexp.MustCompile(`\b(CAP_)?` + strings.TrimPrefix(c, "CAP_") + `\b`).MatchString(comment) {
			t.Errorf("the unit has no reason for %s", c)
		}
	}
}
