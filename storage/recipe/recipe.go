package recipe

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
)

// Recipe says what goes into an image. It is read from YAML with unknown
// fields refused.
type Recipe struct {
	// Name is the image's name in the store.
	Name string `yaml:"name"`
	// Description is one line for people.
	Description string `yaml:"description"`
	// Downloads says what a first build fetches, roughly, for people.
	Downloads string `yaml:"downloads"`
	Debian    Debian `yaml:"debian"`
	NPM       []NPM  `yaml:"npm"`
	Users     []User `yaml:"users"`
	Files     []File `yaml:"files"`
	// Environment is what every command gets.
	Environment map[string]string `yaml:"environment"`
	// Commands run in the image in this order, after everything above.
	Commands []Command `yaml:"commands"`
	// Remove are the patterns (path.Match) of what is removed at the end.
	// What doesn't exist is no error.
	Remove []string `yaml:"remove"`
	// RemoveContent are directories that are emptied at the end.
	RemoveContent []string `yaml:"removeContent"`
}

// Debian is the packages that mmdebstrap installs.
type Debian struct {
	Suite string `yaml:"suite"`
	// Variant is mmdebstrap's: "minbase" (the default), "essential", "apt", or
	// "extract", which unpacks the packages and runs no script of theirs.
	Variant  string   `yaml:"variant"`
	Packages []string `yaml:"packages"`
	// Exclude are patterns of files that dpkg leaves out, Include of those that
	// it keeps of them (dpkg's path-exclude and path-include).
	Exclude []string `yaml:"exclude"`
	Include []string `yaml:"include"`
}

// NPM is a project whose node_modules is installed by `npm ci`.
type NPM struct {
	// Lock is the directory of package.json and package-lock.json, relative to
	// the recipe's file.
	Lock string `yaml:"lock"`
	// Into is where it lands in the image.
	Into string `yaml:"into"`

	// Manifest and Locked are the content of the two files.
	Manifest string `yaml:"-"`
	Locked   string `yaml:"-"`
}

// User is a user of the image with a group of the same name and number. Its
// home is made, 0750, and its password locked.
type User struct {
	Name  string `yaml:"name"`
	UID   int    `yaml:"uid"`
	Home  string `yaml:"home"`
	Shell string `yaml:"shell"`
}

// File is a file, a link or a directory that is written into the image.
type File struct {
	Path string `yaml:"path"`
	// Exactly one of Content, Link and Directory.
	Content   string `yaml:"content"`
	Link      string `yaml:"link"`
	Directory bool   `yaml:"directory"`
	// Mode is octal; 0644 by default, 0755 for a directory.
	Mode string `yaml:"mode"`
	// User owns it: root by default, or one of the recipe's.
	User string `yaml:"user"`
}

// Command runs in the image without network.
type Command struct {
	// Name is what the progress calls it.
	Name string   `yaml:"name"`
	Argv []string `yaml:"argv"`
	// User is root by default, or one of the recipe's.
	User        string            `yaml:"user"`
	Environment map[string]string `yaml:"environment"`
	// Until is for a service: it is stopped by SIGTERM once it answers.
	Until *Until `yaml:"until"`
}

// Until is reached when http://127.0.0.1:Port/Path answers with status 200.
type Until struct {
	Port    int           `yaml:"port"`
	Path    string        `yaml:"path"`
	Timeout time.Duration `yaml:"timeout"`
}

// formatVersion counts changes to what this package makes of the same recipe.
const formatVersion = 1

//go:embed bundled
var bundled embed.FS

// maxRecipe bounds each file of a recipe. The largest lock file known is
// openclaw's, with 140 kB.
const maxRecipe = 4 << 20

// Names lists the recipes that are part of the program.
func Names() []string {
	files, err := fs.Glob(bundled, "bundled/*.yaml")
	if err != nil {
		return nil // only a malformed pattern is an error
	}
	var names []string
	for _, f := range files {
		names = append(names, strings.TrimSuffix(path.Base(f), ".yaml"))
	}
	return names
}

// Builtin returns a recipe that is part of the program. ErrNoRecipe if there
// is none of that name.
func Builtin(name string) (*Recipe, error) {
	if !slices.Contains(Names(), name) {
		return nil, fmt.Errorf("%w called %q (there are %s)", ErrNoRecipe, name, strings.Join(Names(), ", "))
	}
	dir, err := fs.Sub(bundled, "bundled")
	if err != nil {
		return nil, fmt.Errorf("cannot read the bundled recipes: %w", err)
	}
	return read(dir, name+".yaml")
}

// ErrNoRecipe is returned for a name that no bundled recipe has.
var ErrNoRecipe = errors.New("no bundled recipe")

// Load reads a recipe from a file. Lock directories are relative to it and may
// not lie above it.
func Load(file string) (*Recipe, error) {
	return read(os.DirFS(filepath.Dir(file)), filepath.Base(file))
}

func read(dir fs.FS, name string) (*Recipe, error) {
	data, err := readFile(dir, name)
	if err != nil {
		return nil, fmt.Errorf("cannot read the recipe %s: %w", name, err)
	}
	r := &Recipe{}
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(r); err != nil {
		return nil, fmt.Errorf("cannot read the recipe %s: %s", name, yaml.FormatError(err, false, true))
	}
	if r.Debian.Variant == "" {
		r.Debian.Variant = "minbase"
	}
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("the recipe %s is wrong: %w", name, err)
	}
	for i := range r.NPM {
		n := &r.NPM[i]
		manifest, err := readFile(dir, path.Join(n.Lock, "package.json"))
		if err != nil {
			return nil, fmt.Errorf("cannot read the npm packages of the recipe %s: %w", name, err)
		}
		locked, err := readFile(dir, path.Join(n.Lock, "package-lock.json"))
		if err != nil {
			return nil, fmt.Errorf("cannot read the npm lock file of the recipe %s (npm install --package-lock-only makes it): %w", name, err)
		}
		n.Manifest, n.Locked = string(manifest), string(locked)
	}
	return r, nil
}

func readFile(dir fs.FS, name string) ([]byte, error) {
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecipe+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxRecipe {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxRecipe)
	}
	return data, nil
}

// Digest is the hash of everything that a build takes from the recipe: the
// recipe's values (not its comments), its npm files, and this package's format.
func (r *Recipe) Digest() (string, error) {
	data, err := json.Marshal(struct {
		Format int
		Recipe *Recipe
	}{formatVersion, r})
	if err != nil {
		return "", fmt.Errorf("cannot hash the recipe: %w", err)
	}
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

var (
	imageName   = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	suiteName   = regexp.MustCompile(`^[a-z][a-z0-9.-]{0,31}$`)
	packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]{0,127}$`) // Debian policy 5.6.7
	userName    = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	variants    = []string{"minbase", "essential", "apt", "extract"}
)

// check returns everything that is wrong, not the first of it.
func (r *Recipe) check() error {
	var wrong []error
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	if !imageName.MatchString(r.Name) {
		bad("name: %q must match %s", r.Name, imageName)
	}
	if !suiteName.MatchString(r.Debian.Suite) {
		bad("debian.suite: %q is no suite's name; trixie is one", r.Debian.Suite)
	}
	if !slices.Contains(variants, r.Debian.Variant) {
		bad("debian.variant: %q must be one of %s", r.Debian.Variant, strings.Join(variants, ", "))
	}
	for _, p := range r.Debian.Packages {
		if !packageName.MatchString(p) {
			bad("debian.packages: %q is no package's name", p)
		}
	}
	for _, p := range slices.Concat(r.Debian.Exclude, r.Debian.Include) {
		if !strings.HasPrefix(p, "/") || strings.ContainsAny(p, "\n'\"\\ ") {
			bad("debian.exclude and include: %q must start with / and have no quotes, spaces or backslashes", p)
		}
	}
	for _, n := range r.NPM {
		if !fs.ValidPath(n.Lock) {
			bad("npm.lock: %q must be a directory below the recipe's", n.Lock)
		}
		if !cleanPath(n.Into) {
			bad("npm.into: %q must be absolute, with neither . nor .. in it as a name", n.Into)
		}
	}
	for _, u := range r.Users {
		if !userName.MatchString(u.Name) || u.Name == "root" {
			bad("users: %q can't be a user's name", u.Name)
		}
		if u.UID < 1000 || u.UID > 60000 {
			bad("users: %s has the uid %d; Debian keeps 1000 to 60000 for users", u.Name, u.UID)
		}
		if !cleanPath(u.Home) || !cleanPath(u.Shell) || strings.ContainsAny(u.Home+u.Shell, ":\n") {
			bad("users: home and shell of %s must be absolute paths without colon", u.Name)
		}
	}
	for _, f := range r.Files {
		wrong = append(wrong, r.checkFile(f)...)
	}
	for _, c := range r.Commands {
		if len(c.Argv) == 0 || c.Argv[0] == "" {
			bad("commands: %q has no argv", c.Name)
		}
		if _, err := r.uid(c.User); err != nil {
			bad("commands: %w", err)
		}
		if u := c.Until; u != nil && (u.Port < 1 || u.Port > 65535 || !strings.HasPrefix(u.Path, "/") || u.Timeout <= 0) {
			bad("commands: until of %q needs a port, a path that starts with / and a timeout", c.Name)
		}
	}
	for _, p := range r.Remove {
		if _, err := path.Match(p, "/"); err != nil || !cleanPath(p) {
			bad("remove: %q must be an absolute path or pattern", p)
		}
	}
	for _, p := range r.RemoveContent {
		if !cleanPath(p) {
			bad("removeContent: %q must be an absolute path", p)
		}
	}
	return errors.Join(wrong...)
}

func (r *Recipe) checkFile(f File) []error {
	var wrong []error
	if !cleanPath(f.Path) {
		wrong = append(wrong, fmt.Errorf("files: %q must be absolute, with neither . nor .. in it as a name", f.Path))
	}
	kinds := 0
	for _, is := range []bool{f.Content != "", f.Link != "", f.Directory} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		wrong = append(wrong, fmt.Errorf("files: %s must have exactly one of content, link and directory", f.Path))
	}
	if _, err := f.mode(); err != nil {
		wrong = append(wrong, fmt.Errorf("files: %s: %w", f.Path, err))
	}
	if _, err := r.uid(f.User); err != nil {
		wrong = append(wrong, fmt.Errorf("files: %s: %w", f.Path, err))
	}
	return wrong
}

func cleanPath(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && p != "/" && !strings.ContainsRune(p, 0)
}

func (f File) mode() (uint32, error) {
	if f.Mode == "" {
		if f.Directory {
			return 0o755, nil
		}
		return 0o644, nil
	}
	mode, err := strconv.ParseUint(f.Mode, 8, 32)
	if err != nil || mode > 0o7777 {
		return 0, fmt.Errorf("mode %q must be octal, like \"0755\"", f.Mode)
	}
	return uint32(mode), nil
}

// uid is a user's number; user and group have the same.
func (r *Recipe) uid(name string) (int, error) {
	if name == "" || name == "root" {
		return 0, nil
	}
	for _, u := range r.Users {
		if u.Name == name {
			return u.UID, nil
		}
	}
	return 0, fmt.Errorf("there is no user %q in the recipe", name)
}
