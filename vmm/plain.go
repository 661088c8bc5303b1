package vmm

import (
	"strings"
	"unicode"
)

// Plain is what a VMM said, fit for a message: without what a terminal would act on, and without what is no text. A guest that
// has taken its VMM over says what it likes.
func Plain(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n':
			return r
		case r == '\t':
			return ' '
		case r == '\r':
			return -1
		case r == unicode.ReplacementChar || unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r):
			return '?'
		}
		return r
	}, s)
}
