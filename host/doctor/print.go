package doctor

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// Print writes the findings for people: a line each, those of the host first, then each VM's, and what to do below those for which
// there is something. With quiet, only what needs a person is written: warnings, errors, and what could not be looked at.
func Print(w io.Writer, all []Finding, quiet bool) error {
	shown := all
	if quiet {
		shown = nil
		for _, f := range all {
			if f.Severity == Unknown || f.Severity == Warning || f.Severity == Error {
				shown = append(shown, f)
			}
		}
	}
	width := 0
	for _, f := range shown {
		width = max(width, utf8.RuneCountInString(f.Check))
	}
	var b strings.Builder
	vm, first := "", true
	for _, f := range shown {
		if first || f.VM != vm {
			title := "host"
			if f.VM != "" {
				title = "VM " + f.VM
			}
			if !first {
				b.WriteString("\n")
			}
			fmt.Fprintf(&b, "%s\n", title)
			vm, first = f.VM, false
		}
		fmt.Fprintf(&b, "  %-8s %-*s  %s\n", f.Severity, width, f.Check, printable(f.Seen))
		if f.Do != "" {
			fmt.Fprintf(&b, "  %-8s %-*s  → %s\n", "", width, "", printable(f.Do))
		}
	}
	if !first {
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "%s\n", summary(all))
	_, err := io.WriteString(w, b.String())
	return err
}

// printable keeps what others wrote, such as the name of a chain, from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// summary counts the findings, the worst first.
func summary(all []Finding) string {
	count := map[Severity]int{}
	for _, f := range all {
		count[f.Severity]++
	}
	var parts []string
	for i := len(order) - 1; i >= 0; i-- {
		n, s := count[order[i]], order[i]
		if n == 0 {
			continue
		}
		word := string(s)
		if n > 1 && (s == Note || s == Warning || s == Error) {
			word += "s"
		}
		parts = append(parts, fmt.Sprintf("%d %s", n, word))
	}
	return strings.Join(parts, ", ")
}
