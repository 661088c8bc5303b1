package storage

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// A manifest is the canonical text of a tree: a first line that names the
// format, then a line for each entry. A directory's entries follow it at
// once, siblings in the order of their names' bytes. A line's fields are
// separated by one space:
//
//	TYPE MODE UID GID SECONDS.NANOSECONDS SIZE SHA256|- PATH LINK|- [XATTR=HEX...]
//
// TYPE is d, f (file), l (symbolic link), p (FIFO), or h: a further name of
// the file whose path is in LINK, which is the first of its names in this
// order. SIZE is of the file's content or the link's text, 0 for others. The
// root's path is ".". In paths, links and attribute names every byte that
// isn't a printable ASCII character, and '%', is written %XX; so is the '='
// of an attribute's name, and a path or link that is just "-".
const manifestHeader = "clawvm-image 1\n"

// Bounds of an entry. A path is what one system call takes.
const (
	maxPath      = 4095
	maxName      = 255
	maxXAttrs    = 128 << 10 // names and values of one entry together, twice what ext4 and Linux's list take
	maxEntryLine = 1 << 20   // all of the above, escaped
)

type entryType byte

const (
	typeDir      entryType = 'd'
	typeFile     entryType = 'f'
	typeSymlink  entryType = 'l'
	typeFIFO     entryType = 'p'
	typeHardLink entryType = 'h'
)

// entry is one line of a manifest.
type entry struct {
	kind     entryType
	mode     uint32 // the twelve permission bits
	uid, gid uint32
	sec      int64 // modification time
	nsec     int64
	size     int64
	sum      []byte // content's SHA-256, files only
	path     string // relative to the root, which is ""
	link     string
	xattrs   []xattr // sorted by name
}

type xattr struct{ name, value string }

const hexDigits = "0123456789ABCDEF"

// appendEscaped appends a path or attribute name so that it has no byte that
// a manifest gives a meaning to.
func appendEscaped(b []byte, s, special string) []byte {
	if s == "-" {
		return append(b, "%2D"...)
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c <= ' ' || c >= 0x7f || c == '%' || strings.IndexByte(special, c) >= 0 {
			b = append(b, '%', hexDigits[c>>4], hexDigits[c&15])
		} else {
			b = append(b, c)
		}
	}
	return b
}

// appendPadded appends a number with zeros in front.
func appendPadded(b []byte, n uint64, base, width int) []byte {
	var digits [64]byte
	d := strconv.AppendUint(digits[:0], n, base)
	for i := len(d); i < width; i++ {
		b = append(b, '0')
	}
	return append(b, d...)
}

// appendLine appends the entry's line.
func (e *entry) appendLine(b []byte) []byte {
	b = append(b, byte(e.kind), ' ')
	b = appendPadded(b, uint64(e.mode), 8, 4)
	b = append(b, ' ')
	b = strconv.AppendUint(b, uint64(e.uid), 10)
	b = append(b, ' ')
	b = strconv.AppendUint(b, uint64(e.gid), 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, e.sec, 10)
	b = append(b, '.')
	b = appendPadded(b, uint64(e.nsec), 10, 9)
	b = append(b, ' ')
	b = strconv.AppendInt(b, e.size, 10)
	b = append(b, ' ')
	if e.sum == nil {
		b = append(b, '-')
	} else {
		b = hex.AppendEncode(b, e.sum)
	}
	b = append(b, ' ')
	if e.path == "" {
		b = append(b, '.')
	} else {
		b = appendEscaped(b, e.path, "")
	}
	b = append(b, ' ')
	if e.link == "" {
		b = append(b, '-')
	} else {
		b = appendEscaped(b, e.link, "")
	}
	for _, x := range e.xattrs {
		b = append(b, ' ')
		b = appendEscaped(b, x.name, "=")
		b = append(b, '=')
		b = hex.AppendEncode(b, []byte(x.value))
	}
	return append(b, '\n')
}

// writeManifest writes the manifest of entries that are in order.
func writeManifest(w io.Writer, entries []entry) error {
	if _, err := io.WriteString(w, manifestHeader); err != nil {
		return err
	}
	var line []byte
	for i := range entries {
		line = entries[i].appendLine(line[:0])
		if _, err := w.Write(line); err != nil {
			return err
		}
	}
	return nil
}

var errManifest = errors.New("malformed manifest")

// manifestReader reads a manifest an entry at a time, so that checking an
// image of any size takes little memory.
type manifestReader struct {
	lines   *bufio.Scanner
	started bool
	open    []string // the directories that the next entry may be in, outermost first
	last    string
	check   []byte
}

func newManifestReader(r io.Reader) *manifestReader {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 64<<10), maxEntryLine)
	lines.Split(scanWholeLines)
	return &manifestReader{lines: lines}
}

// scanWholeLines yields lines with their newline; a last line without one is
// an error, since a manifest that was cut off must not pass.
func scanWholeLines(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexByte(data, '\n'); i >= 0 {
		return i + 1, data[:i+1], nil
	}
	if atEOF && len(data) > 0 {
		return 0, nil, fmt.Errorf("%w: its last line isn't complete", errManifest)
	}
	return 0, nil, nil
}

// next returns the next entry, or io.EOF. What isn't exactly what
// writeManifest would write is an error.
func (m *manifestReader) next() (*entry, error) {
	if !m.started {
		if !m.lines.Scan() {
			return nil, m.end(fmt.Errorf("%w: it is empty", errManifest))
		}
		if m.lines.Text() != manifestHeader {
			return nil, fmt.Errorf("%w: its first line isn't %q", errManifest, strings.TrimSpace(manifestHeader))
		}
		m.started = true
		if !m.lines.Scan() {
			return nil, m.end(fmt.Errorf("%w: it has no entries", errManifest))
		}
		e, err := m.parse(m.lines.Bytes())
		if err == nil && (e.path != "" || e.kind != typeDir) {
			err = fmt.Errorf("%w: its first entry isn't the root directory", errManifest)
		}
		if err != nil {
			return nil, err
		}
		m.open = []string{""}
		return e, nil
	}
	if !m.lines.Scan() {
		return nil, m.end(io.EOF)
	}
	e, err := m.parse(m.lines.Bytes())
	if err != nil {
		return nil, err
	}
	if err := m.place(e); err != nil {
		return nil, err
	}
	return e, nil
}

func (m *manifestReader) end(atEOF error) error {
	if err := m.lines.Err(); err != nil {
		return err
	}
	return atEOF
}

// place checks that the entry comes where it belongs.
func (m *manifestReader) place(e *entry) error {
	if e.path == "" || comparePaths(m.last, e.path) >= 0 {
		return fmt.Errorf("%w: %q is out of order", errManifest, e.path)
	}
	parent := parentOf(e.path)
	for len(m.open) > 0 && m.open[len(m.open)-1] != parent {
		m.open = m.open[:len(m.open)-1]
	}
	if len(m.open) == 0 {
		return fmt.Errorf("%w: %q is in no directory", errManifest, e.path)
	}
	if e.kind == typeDir {
		m.open = append(m.open, e.path)
	}
	if e.kind == typeHardLink && comparePaths(e.link, e.path) >= 0 {
		return fmt.Errorf("%w: %q is a link to a later entry", errManifest, e.path)
	}
	m.last = e.path
	return nil
}

func (m *manifestReader) parse(line []byte) (*entry, error) {
	bad := func() (*entry, error) {
		shown := line
		if len(shown) > 200 {
			shown = shown[:200]
		}
		return nil, fmt.Errorf("%w: line %q", errManifest, shown)
	}
	// One copy of the line serves all of the entry's strings.
	rest := strings.TrimSuffix(string(line), "\n")
	var fields [9]string
	for i := range fields {
		field, after, more := strings.Cut(rest, " ")
		if !more && i < len(fields)-1 {
			return bad()
		}
		fields[i], rest = field, after
	}
	if len(fields[0]) != 1 {
		return bad()
	}
	e := &entry{kind: entryType(fields[0][0])}
	sec, nsec, ok := strings.Cut(fields[4], ".")
	if !ok {
		return bad()
	}
	mode, err1 := strconv.ParseUint(fields[1], 8, 12)
	uid, err2 := strconv.ParseUint(fields[2], 10, 32)
	gid, err3 := strconv.ParseUint(fields[3], 10, 32)
	var err4, err5, err6 error
	e.sec, err4 = strconv.ParseInt(sec, 10, 64)
	e.nsec, err5 = strconv.ParseInt(nsec, 10, 64)
	e.size, err6 = strconv.ParseInt(fields[5], 10, 64)
	if errors.Join(err1, err2, err3, err4, err5, err6) != nil || e.size < 0 || e.nsec < 0 || e.nsec > 999999999 {
		return bad()
	}
	e.mode, e.uid, e.gid = uint32(mode), uint32(uid), uint32(gid)
	if fields[6] != "-" {
		sum, err := hex.DecodeString(fields[6])
		if err != nil || len(sum) != 32 {
			return bad()
		}
		e.sum = sum
	}
	if fields[7] != "." {
		if e.path, ok = unescape(fields[7]); !ok || !validPath(e.path) {
			return bad()
		}
	}
	if fields[8] != "-" {
		if e.link, ok = unescape(fields[8]); !ok {
			return bad()
		}
	}
	last := ""
	for rest != "" {
		var f string
		f, rest, _ = strings.Cut(rest, " ")
		name, value, ok := strings.Cut(f, "=")
		if !ok {
			return bad()
		}
		if name, ok = unescape(name); !ok || name <= last {
			return bad()
		}
		raw, err := hex.DecodeString(value)
		if err != nil {
			return bad()
		}
		last = name
		e.xattrs = append(e.xattrs, xattr{name, string(raw)})
	}
	if !e.sound() {
		return bad()
	}
	// What was read must be what would be written: one tree, one text.
	m.check = e.appendLine(m.check[:0])
	if !bytes.Equal(m.check, line) {
		return bad()
	}
	return e, nil
}

// sound says whether the fields suit the type.
func (e *entry) sound() bool {
	switch e.kind {
	case typeDir, typeFIFO:
		return e.sum == nil && e.link == "" && e.size == 0
	case typeFile:
		return e.sum != nil && e.link == ""
	case typeSymlink:
		return e.sum == nil && e.link != "" && e.size == int64(len(e.link))
	case typeHardLink:
		return e.sum == nil && validPath(e.link)
	}
	return false
}

func unescape(s string) (string, bool) {
	if strings.IndexByte(s, '%') < 0 {
		return s, s != ""
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b = append(b, s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", false
		}
		c, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
		if err != nil {
			return "", false
		}
		b = append(b, byte(c))
		i += 2
	}
	return string(b), len(b) > 0
}

// validPath says whether a path is relative, clean and short enough.
func validPath(p string) bool {
	if p == "" || len(p) > maxPath || strings.IndexByte(p, 0) >= 0 {
		return false
	}
	for name := range strings.SplitSeq(p, "/") {
		if name == "" || name == "." || name == ".." || len(name) > maxName {
			return false
		}
	}
	return true
}

// parentOf returns the path of the directory that a path is in; "" is the root.
func parentOf(p string) string {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i]
	}
	return ""
}

// comparePaths orders paths by their components' bytes, which is the order of
// a walk: '/' sorts before every other byte.
func comparePaths(a, b string) int {
	for i := 0; i < len(a) && i < len(b); i++ {
		if a[i] == b[i] {
			continue
		}
		switch {
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		case a[i] < b[i]:
			return -1
		}
		return 1
	}
	return len(a) - len(b)
}
