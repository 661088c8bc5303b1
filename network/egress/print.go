package egress

import (
	"fmt"
	"io"
	"strconv"
	"strings"
)

const (
	printTime  = "2006-01-02T15:04:05.000Z" // UTC, as in the file
	maxPrinted = 300                        // of one name or answer; a DNS name has 253 characters, 1,004 when all are escaped

	red, dim, plain = "\x1b[31m", "\x1b[2m", "\x1b[0m"
)

// Print writes an event as one line for a person: time, arrow, name or connection, verdict, answers, time taken, bytes.
// What a guest can have made is printed as visible ASCII and the rest of it escaped as in a Go string, so that it can neither
// drive the terminal nor pass for another field; spaces are left in answers alone, where DNS's own notation quotes text. With tty, refusals and losses are red and cached answers dim.
func Print(w io.Writer, e Event, tty bool) error {
	var b strings.Builder
	colour := ""
	switch {
	case !tty:
	case e.Verdict == Refused || e.Kind == KindLost || e.Kind == KindDropped:
		colour = red
	case e.Cached:
		colour = dim
	}
	b.WriteString(colour)
	b.WriteString(e.Time.UTC().Format(printTime))
	switch e.Kind {
	case KindQuery:
		printQuery(&b, e)
	case KindOpen:
		fmt.Fprintf(&b, " → %s", connection(e))
		if e.Verdict != "" {
			b.WriteByte(' ')
			b.WriteString(printable(e.Verdict))
		}
	case KindClose:
		fmt.Fprintf(&b, " ← %s out %s in %s", connection(e), quantity(e.BytesOut), quantity(e.BytesIn))
		if e.Seconds > 0 {
			fmt.Fprintf(&b, " %.1f s", e.Seconds)
		}
	default:
		fmt.Fprintf(&b, " ! %s", printable(e.Kind))
		if e.Count > 0 {
			fmt.Fprintf(&b, " %d", e.Count)
		}
	}
	if e.Reason != "" {
		b.WriteString(": ")
		b.WriteString(sentence(e.Reason))
	}
	if colour != "" {
		b.WriteString(plain)
	}
	b.WriteByte('\n')
	_, err := io.WriteString(w, b.String())
	return err
}

func printQuery(b *strings.Builder, e Event) {
	fmt.Fprintf(b, " ? %s %s %s", orDash(e.Name), orDash(e.Type), printable(e.Verdict))
	if e.RCode != "" && e.RCode != "NOERROR" {
		b.WriteByte(' ')
		b.WriteString(printable(e.RCode))
	}
	if len(e.Answers) > 0 {
		b.WriteString(" [")
		for i, a := range e.Answers {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(sentence(a))
		}
		b.WriteByte(']')
	} else if e.RCode == "NOERROR" && e.Verdict == Allowed {
		b.WriteString(" []")
	}
	fmt.Fprintf(b, " %.1f ms", e.Millis)
	switch {
	case e.Cached:
		b.WriteString(" cached")
	case e.Upstream != "":
		b.WriteString(" from ")
		b.WriteString(printable(e.Upstream))
	}
}

func connection(e Event) string {
	s := orDash(e.Proto) + " " + orDash(e.Source) + " " + orDash(e.Destination)
	if e.Type != "" {
		s += " " + printable(e.Type)
	}
	if e.Name != "" {
		s += " (" + printable(e.Name) + ")"
	}
	return s
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return printable(s)
}

func printable(s string) string { return escape(s, false) }
func sentence(s string) string  { return escape(s, true) }

// escape leaves visible ASCII, and spaces where they are wanted.
func escape(s string, spaces bool) string {
	tooLong := len(s) > maxPrinted
	if tooLong {
		s = s[:maxPrinted]
	}
	clean := true
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			clean = false
			break
		}
	}
	if clean && !tooLong {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == ' ' && !spaces:
			b.WriteString(`\x20`)
		case r >= ' ' && r <= '~':
			b.WriteByte(byte(r))
		default:
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		}
	}
	if tooLong {
		b.WriteString("...")
	}
	return b.String()
}

// quantity writes bytes as people read them, in powers of 1000.
func quantity(n uint64) string {
	if n < 1000 {
		return strconv.FormatUint(n, 10) + " B"
	}
	f := float64(n)
	for _, unit := range []string{"kB", "MB", "GB", "TB"} {
		f /= 1000
		if f < 999.95 {
			return strconv.FormatFloat(f, 'f', 1, 64) + " " + unit
		}
	}
	return strconv.FormatFloat(f/1000, 'f', 1, 64) + " PB"
}
