package recipe

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
)

// source is one line of an apt sources.list.
// It names no keyring: mmdebstrap finds the one that the suite
// needs, which isn't always the one that the host's own suite needs.
type source struct {
	URI   string
	Suite string
	Parts string // components, separated by spaces
}

func (s source) line() string { return "deb " + s.URI + " " + s.Suite + " " + s.Parts }

// targetFormat is what hostTargets asks apt for: one target a line.
const targetFormat = "$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(SIGNED_BY)|$(REPO_URI)"

// hostTargets is what the host's own apt fetches, in targetFormat; nothing
// where there is no apt.
func hostTargets(ctx context.Context) (targets, codename string) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", ""
	}
	codename = debianCodename(string(release))
	if codename == "" {
		return "", ""
	}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", targetFormat, "Created-By: Packages").Output()
	if err != nil {
		return "", "" // mmdebstrap's own default will do, or say why it doesn't
	}
	return string(out), codename
}

// debianCodename is the codename in an os-release of Debian itself. A
// derivative's mirror doesn't hold Debian's suites.
func debianCodename(release string) string {
	values := map[string]string{}
	for line := range strings.Lines(release) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok {
			values[key] = strings.Trim(value, `"'`)
		}
	}
	if values["ID"] != "debian" {
		return ""
	}
	return values["VERSION_CODENAME"]
}

// plainURI is a mirror that can stand in a sources.list line. Others (with a
// password, or apt's own mirror lists in a file) are left to the host.
var plainURI = regexp.MustCompile(`^https?://[A-Za-z0-9.:\[\]_-]+(/[A-Za-z0-9._~/%+-]*)?$`)

// mirrors derives the sources for a suite from where the host fetches its own:
// the same archive, the same security archive. Without a match it returns
// nil, for mmdebstrap's default.
func mirrors(targets, codename, suite string) []source {
	var archive, security *source
	for line := range strings.Lines(targets) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 5 {
			continue
		}
		release, component, origin, signed, uri := f[0], f[1], f[2], f[3], strings.TrimSuffix(f[4], "/")
		// The origin is known once the host has run apt-get update.
		if component != "main" || !plainURI.MatchString(uri) || origin != "Debian" && origin != "" && !strings.HasPrefix(origin, "$(") {
			continue
		}
		// apt leaves a variable that has no value as it is.
		named := signed != "" && !strings.HasPrefix(signed, "$(")
		if named && !strings.HasPrefix(signed, "/usr/share/keyrings/debian-archive-") {
			continue
		}
		s := source{URI: uri, Suite: suite, Parts: "main"}
		switch release {
		case codename:
			if archive == nil {
				archive = &s
			}
		case codename + "-security":
			if security == nil {
				s.Suite = suite + "-security"
				security = &s
			}
		}
	}
	if archive == nil {
		return nil
	}
	all := []source{*archive}
	if hasUpdates(suite) {
		updates := *archive
		updates.Suite = suite + "-updates"
		all = append(all, updates)
		if security != nil {
			all = append(all, *security)
		}
	}
	return all
}

// hasUpdates says whether a suite has -updates and -security beside it; the
// development suites don't.
func hasUpdates(suite string) bool {
	switch suite {
	case "sid", "unstable", "testing", "experimental":
		return false
	}
	return true
}

// Where mmdebstrap's step finds the build's directories.
const (
	debianRoot  = workMount + "/root"
	debianCache = workMount + "/packages"
)

// mmdebstrapArgs is the command line. It is started as root of a user
// namespace in the mode "unshare", which then makes no namespace of its own
// but knows that device nodes can't be made: it binds the host's. The mode
// "root" works too but tries and warns first; "chrootless" runs the packages'
// scripts on the host's files, which most packages aren't made for.
func mmdebstrapArgs(d Debian, sources []source) []string {
	args := []string{
		"mmdebstrap", "--mode=unshare", "--format=directory", "--variant=" + d.Variant,
		"--aptopt=Acquire::Languages \"none\"",
		// A mirror's hiccup isn't a failed build.
		"--aptopt=Acquire::Retries \"3\"",
	}
	for _, p := range d.Exclude {
		args = append(args, "--dpkgopt=path-exclude="+p)
	}
	for _, p := range d.Include {
		args = append(args, "--dpkgopt=path-include="+p)
	}
	if len(d.Packages) > 0 {
		args = append(args, "--include="+strings.Join(d.Packages, ","))
	}
	// The variant that only extracts ends before the last hook.
	keep := "--customize-hook="
	if d.Variant == "extract" {
		keep = "--extract-hook="
	}
	args = append(args,
		// Packages of earlier builds are copied in, and those of this one out:
		// apt takes what is there if it is the package it wants.
		"--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives/ && find "+debianCache+" -name '*.deb' -exec cp -t \"$1\"/var/cache/apt/archives/ {} +",
		"--skip=essential/unlink",
		keep+"rm -f "+debianCache+"/*.deb && find \"$1\"/var/cache/apt/archives/ -name '*.deb' -exec mv -t "+debianCache+" {} +",
		d.Suite, debianRoot,
	)
	for _, s := range sources {
		args = append(args, s.line())
	}
	return args
}

// proxyVariables are what a step with network is told of the caller's
// environment.
var proxyVariables = []string{"http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}

// proxies is the part of the environment that says how to reach the network,
// with the host's apt configuration in the place of what isn't set.
func proxies(ctx context.Context) []string {
	var env []string
	set := map[string]bool{}
	for _, name := range proxyVariables {
		if value := os.Getenv(name); value != "" {
			env = append(env, name+"="+value)
			set[strings.ToLower(name)] = true
		}
	}
	for _, scheme := range []string{"http", "https"} {
		if set[scheme+"_proxy"] {
			continue
		}
		out, err := exec.CommandContext(ctx, "apt-config", "dump", "--no-empty", "--format", "%v", "Acquire::"+scheme+"::Proxy").Output()
		if value := strings.TrimSpace(string(out)); err == nil && value != "" && !strings.EqualFold(value, "DIRECT") {
			env = append(env, scheme+"_proxy="+value)
		}
	}
	return env
}

// ErrNoMmdebstrap means that the host lacks the program that fetches Debian packages.
var ErrNoMmdebstrap = errors.New("mmdebstrap isn't installed (on Debian: apt-get install mmdebstrap)")

func (b *build) debian(ctx context.Context, d Debian, root, packages string) error {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return ErrNoMmdebstrap
	}
	targets, codename := hostTargets(ctx)
	env := append([]string{
		// The work directory is thrown away if the machine stops, so dpkg
		// needn't wait for the disk. (As a dpkgopt it would stay in the image.)
		"DPKG_FORCE=unsafe-io",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + workMount, "TMPDIR=" + workMount, "LC_ALL=C.UTF-8",
	}, proxies(ctx)...)
	s := step{
		Mounts:  []mount{{Source: root, Path: debianRoot}, {Source: packages, Path: debianCache}},
		Argv:    mmdebstrapArgs(d, mirrors(targets, codename, d.Suite)),
		Env:     env,
		Dir:     workMount,
		Network: true,
	}
	return b.host.run(ctx, s, nil, nil)
}
