package config

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// decoder turns nodes into values, notes where each field stands, and collects what is wrong.
type decoder struct {
	problems Problems
	places   map[string]place
}

// field is a key that a mapping may have.
type field struct {
	name string
	read func(n *node, path string)
}

func (d *decoder) fail(at place, path, wrong, want string) {
	d.problems = append(d.problems, Problem{File: at.file, Line: at.line, Column: at.column, Field: path, Wrong: wrong, Want: want})
}

// check fails where something is wrong.
func (d *decoder) check(n *node, path, wrong, want string) bool {
	if wrong != "" {
		d.fail(n.place, path, wrong, want)
	}
	return wrong == ""
}

// fields reads a mapping with known keys.
func (d *decoder) fields(n *node, path string, known ...field) bool {
	names := make([]string, len(known))
	for i, f := range known {
		names[i] = f.name
	}
	if n.kind != mapping {
		d.fail(n.place, path, n.describe(), "a mapping with "+strings.Join(names, ", "))
		return false
	}
	for _, e := range n.entries {
		where := join(path, e.key)
		i := slices.Index(names, e.key)
		if i < 0 {
			want := "one of " + strings.Join(names, ", ")
			if meant := nearest(e.key, names); meant != "" {
				want = meant + ", most likely"
			}
			d.fail(e.place, bounded(where), "there is no such field", want)
			continue
		}
		d.places[where] = e.value.place
		known[i].read(e.value, where)
	}
	return true
}

// each reads a mapping whose keys are names.
func (d *decoder) each(n *node, path, want string, read func(key string, at place, n *node, path string)) {
	if n.kind != mapping {
		d.fail(n.place, path, n.describe(), want)
		return
	}
	for _, e := range n.entries {
		where := join(path, e.key)
		d.places[where] = e.value.place
		read(e.key, e.place, e.value, bounded(where))
	}
}

func (d *decoder) items(n *node, path, want string, read func(n *node, path string)) {
	if n.kind != list {
		d.fail(n.place, path, n.describe(), want)
		return
	}
	for i, item := range n.items {
		where := fmt.Sprintf("%s[%d]", path, i)
		d.places[where] = item.place
		read(item, where)
	}
}

func (d *decoder) text(n *node, path, want string) (string, bool) {
	if n.kind != text {
		if n.kind == boolean || n.kind == float {
			want += ", in quotes"
		}
		d.fail(n.place, path, n.describe(), want)
		return "", false
	}
	return n.text, true
}

// name reads a text that may consist of digits alone, which YAML takes for a number.
func (d *decoder) name(n *node, path, want string) (string, bool) {
	if n.kind == integer {
		return n.text, true
	}
	return d.text(n, path, want)
}

func (d *decoder) oneOf(n *node, path string, values ...string) (string, bool) {
	want := "one of " + strings.Join(values, ", ")
	s, ok := d.text(n, path, want)
	if !ok {
		return "", false
	}
	if slices.Contains(values, s) {
		return s, true
	}
	if meant := nearest(s, values); meant != "" {
		want += "; " + meant + " may be meant"
	}
	d.fail(n.place, path, "is "+quoted(s), want)
	return "", false
}

func (d *decoder) integer(n *node, path string, least, most int64) (int64, bool) {
	want := fmt.Sprintf("a whole number from %d to %d", least, most)
	if n.kind != integer {
		d.fail(n.place, path, n.describe(), want)
		return 0, false
	}
	i, ok := n.value.(int64)
	if !ok || i < least || i > most {
		d.fail(n.place, path, "is "+n.text, want)
		return 0, false
	}
	return i, true
}

func (d *decoder) boolean(n *node, path string) bool {
	b, ok := n.value.(bool)
	if n.kind != boolean || !ok {
		d.fail(n.place, path, n.describe(), "true or false")
	}
	return b
}

// size reads a size. Each must be a multiple of step.
func (d *decoder) size(n *node, path string, least, most, step Size, why string) Size {
	want := fmt.Sprintf("a size such as %s", max(least, 512<<20))
	if n.kind != integer && n.kind != text {
		d.fail(n.place, path, n.describe(), want)
		return 0
	}
	var s Size
	if i, ok := n.value.(int64); n.kind == integer && ok {
		s = Size(i)
	} else {
		var err error
		if s, err = ParseSize(n.text); err != nil {
			d.fail(n.place, path, quoted(n.text)+" is no size: "+err.Error(), want)
			return 0
		}
	}
	switch {
	case s < least:
		d.fail(n.place, path, fmt.Sprintf("%s is too small: %s", n.text, why), "at least "+least.String())
	case s > most:
		d.fail(n.place, path, n.text+" is too large", "at most "+most.String())
	case s%step != 0:
		d.fail(n.place, path, fmt.Sprintf("%s isn't a multiple of %d bytes", n.text, int64(step)), max(least, s/mebibyte*mebibyte).String())
	default:
		return s
	}
	return 0
}

func (d *decoder) duration(n *node, path string) time.Duration {
	want := "a duration from 1s to " + maxTimeout.String() + ", such as 30s"
	if n.kind != text {
		d.fail(n.place, path, n.describe(), want)
		return 0
	}
	t, err := time.ParseDuration(n.text)
	if err != nil {
		d.fail(n.place, path, quoted(n.text)+" is no duration", want)
		return 0
	}
	if t < time.Second || t > maxTimeout {
		d.fail(n.place, path, "is "+quoted(n.text), want)
		return 0
	}
	return t
}

func (d *decoder) address(n *node, path, want string) (netip.Addr, bool) {
	s, ok := d.text(n, path, want)
	if !ok {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		d.fail(n.place, path, quoted(s)+" is no address", want)
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

func (d *decoder) strings(n *node, path, want string, check func(string) (wrong, want string)) []string {
	var all []string
	d.items(n, path, want, func(n *node, path string) {
		s, ok := d.name(n, path, "text")
		if !ok {
			return
		}
		if wrong, want := check(s); d.check(n, path, wrong, want) {
			all = append(all, s)
		}
	})
	return all
}

// hostPath reads a path on the host and makes it absolute: a relative one starts at the declaration's directory.
func (d *decoder) hostPath(n *node, path string) string {
	const want = "a path on the host, absolute or from the declaration's directory"
	s, ok := d.text(n, path, want)
	switch {
	case !ok:
		return ""
	case s == "" || len(s) > 4095 || unprintable(s):
		d.fail(n.place, path, "isn't a path of printable characters", want)
		return ""
	case strings.HasPrefix(s, "~"):
		d.fail(n.place, path, quoted(s)+" starts with ~, which only a shell knows", "the whole path; ./"+s+" if that is its name")
		return ""
	case filepath.IsAbs(s):
		return filepath.Clean(s)
	}
	dir, err := filepath.Abs(filepath.Dir(n.file))
	if err != nil {
		d.fail(n.place, path, "the directory of the declaration is unknown: "+err.Error(), "an absolute path")
		return ""
	}
	return filepath.Join(dir, s)
}

// describe says what a node is where something else was wanted. It doesn't repeat a text: it may be a secret at the wrong place.
func (n *node) describe() string {
	switch n.kind {
	case null:
		return "has no value"
	case boolean, integer, float:
		return "is " + n.text
	case list:
		return "is a list"
	case mapping:
		return "is a mapping"
	default:
		return "is text"
	}
}

func bounded(path string) string {
	if len(path) <= 160 && !unprintable(path) {
		return path
	}
	q := fmt.Sprintf("%q", path)
	if len(q) > 160 {
		q = strings.ToValidUTF8(q[:160], "") + "…"
	}
	return q
}
