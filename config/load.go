package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// endings are what a declaration's file may end with. JSON is read everywhere; the ending says nothing about it.
var endings = []string{".yaml", ".yml", ".json"}

// Load reads the declaration at path; the VM is called as the file is, without its ending. Host holds for all VMs; nil means
// its defaults. The error is Problems where the declaration is at fault, and wraps fs.ErrNotExist where there is none.
func Load(path string, h *Host) (*VM, error) {
	base := filepath.Base(path)
	ending := filepath.Ext(base)
	if !slices.Contains(endings, ending) {
		return nil, Problems{{File: path, Wrong: "it isn't called as a declaration is", Want: "a name that ends with .yaml, .yml or .json"}}
	}
	name := strings.TrimSuffix(base, ending)
	if err := ValidName(name); err != nil {
		return nil, Problems{{File: path, Wrong: "the VM would be called as the file: " + err.Error()}}
	}
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(name, path, data, h)
}

// readFile reads a regular file of a bounded size. It neither waits for a pipe's writer nor opens a device for good.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot read the declaration %s: there is no such file: %w", path, fs.ErrNotExist)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the declaration: %w", err)
	}
	data, err := readRegular(f, path)
	if closing := f.Close(); err == nil && closing != nil {
		err = fmt.Errorf("cannot read the declaration: %w", closing)
	}
	return data, err
}

func readRegular(f *os.File, path string) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot read the declaration: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, Problems{{File: path, Wrong: "it is " + fileType(info.Mode()), Want: "a file"}}
	}
	if info.Size() > maxFile {
		return nil, Problems{tooLarge(path)}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1)) // it may grow meanwhile; Parse refuses the one byte more
	if err != nil {
		return nil, fmt.Errorf("cannot read the declaration %s: %w", path, err)
	}
	return data, nil
}

func tooLarge(path string) Problem {
	return Problem{File: path, Wrong: "it is larger than " + Size(maxFile).String(), Want: "a declaration, which is some 1 KiB"}
}

func fileType(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a directory"
	case m&fs.ModeNamedPipe != 0:
		return "a pipe"
	case m&fs.ModeSocket != 0:
		return "a socket"
	default:
		return "a device"
	}
}

// Parse reads the declaration data of the VM called name; file is where it came from, for messages and relative paths. The
// error is Problems: all of them.
func Parse(name, file string, data []byte, h *Host) (*VM, error) {
	if err := ValidName(name); err != nil {
		return nil, Problems{{File: file, Wrong: err.Error()}}
	}
	root, problems := readTree(file, data)
	if len(problems) > 0 {
		return nil, problems.sorted()
	}
	if h == nil || !h.Address.Addr().Is4() {
		h = defaultHost()
	}
	vm := &VM{Name: name, File: file}
	vm.fillDefaults()
	d := decoder{places: map[string]place{}}
	if root.kind == mapping && h.defaults != nil {
		root = merge(h.defaults, root, "")
	}
	d.vm(root, "", vm, h)
	if root.kind == mapping {
		d.crossCheck(vm, place{file, 1, 1})
	}
	if len(d.problems) > 0 {
		return nil, d.problems.sorted()
	}
	vm.places = d.places
	return vm, nil
}

// whole are the fields whose parts exclude each other: a declaration replaces the default's as a whole.
var whole = []string{"overlay", "run.ready"}

// merge lays a declaration over the host's defaults: mappings are merged, all else is replaced.
func merge(under, over *node, path string) *node {
	secret := strings.HasPrefix(path, "secrets.")
	if under.kind != mapping || over.kind != mapping || slices.Contains(whole, path) || secret {
		return over
	}
	out := *over
	out.entries = slices.Clone(over.entries)
	for _, e := range under.entries {
		exclusive := path == "" && (e.key == "run" && over.get("openclaw") != nil || e.key == "openclaw" && over.get("run") != nil)
		i := slices.IndexFunc(out.entries, func(o entry) bool { return o.key == e.key })
		switch {
		case exclusive:
		case i < 0:
			out.entries = append(out.entries, e)
		default:
			out.entries[i].value = merge(e.value, out.entries[i].value, join(path, e.key))
		}
	}
	return &out
}
