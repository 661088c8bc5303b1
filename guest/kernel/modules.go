package kernel

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// needed are the modules without which no guest comes up: the bus and what hangs on it, and the file systems of
// root, overlay and disks.
var needed = []string{
	"virtio_pci", "virtio_console", "virtio_blk", "virtio_net",
	"fuse", "virtiofs", "overlay", "ext4",
	"vmw_vsock_virtio_transport",
}

// useful are the modules that make a guest better: the power button and who tells of it, entropy, memory given
// back, panics reported, and a root on an erofs disk. A kernel without them boots all the same.
var useful = []string{"button", "evdev", "virtio_rng", "virtio_balloon", "pvpanic", "pvpanic_pci", "erofs"}

// maxModule bounds a module's file, before and after it is decompressed.
const maxModule = 64 << 20

// module is one module to load.
type module struct {
	Name    string // as the kernel calls it, with _ for -
	Content []byte // the ELF file, decompressed
}

// tree is a directory lib/modules/RELEASE.
type tree struct {
	dir     string
	files   map[string]string // a module's name → its file, relative to dir
	builtin map[string]bool   // names and aliases of what the kernel has built in
	read    map[string]*info
}

// info is a module's content and what it says of itself.
type info struct {
	content []byte
	depends []string // what the module's symbols come from
	before  []string // soft dependencies to load before it
	after   []string // … and after it
	aliases []string
}

// openTree lists a directory of modules. No dir is a kernel without modules.
func openTree(dir string) (*tree, error) {
	t := &tree{dir: dir, files: map[string]string{}, builtin: map[string]bool{}, read: map[string]*info{}}
	if dir == "" {
		return t, nil
	}
	// Not modules.dep: a distribution's package does not hold it, depmod makes it when the package is installed.
	err := filepath.WalkDir(filepath.Join(dir, "kernel"), func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base, _, isModule := strings.Cut(e.Name(), ".ko")
		if isModule && e.Type().IsRegular() {
			rel, err := filepath.Rel(dir, path)
			if err != nil {
				return err
			}
			t.files[moduleName(base)] = rel
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list modules: %w", err)
	}
	return t, t.readBuiltin()
}

// moduleName is a file's name as the kernel calls the module.
func moduleName(base string) string { return strings.ReplaceAll(base, "-", "_") }

// readBuiltin reads what is built in, and, where the kernel tells, by which other names that is asked for.
func (t *tree) readBuiltin() error {
	list, err := readOptional(filepath.Join(t.dir, "modules.builtin"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		base, _, _ := strings.Cut(filepath.Base(strings.TrimSpace(line)), ".ko")
		t.builtin[moduleName(base)] = true
	}
	infos, err := readOptional(filepath.Join(t.dir, "modules.builtin.modinfo"))
	if err != nil {
		return err
	}
	for field := range bytes.SplitSeq(infos, []byte{0}) {
		_, value, ok := strings.Cut(string(field), ".")
		if alias, isAlias := strings.CutPrefix(value, "alias="); ok && isAlias {
			t.builtin[moduleName(alias)] = true
		}
	}
	return nil
}

func readOptional(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// resolve reads the wanted modules with all that they depend on, each after what it needs. What is built in is left
// out; of optional what isn't there, too.
func (t *tree) resolve(wanted, optional []string) ([]module, error) {
	r := &resolution{tree: t, state: map[string]int{}}
	for _, name := range wanted {
		if err := r.add(name, name); err != nil {
			return nil, err
		}
	}
	for _, name := range optional {
		if t.has(name) {
			if err := r.add(name, name); err != nil {
				return nil, err
			}
		}
	}
	return r.order, nil
}

func (t *tree) has(name string) bool { return t.builtin[name] || t.files[name] != "" }

type resolution struct {
	tree  *tree
	state map[string]int // 0 not seen, 1 being added, 2 added
	order []module
}

func (r *resolution) add(name, whatFor string) error {
	name = moduleName(name)
	if r.tree.builtin[name] || r.state[name] != 0 {
		return nil // a circle can only be one of soft dependencies, which are wishes
	}
	if r.tree.files[name] == "" {
		for_ := ""
		if name != whatFor {
			for_ = " (for " + whatFor + ")"
		}
		return fmt.Errorf("the kernel has no module %s%s: neither built in nor below %s", name, for_, r.tree.dir)
	}
	r.state[name] = 1
	m, err := r.tree.info(name)
	if err != nil {
		return err
	}
	for _, d := range m.depends {
		if err := r.add(d, whatFor); err != nil {
			return err
		}
	}
	if err := r.addSoft(m.before, whatFor); err != nil {
		return err
	}
	r.order = append(r.order, module{Name: name, Content: m.content})
	r.state[name] = 2
	return r.addSoft(m.after, whatFor)
}

// addSoft adds soft dependencies, which name modules or what they are known by, as "crc32c" for what computes it.
// What isn't there isn't needed.
func (r *resolution) addSoft(names []string, whatFor string) error {
	for _, name := range names {
		name = moduleName(name)
		if !r.tree.has(name) {
			var err error
			if name, err = r.tree.providerOf(name); err != nil {
				return err
			}
			if name == "" {
				continue
			}
		}
		if err := r.add(name, whatFor); err != nil {
			return err
		}
	}
	return nil
}

// providerOf finds the module with an alias, among those that softdeps use aliases for: the crypto code's. The plain
// C form goes before one for processors that the guest may not have.
func (t *tree) providerOf(alias string) (string, error) {
	if t.builtin["crypto_"+alias] {
		return "", nil
	}
	var names []string
	for name, file := range t.files {
		if strings.Contains(file, "/crypto/") || strings.HasPrefix(file, "kernel/lib/") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	found := ""
	for _, name := range names {
		m, err := t.info(name)
		if err != nil {
			return "", err
		}
		for _, a := range m.aliases {
			if a = moduleName(a); a == alias || a == "crypto_"+alias {
				if strings.HasSuffix(name, "_generic") {
					return name, nil
				}
				if found == "" {
					found = name
				}
			}
		}
	}
	return found, nil
}

// info reads a module.
func (t *tree) info(name string) (*info, error) {
	if m := t.read[name]; m != nil {
		return m, nil
	}
	path := filepath.Join(t.dir, t.files[name])
	content, err := readModule(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read module %s: %w", path, err)
	}
	m, err := parseModule(content)
	if err != nil {
		return nil, fmt.Errorf("cannot read module %s: %w", path, err)
	}
	t.read[name] = m
	return m, nil
}

// readModule reads a module's file and decompresses it, so that the guest needs no code for it and any kernel loads
// it.
func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = bufio.NewReader(f)
	switch filepath.Ext(path) {
	case ".xz":
		r, err = xz.NewReader(r)
	case ".gz":
		r, err = gzip.NewReader(r)
	case ".zst":
		var d *zstd.Decoder
		if d, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1)); err == nil {
			defer d.Close()
			r = d
		}
	}
	if err != nil {
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, err
	}
	if len(content) > maxModule {
		return nil, fmt.Errorf("larger than %d MiB", maxModule>>20)
	}
	return content, nil
}

// parseModule reads what a module says of itself in its section .modinfo: "key=value" strings, each ended by a NUL.
func parseModule(content []byte) (*info, error) {
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no section .modinfo")
	}
	data, err := section.Data()
	if err != nil {
		return nil, err
	}
	m := &info{content: content}
	for field := range bytes.SplitSeq(data, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		switch key {
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					m.depends = append(m.depends, d)
				}
			}
		case "softdep":
			m.addSoftdep(value)
		case "alias":
			m.aliases = append(m.aliases, value)
		}
	}
	return m, nil
}

// addSoftdep reads "pre: a b post: c".
func (m *info) addSoftdep(value string) {
	var to *[]string
	for word := range strings.FieldsSeq(value) {
		switch {
		case word == "pre:":
			to = &m.before
		case word == "post:":
			to = &m.after
		case to != nil:
			*to = append(*to, word)
		}
	}
}
