package main

import (
	"fmt"
	"io"
	"unicode"
	"unicode/utf8"
)

// visible writes text with its control characters but newline and tab made
// visible, as `cat -v` does, and bytes that are no text as \xHH. What also
// drives a terminal, or turns its text around, is among them: the C1 controls,
// which xterm obeys in UTF-8 too, and marks of writing direction.
type visible struct {
	out  io.Writer
	rest []byte // the beginning of a letter whose end is not written yet
}

func (v *visible) Write(p []byte) (int, error) {
	text := append(v.rest, p...)
	v.rest = nil
	safe := make([]byte, 0, len(text))
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		if r == utf8.RuneError && size == 1 && !utf8.FullRune(text) {
			v.rest = append([]byte(nil), text...)
			break
		}
		safe = appendVisible(safe, r, text[:size])
		text = text[size:]
	}
	if _, err := v.out.Write(safe); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close writes what was left of a letter that never ended.
func (v *visible) Close() error {
	var safe []byte
	for _, b := range v.rest {
		safe = appendVisible(safe, utf8.RuneError, []byte{b})
	}
	v.rest = nil
	_, err := v.out.Write(safe)
	return err
}

// appendVisible appends the letter r, which is written as raw.
func appendVisible(safe []byte, r rune, raw []byte) []byte {
	switch {
	case r == '\r':
		return safe
	case r == utf8.RuneError && len(raw) == 1:
		return fmt.Appendf(safe, `\x%02x`, raw[0])
	case r == '\n' || r == '\t':
		return append(safe, raw...)
	case r < ' ':
		return append(safe, '^', byte(r)+'@')
	case r == 0x7f:
		return append(safe, '^', '?')
	case unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r):
		return fmt.Appendf(safe, "<%U>", r)
	}
	return append(safe, raw...)
}

// onScreen is text for a terminal, made visible.
func onScreen(s string) string {
	var safe []byte
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		safe = appendVisible(safe, r, []byte(s[:size]))
		s = s[size:]
	}
	return string(safe)
}
