package config

import (
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with a declaration.
type Problem struct {
	File         string
	Line, Column int    // from 1; 0: the file as a whole
	Field        string // its path, such as volumes[0].mount; empty: the file as a whole
	Wrong        string // what is wrong with it
	Want         string // what would be right, to be read after "want"; may be empty
}

// String is the problem as one line: file:line:column: field: what is wrong; want what would be right.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
	}
	b.WriteString(": ")
	if p.Field != "" {
		b.WriteString(p.Field + ": ")
	}
	b.WriteString(p.Wrong)
	if p.Want != "" {
		b.WriteString("; want " + p.Want)
	}
	return b.String()
}

// Problem is what a later look at the host finds wrong with a field, in the words and with the place of the declaration's own
// check. The field is a path such as shares[0].source; of one that isn't declared, its default is at fault, and no line is named.
func (vm *VM) Problem(field, wrong, want string) Problems {
	at, ok := vm.places[field]
	if !ok {
		at = place{file: vm.File}
	}
	return Problems{{File: at.file, Line: at.line, Column: at.column, Field: field, Wrong: wrong, Want: want}}
}

// Problems is everything that is wrong with a declaration, in the order of its lines. It is the error of Load, Parse and
// LoadHost.
type Problems []Problem

// Error prints a line for each problem.
func (ps Problems) Error() string {
	lines := make([]string, 0, len(ps))
	for i, p := range ps {
		if i == maxShown {
			lines = append(lines, fmt.Sprintf("%s: and %d more", p.File, len(ps)-maxShown))
			break
		}
		lines = append(lines, p.String())
	}
	return strings.Join(lines, "\n")
}

func (ps Problems) sorted() Problems {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		if c := strings.Compare(a.File, b.File); c != 0 {
			return c
		}
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return slices.Compact(ps)
}

// nearest gives the word of known that a typo most likely meant, or none.
func nearest(word string, known []string) string {
	best, found := 1+len(word)/3, "" // one slip in three letters
	for _, k := range known {
		if strings.EqualFold(k, word) {
			return k
		}
		if d := distance(strings.ToLower(word), strings.ToLower(k)); d <= best && d < len(k) && (found == "" || d < best) {
			best, found = d, k
		}
	}
	return found
}

// distance is how many letters must be added, dropped, changed or swapped with their neighbour (optimal string alignment).
func distance(a, b string) int {
	if len(a) > maxSecretName {
		return len(a) // no field has such a length, and the table is quadratic
	}
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
