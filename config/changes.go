package config

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Field is one value of an effective declaration, as Show prints it.
type Field struct {
	Path     string `json:"path"` // "memory", "volumes[0].size"
	Value    string `json:"value"`
	Declared bool   `json:"declared,omitempty"` // and no default
}

// Top is the declaration's own field that this is a part of.
func (f Field) Top() string { return top(f.Path) }

func top(path string) string {
	if i := strings.IndexAny(path, ".["); i > 0 {
		return path[:i]
	}
	return path
}

// Fields are all values of the effective declaration, in the order of Show. Lists of plain values are one value.
func (vm *VM) Fields() []Field {
	var all []Field
	add := func(path, value string) {
		_, declared := vm.places[path]
		all = append(all, Field{path, value, declared})
	}
	var walk func(path string, value any)
	walk = func(path string, value any) {
		switch value := value.(type) {
		case nil:
		case []pair:
			for _, p := range value {
				walk(join(path, p.key), p.value)
			}
			if len(value) == 0 {
				add(path, "{}")
			}
		case []any:
			if flat, ok := flow(value); ok {
				add(path, flat)
				return
			}
			for i, item := range value {
				walk(fmt.Sprintf("%s[%d]", path, i), item)
			}
		default:
			add(path, scalar(value))
		}
	}
	for _, p := range vm.show() {
		walk(p.key, p.value)
	}
	return all
}

// Digest stands for fields: two declarations that mean the same VM have the same.
func Digest(fields []Field) string {
	h := sha256.New()
	for _, f := range fields {
		io.WriteString(h, f.Path+"\x00"+f.Value+"\x00")
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Change is a field whose value differs between two declarations.
type Change struct {
	Field string `json:"field"`
	Was   string `json:"was,omitempty"` // empty: it wasn't there
	Is    string `json:"is,omitempty"`  // empty: it isn't there any more
}

// Top is the declaration's own field that this is a part of.
func (c Change) Top() string { return top(c.Field) }

// String is the change for a person.
func (c Change) String() string {
	switch {
	case c.Was == "":
		return c.Field + " added: " + c.Is
	case c.Is == "":
		return c.Field + " removed: " + c.Was
	}
	return c.Field + " " + c.Was + " → " + c.Is
}

// Changes compares two declarations field by field, in the order of the new one; what isn't there any more comes last.
// A default that the older program did not know of is no change.
func Changes(was, is []Field) []Change {
	find := func(all []Field, path string) (Field, bool) {
		i := slices.IndexFunc(all, func(f Field) bool { return f.Path == path })
		if i < 0 {
			return Field{}, false
		}
		return all[i], true
	}
	var all []Change
	for _, f := range is {
		before, there := find(was, f.Path)
		known := there || slices.ContainsFunc(was, func(w Field) bool { return w.Top() == f.Top() })
		if before.Value != f.Value && (known || f.Declared || inDeclared(is, f)) {
			all = append(all, Change{Field: f.Path, Was: before.Value, Is: f.Value})
		}
	}
	for _, f := range was {
		if _, there := find(is, f.Path); !there {
			all = append(all, Change{Field: f.Path, Was: f.Value})
		}
	}
	return all
}

// inDeclared says whether a field is a default within something that is declared, such as the mode of a new secret.
func inDeclared(all []Field, f Field) bool {
	return slices.ContainsFunc(all, func(o Field) bool { return o.Declared && o.Top() == f.Top() })
}
