package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// oldest is the first major version that can be used: it can stay when its guest turns itself off
// (--no-shutdown), and CVE-2026-45782 is mended in it.
const oldest = 52

// getIt is what a refusal says to do next. The version is the one that the tests' exchanges were recorded from.
const getIt = "get v53.0 from https://github.com/cloud-hypervisor/cloud-hypervisor/releases (the file cloud-hypervisor-static), " +
	"and put it on the PATH as cloud-hypervisor or name it in CLAWVM_CLOUD_HYPERVISOR"

// ErrTooOld is a cloud-hypervisor below v52.
var ErrTooOld = errors.New("this cloud-hypervisor is too old")

// ErrNotInstalled is a cloud-hypervisor that isn't there or can't be run.
var ErrNotInstalled = errors.New("cloud-hypervisor is not installed")

// versionLimit bounds `cloud-hypervisor --version`, which prints two lines.
const versionLimit = 10 * time.Second

// versionPattern finds "v53.0-dirty" in --version's "cloud-hypervisor v53.0-dirty" (builds from a clone have a suffix of
// git's), and takes vmm.ping's "53.0.0".
var versionPattern = regexp.MustCompile(`(?:^|\s)v?((\d{1,6})\.\d{1,6}[!-~]*)`)

// parseVersion reads the first line of --version, or vmm.ping's version.
func parseVersion(s string) (version string, major int, err error) {
	first, _, _ := strings.Cut(s, "\n")
	m := versionPattern.FindStringSubmatch(first)
	if m == nil {
		return "", 0, fmt.Errorf("cannot find cloud-hypervisor's version in %.80q", first)
	}
	major, err = strconv.Atoi(m[2])
	return "v" + m[1], major, err
}

// checkVersion refuses a version that is too old.
func checkVersion(said string) (string, error) {
	version, major, err := parseVersion(said)
	if err != nil {
		return "", err
	}
	if major < oldest {
		return "", fmt.Errorf("%w: it is %s, and v%d is the oldest that works; %s", ErrTooOld, version, oldest, getIt)
	}
	return version, nil
}

// Version asks the program for its version, such as "v53.0". The error is ErrNotInstalled or ErrTooOld, with what to do about it.
func (c *CloudHypervisor) Version(ctx context.Context) (string, error) {
	path, err := c.find()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, versionLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Env = []string{"LANG=C"}
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("cannot run %s --version: %w", path, err)
	}
	return checkVersion(string(out))
}

// find is where the program is.
func (c *CloudHypervisor) find() (string, error) {
	path, err := exec.LookPath(c.binary)
	if err != nil {
		return "", fmt.Errorf("%w: %w; %s", ErrNotInstalled, err, getIt)
	}
	return path, nil
}
