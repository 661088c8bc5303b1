package recipe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/clawvm/clawvm/internal/durable"
)

// npmBuilder is the throw-away root in which npm runs. Its npm comes from
// Debian: npm's own package can't be fetched without an npm, and a server
// shouldn't get 300 packages installed for the sake of one image.
var npmBuilder = Debian{
	Suite:    "trixie",
	Variant:  "minbase",
	Packages: []string{"ca-certificates", "npm"},
	Exclude:  []string{"/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/include/*"},
}

// Paths inside the builder's root.
const (
	npmProjects     = "/build"        // each project's directory below it is its path in the image
	npmCache        = "/npm-cache"    // mounted: survives a build that failed half-way
	npmUserConfig   = "/root/.npmrc"  // what the caller's npm is told of registries
	npmCertificates = "/etc/host.pem" // certificates that the host trusts
)

// npmArgs is the command line, run in each project's directory. Names,
// versions and hashes come from the lock file, which has no addresses in it
// (omit-lockfile-registry-resolved), so the registry is npm's default or the
// caller's. No script of a package runs here, where there is a network.
var npmArgs = []string{
	"npm", "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier",
	"--omit-lockfile-registry-resolved", "--cache=" + npmCache, "--loglevel=error",
}

// fetchNPM brings the node_modules of the recipe's projects into root, from
// the archive that an earlier build left in the cache or by npm.
func (b *build) fetchNPM(ctx context.Context, r *Recipe, root string) error {
	key, err := npmKey(r.NPM)
	if err != nil {
		return err
	}
	dir, err := b.cache("npm", false)
	if err != nil {
		return err
	}
	archive := filepath.Join(dir, r.Name+"-"+key+".tar.zst")
	if _, err := os.Stat(archive); errors.Is(err, os.ErrNotExist) {
		if err := b.makeNPM(ctx, r, archive); err != nil {
			return err
		}
	} else if err != nil {
		return fmt.Errorf("cannot look for fetched npm packages: %w", err)
	}
	if err := removeOthers(dir, r.Name+"-*.tar.zst", archive); err != nil {
		return err
	}
	return b.unpackNPM(ctx, archive, root)
}

// npmKey names what npm would install.
func npmKey(projects []NPM) (string, error) {
	digest, err := (&Recipe{NPM: projects}).Digest()
	if err != nil {
		return "", err
	}
	return strings.TrimPrefix(digest, "sha256:")[:32], nil
}

// makeNPM runs npm in a root of its own and packs what it installed.
func (b *build) makeNPM(ctx context.Context, r *Recipe, archive string) (err error) {
	packages, err := b.cache("debian-npm", true)
	if err != nil {
		return err
	}
	fetched, err := b.cache("npm-fetched", true)
	if err != nil {
		return err
	}
	builder, err := b.workDir("builder")
	if err != nil {
		return err
	}
	b.note("npm's own root")
	if err := b.debian(ctx, npmBuilder, builder, packages); err != nil {
		return fmt.Errorf("cannot make a root for npm: %w", err)
	}
	settings, err := callersNPM()
	if err != nil {
		return err
	}
	b.note("npm ci")
	for _, n := range r.NPM {
		s := step{
			Image:  true,
			Mounts: []mount{{Source: builder}, {Source: fetched, Path: npmCache}},
			Layout: &layout{Files: append(settings.files(),
				ownedFile{File{Path: npmProjects + n.Into + "/package.json", Content: n.Manifest}, 0},
				ownedFile{File{Path: npmProjects + n.Into + "/package-lock.json", Content: n.Locked}, 0},
			)},
			Argv: npmArgs,
			Env: append([]string{
				"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/root", "LC_ALL=C.UTF-8",
				"NODE_EXTRA_CA_CERTS=" + npmCertificates,
			}, proxies(ctx)...),
			Dir:     npmProjects + n.Into,
			Network: true,
		}
		if err := b.host.run(ctx, s, nil, nil); err != nil {
			return fmt.Errorf("cannot install the npm packages of %s: %w", n.Into, err)
		}
	}
	b.note("packing")
	if err := b.packNPM(ctx, builder, archive); err != nil {
		return err
	}
	if err := os.RemoveAll(builder); err != nil {
		return fmt.Errorf("cannot remove npm's root: %w", err)
	}
	// The archive takes the place of npm's own cache.
	if err := os.RemoveAll(fetched); err != nil {
		return fmt.Errorf("cannot remove npm's cache: %w", err)
	}
	return nil
}

func (b *build) packNPM(ctx context.Context, builder, archive string) (err error) {
	half := archive + ".half"
	f, err := os.OpenFile(half, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("cannot keep the npm packages: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(half))
		}
	}()
	w, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return errors.Join(fmt.Errorf("cannot keep the npm packages: %w", err), f.Close())
	}
	s := step{
		Mounts: []mount{{Source: builder, Path: debianRoot, ReadOnly: true}},
		Argv:   tarArgs("--create", debianRoot+npmProjects),
		Env:    tarEnvironment,
	}
	err = b.host.run(ctx, s, nil, w)
	if err = errors.Join(err, w.Close(), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("cannot keep the npm packages: %w", err)
	}
	if err := durable.Rename(half, archive); err != nil {
		return fmt.Errorf("cannot keep the npm packages: %w", err)
	}
	return nil
}

func (b *build) unpackNPM(ctx context.Context, archive, root string) error {
	f, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("cannot unpack the npm packages: %w", err)
	}
	defer f.Close()
	r, err := zstd.NewReader(f)
	if err != nil {
		return fmt.Errorf("cannot unpack the npm packages: %w", err)
	}
	defer r.Close()
	s := step{
		Mounts: []mount{{Source: root, Path: debianRoot}},
		Argv:   tarArgs("--extract", debianRoot),
		Env:    tarEnvironment,
	}
	// The files of /opt, not the directories that the packages have made
	// already, get what the archive says.
	s.Argv = append(s.Argv, "--no-overwrite-dir", "--keep-directory-symlink")
	if err := b.host.run(ctx, s, r, nil); err != nil {
		return fmt.Errorf("cannot unpack the npm packages (remove %s if it is damaged): %w", archive, err)
	}
	return nil
}

// tarArgs packs or unpacks all that a tree has: numbers of owners, times to the
// nanosecond, extended attributes. SELinux labels belong to the host.
func tarArgs(how, dir string) []string {
	args := []string{
		"tar", how, "--format=posix", "--pax-option=delete=atime,delete=ctime", "--numeric-owner",
		"--xattrs", "--xattrs-include=*", "--xattrs-exclude=security.selinux", "--directory=" + dir, "--file=-",
	}
	if how == "--create" {
		args = append(args, "--sort=name", "--one-file-system", ".")
	} else {
		args = append(args, "--preserve-permissions", "--same-owner")
	}
	return args
}

var tarEnvironment = []string{"PATH=/usr/local/bin:/usr/bin:/bin:/run/current-system/sw/bin", "LC_ALL=C.UTF-8"}

// npmSettings is what a registry's client needs to know of the host.
type npmSettings struct {
	config       string // npmrc
	certificates string // PEM
	resolver     string // resolv.conf
	hosts        string
}

func (s npmSettings) files() []ownedFile {
	var files []ownedFile
	for _, f := range []File{
		{Path: npmUserConfig, Content: s.config, Mode: "0600"},
		{Path: npmCertificates, Content: s.certificates},
		{Path: resolvConf, Content: s.resolver},
		{Path: "/etc/hosts", Content: s.hosts},
	} {
		files = append(files, ownedFile{f, 0})
	}
	return files
}

// callersNPM reads what the caller's npm is configured to: the npmrc of the
// host and of the user, as far as they say where registries are and how to
// reach them.
func callersNPM() (npmSettings, error) {
	var s npmSettings
	home, err := callersHome()
	if err != nil {
		return s, err
	}
	names := []string{"/etc/npmrc", "/usr/etc/npmrc", "/usr/local/etc/npmrc", filepath.Join(home, ".npmrc")}
	if set := os.Getenv("NPM_CONFIG_USERCONFIG"); set != "" {
		names[len(names)-1] = set
	}
	var config strings.Builder
	var certificates []string
	for _, name := range names {
		data, err := readHost(name)
		if err != nil {
			return s, err
		}
		kept, files := registrySettings(data)
		config.WriteString(kept)
		certificates = append(certificates, files...)
	}
	if registry := os.Getenv("NPM_CONFIG_REGISTRY"); registry != "" {
		config.WriteString("registry=" + registry + "\n")
	}
	s.config = config.String()
	certificates = append(certificates, os.Getenv("NODE_EXTRA_CA_CERTS"), os.Getenv("SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt")
	var pem strings.Builder
	seen := map[string]bool{"": true}
	for _, name := range certificates {
		if seen[name] {
			continue
		}
		seen[name] = true
		data, err := readHost(name)
		if err != nil {
			return s, err
		}
		pem.WriteString(data + "\n")
	}
	s.certificates = pem.String()
	if s.resolver, err = readHost(resolvConf); err != nil {
		return s, err
	}
	s.hosts, err = readHost("/etc/hosts")
	return s, err
}

// callersHome is the home of who typed the command, also below sudo.
func callersHome() (string, error) {
	if name := os.Getenv("SUDO_USER"); name != "" {
		if u, err := user.Lookup(name); err == nil {
			return u.HomeDir, nil
		}
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("cannot look for an .npmrc: %w", err)
	}
	return home, nil
}

func readHost(name string) (string, error) {
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("cannot read the host's network settings: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecipe))
	if err != nil {
		return "", fmt.Errorf("cannot read the host's network settings: %w", err)
	}
	return string(data), nil
}

var (
	// registryKey are the settings of an npmrc that concern the way to a
	// registry: its address, one for a scope, how to log in to it, proxies.
	registryKey = regexp.MustCompile(`^(registry|@[^:]+:registry|//.+:[_a-zA-Z]+|proxy|https-proxy|http-proxy|noproxy|strict-ssl|replace-registry-host)$`)
	npmVariable = regexp.MustCompile(`\$\{([A-Za-z_][A-Za-z0-9_]*)\}`)
)

// registrySettings keeps an npmrc's lines about registries, with environment
// variables in them replaced as npm would, and returns the files that cafile
// names beside it: a path of the host means nothing where npm runs.
func registrySettings(npmrc string) (kept string, certificates []string) {
	var b strings.Builder
	for line := range strings.Lines(npmrc) {
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || key == "" || strings.HasPrefix(key, ";") || strings.HasPrefix(key, "#") {
			continue
		}
		value = npmVariable.ReplaceAllStringFunc(value, func(v string) string {
			if set, ok := os.LookupEnv(v[2 : len(v)-1]); ok {
				return set
			}
			return v
		})
		switch {
		case key == "cafile":
			certificates = append(certificates, strings.Trim(value, `"'`))
		case registryKey.MatchString(key):
			b.WriteString(key + "=" + value + "\n")
		}
	}
	return b.String(), certificates
}

// removeOthers removes a pattern's files but one: what older versions of a
// recipe left in the cache.
func removeOthers(dir, pattern, keep string) error {
	found, err := filepath.Glob(path.Join(dir, pattern))
	if err != nil {
		return fmt.Errorf("cannot clean the cache: %w", err)
	}
	for _, name := range found {
		if name == keep {
			continue
		}
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("cannot clean the cache: %w", err)
		}
	}
	return nil
}
