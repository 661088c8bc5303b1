package recipe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/storage"
)

// DefaultUIDBase is the first of the 65536 ids of the host that a build's user
// namespace has. They must belong to nobody else: they lie well above those that a
// host's VMs get (two for each address of the bridge, from 2000000000 on) and
// above all that Debian gives to users and their subordinate ids.
const DefaultUIDBase = 2000262144

// Options say how to build.
type Options struct {
	// CacheDir keeps what was downloaded for the next build: about 350 MB for
	// openclaw. It is made, root's and 0700. Without one nothing is kept.
	CacheDir string
	// UIDBase is the first host id of the build's user namespace; 0 means
	// DefaultUIDBase.
	UIDBase uint32
	// Force builds even if the store has the image from this very recipe,
	// which brings the Debian packages up to date.
	Force bool
	// Progress is told of each step as it starts and of its way; may be nil.
	Progress func(Progress)
	// Log gets all that the tools print; may be nil.
	Log io.Writer
}

// Progress is where a build stands.
type Progress struct {
	Step  string // what is being done
	Index int    // of the step, from 1
	Steps int    // how many there are
	Note  string // something to know before it is done, like a download
	Done  int64  // bytes, where the step counts them
}

// build is one build at work.
type build struct {
	host     host
	options  Options
	work     string // this build's own directory
	cacheDir string
	progress Progress
}

// Build makes a recipe's image and names it after the recipe. If the store has
// it already, made from the same recipe, Build returns that one at once. It
// needs root, a Linux that lets root make user namespaces, and the host's mmdebstrap
// (else ErrNoMmdebstrap) and tar. When ctx ends, so does the build, without
// leftovers.
func Build(ctx context.Context, s *storage.Store, r *Recipe, o Options) (*storage.Image, error) {
	image, err := buildImage(ctx, s, r, o)
	if err != nil {
		return nil, fmt.Errorf("cannot build the image %s: %w", r.Name, err)
	}
	return image, nil
}

func buildImage(ctx context.Context, s *storage.Store, r *Recipe, o Options) (image *storage.Image, err error) {
	digest, err := r.Digest()
	if err != nil {
		return nil, err
	}
	if !o.Force {
		if image, err := existing(s, r.Name, digest); image != nil || err != nil {
			return image, err
		}
	}
	if os.Geteuid() != 0 {
		return nil, storage.ErrNotRoot
	}
	if o.UIDBase == 0 {
		o.UIDBase = DefaultUIDBase
	}
	b := &build{options: o, host: host{uidBase: o.UIDBase, log: o.Log}}
	done, err := b.begin(ctx, s, r.Name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	// Another process may have built it while this one waited for its turn.
	if !o.Force {
		if image, err := existing(s, r.Name, digest); image != nil || err != nil {
			return image, err
		}
	}
	return b.run(ctx, s, r, digest)
}

// existing returns the store's image of that name if it was made from this
// recipe. A corrupt one is as good as none: it will be replaced.
func existing(s *storage.Store, name, digest string) (*storage.Image, error) {
	image, err := s.Open(name)
	switch {
	case errors.Is(err, storage.ErrNoImage), errors.Is(err, storage.ErrCorrupt):
		return nil, nil
	case err != nil:
		return nil, err
	}
	stamp, err := ReadStamp(image)
	if err != nil {
		return nil, err
	}
	if stamp == nil || stamp.Digest != digest {
		return nil, nil
	}
	return image, nil
}

// maxStamp bounds what is read of an image's stamp.
const maxStamp = 64 << 10

// ReadStamp reads what an image says it was built from; nil if it doesn't say,
// because it wasn't built by this package.
func ReadStamp(image *storage.Image) (*Stamp, error) {
	// An os.Root follows no link out of the image.
	root, err := os.OpenRoot(image.Root)
	if err != nil {
		return nil, fmt.Errorf("cannot look into the image: %w", err)
	}
	defer root.Close()
	name := strings.TrimPrefix(StampPath, "/")
	if info, err := root.Lstat(name); err != nil || !info.Mode().IsRegular() {
		return nil, nil
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, fmt.Errorf("cannot read what the image was built from: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxStamp))
	if err != nil {
		return nil, fmt.Errorf("cannot read what the image was built from: %w", err)
	}
	stamp := &Stamp{}
	if json.Unmarshal(data, stamp) != nil {
		return nil, nil // somebody else's file
	}
	return stamp, nil
}

// run does the steps in their order.
func (b *build) run(ctx context.Context, s *storage.Store, r *Recipe, digest string) (*storage.Image, error) {
	steps, err := b.steps(r, digest)
	if err != nil {
		return nil, err
	}
	b.progress.Steps = len(steps) + 1
	root, err := b.workDir("root")
	if err != nil {
		return nil, err
	}
	b.progress.Note = b.announce(r)
	for _, step := range steps {
		b.enter(step.name)
		if err := step.do(ctx, root); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	b.enter("storing the image")
	return b.store(ctx, s, r.Name, root)
}

type namedStep struct {
	name string
	do   func(ctx context.Context, root string) error
}

func (b *build) steps(r *Recipe, digest string) ([]namedStep, error) {
	written := &layout{Users: r.Users}
	for _, f := range r.Files {
		uid, err := r.uid(f.User)
		if err != nil {
			return nil, err
		}
		written.Files = append(written.Files, ownedFile{f, uid})
	}
	steps := []namedStep{{"Debian " + r.Debian.Suite, func(ctx context.Context, root string) error {
		packages, err := b.cache("debian-"+r.Name, true)
		if err != nil {
			return err
		}
		return b.debian(ctx, r.Debian, root, packages)
	}}}
	if len(r.NPM) > 0 {
		steps = append(steps, namedStep{"npm packages", func(ctx context.Context, root string) error {
			return b.fetchNPM(ctx, r, root)
		}})
	}
	steps = append(steps, namedStep{"users and files", func(ctx context.Context, root string) error {
		return b.host.run(ctx, step{Image: true, Mounts: []mount{{Source: root}}, Layout: written}, nil, nil)
	}})
	for _, c := range r.Commands {
		s, err := commandStep(r, c)
		if err != nil {
			return nil, err
		}
		steps = append(steps, namedStep{c.label(), func(ctx context.Context, root string) error {
			s.Mounts = []mount{{Source: root}}
			return b.host.run(ctx, s, nil, nil)
		}})
	}
	last := &finish{Remove: r.Remove, RemoveContent: r.RemoveContent,
		Stamp: &Stamp{Recipe: r.Name, Digest: digest, Environment: r.Environment}}
	return append(steps, namedStep{"cleaning up", func(ctx context.Context, root string) error {
		return b.host.run(ctx, step{Image: true, Mounts: []mount{{Source: root}}, Finish: last}, nil, nil)
	}}), nil
}

func (c Command) label() string {
	if c.Name != "" {
		return c.Name
	}
	return c.Argv[0]
}

// commandStep is a recipe's command: in the image, without network, as its
// user, with the recipe's environment.
func commandStep(r *Recipe, c Command) (step, error) {
	uid, err := r.uid(c.User)
	if err != nil {
		return step{}, err
	}
	env := map[string]string{"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
	dir := "/"
	for _, u := range r.Users {
		if u.Name == c.User {
			env["HOME"], env["USER"], env["LOGNAME"], env["SHELL"] = u.Home, u.Name, u.Name, u.Shell
			dir = u.Home
		}
	}
	maps.Copy(env, r.Environment)
	maps.Copy(env, c.Environment)
	s := step{Image: true, Argv: c.Argv, Dir: dir, UID: uid, GID: uid, Confined: uid != 0, Until: c.Until}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		s.Env = append(s.Env, name+"="+env[name])
	}
	return s, nil
}

// store streams the tree into the store. The tar is made inside a user namespace,
// where the owners have the numbers that they have in the image.
func (b *build) store(ctx context.Context, s *storage.Store, name, root string) (*storage.Image, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	read, write := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		pack := step{Mounts: []mount{{Source: root, Path: debianRoot, ReadOnly: true}}, Argv: tarArgs("--create", debianRoot), Env: tarEnvironment}
		err := b.host.run(ctx, pack, nil, write)
		packed <- errors.Join(err, write.CloseWithError(err))
	}()
	image, err := s.ImportTar(ctx, read, name, storage.ImportOptions{
		Progress: b.count,
		Note:     b.log,
	})
	if err != nil {
		cancel()
	}
	// An importer that stopped early must not leave tar waiting.
	closeErr := read.Close()
	if packErr := <-packed; packErr != nil && (err == nil || ctx.Err() == nil) {
		return nil, errors.Join(packErr, err)
	}
	if err := errors.Join(err, closeErr); err != nil {
		return nil, err
	}
	return image, nil
}

// Names below the store's tmp and the cache.
const (
	workPrefix = "build-"
	lockName   = "build.lock"
)

// begin takes the lock, cleans up after dead builds and makes the
// work directory. What it returns undoes all that.
func (b *build) begin(ctx context.Context, s *storage.Store, name string) (done func() error, err error) {
	tmp := filepath.Join(s.Dir, "tmp")
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make a work directory: %w", err)
	}
	if err := sweep(tmp); err != nil {
		return nil, err
	}
	held, err := b.makeWork(tmp, name)
	if err != nil {
		return nil, err
	}
	remove := func() error {
		if err := os.RemoveAll(b.work); err != nil {
			return errors.Join(fmt.Errorf("cannot remove the work directory: %w", err), held.Close())
		}
		return held.Close()
	}
	b.cacheDir = b.options.CacheDir
	if b.cacheDir == "" {
		b.cacheDir = filepath.Join(b.work, "cache")
	}
	if err := os.MkdirAll(b.cacheDir, 0o700); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot make the cache: %w", err), remove())
	}
	// Two builds in one cache would share npm's and apt's directories.
	turn, err := waitForLock(ctx, filepath.Join(b.cacheDir, lockName), func() {
		b.progress.Step = "waiting for another build to end"
		b.report()
	})
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	return func() error { return errors.Join(remove(), turn.Close()) }, nil
}

// makeWork makes the locked work directory. Another process that cleans up may take it for
// a dead one's before it is locked; then it is made again.
func (b *build) makeWork(tmp, name string) (*os.File, error) {
	for {
		dir, err := os.MkdirTemp(tmp, workPrefix+name+"-")
		if err != nil {
			return nil, fmt.Errorf("cannot make a work directory: %w", err)
		}
		held, err := lockDir(dir)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
		if _, err := os.Lstat(dir); err == nil {
			b.work = dir
			return held, nil
		}
		if err := held.Close(); err != nil {
			return nil, fmt.Errorf("cannot make a work directory: %w", err)
		}
	}
}

// sweep removes the work directories that no living build holds.
func sweep(tmp string) error {
	dirs, err := filepath.Glob(filepath.Join(tmp, workPrefix+"*"))
	if err != nil {
		return fmt.Errorf("cannot look for dead builds: %w", err)
	}
	for _, dir := range dirs {
		held, err := lockDir(dir)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		err = os.RemoveAll(dir)
		if err := errors.Join(err, held.Close()); err != nil {
			return fmt.Errorf("cannot remove what a dead build left: %w", err)
		}
	}
	return nil
}

func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot lock %s: %w", dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// workDir makes a directory that belongs to the namespace's root.
func (b *build) workDir(name string) (string, error) {
	dir := filepath.Join(b.work, name)
	return dir, b.own(dir)
}

// cache makes a directory of the cache: the namespace's, for packages that
// apt and npm check themselves, or the host root's own.
func (b *build) cache(name string, namespaced bool) (string, error) {
	dir := filepath.Join(b.cacheDir, name)
	if namespaced {
		return dir, b.own(dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("cannot make the cache: %w", err)
	}
	return dir, nil
}

func (b *build) own(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("cannot make a directory for the build: %w", err)
	}
	if err := os.Lchown(dir, int(b.options.UIDBase), int(b.options.UIDBase)); err != nil {
		return fmt.Errorf("cannot make a directory for the build: %w", err)
	}
	return nil
}

// announce says what will be downloaded, if nothing of it is in the cache.
func (b *build) announce(r *Recipe) string {
	if r.Downloads == "" {
		return ""
	}
	if _, err := os.Stat(filepath.Join(b.cacheDir, "debian-"+r.Name)); err == nil {
		return "downloads what changed since the last build"
	}
	return "downloads " + r.Downloads
}

func (b *build) enter(name string) {
	b.progress.Step, b.progress.Done = name, 0
	b.progress.Index++
	b.report()
}

// note tells a part of a step.
func (b *build) note(text string) {
	b.progress.Note = text
	b.report()
}

func (b *build) count(done int64) {
	b.progress.Done = done
	b.report()
}

func (b *build) log(line string) {
	if b.options.Log == nil {
		return
	}
	// A log that can't be written is no reason to lose the build.
	if _, err := fmt.Fprintln(b.options.Log, line); err != nil {
		b.options.Log = nil
	}
}

func (b *build) report() {
	if b.options.Progress != nil {
		b.options.Progress(b.progress)
	}
	b.progress.Note = ""
}
