package main

import (
	"bytes"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestVisible(t *testing.T) {
	for text, want := range map[string]string{
		"plain\ttext\r\n":        "plain\ttext\n",
		"\x1b[2J\x07\x7f":        "^[[2J^G^?",
		"ü€😀":                    "ü€😀",
		"\u009b31m":              "<U+009B>31m",
		"\x9b31m \xc3":           `\x9b31m \xc3`,
		"\u202egnp.exe\u2066":    "<U+202E>gnp.exe<U+2066>",
		"\xf0\x9f\x98 cut short": `\xf0\x9f\x98 cut short`,
	} {
		for _, size := range []int{1, 2, 3, 100} {
			if got := throughVisible(t, []byte(text), size); got != want {
				t.Errorf("%q in pieces of %d: %q, want %q", text, size, got, want)
			}
		}
		if got := onScreen(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func throughVisible(t *testing.T, text []byte, size int) string {
	t.Helper()
	var out bytes.Buffer
	v := &visible{out: &out}
	for len(text) > 0 {
		n := min(size, len(text))
		if m, err := v.Write(text[:n]); err != nil || m != n {
			t.Fatalf("%d, %v", m, err)
		}
		text = text[n:]
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// FuzzVisible prints what a guest wrote to its console on a terminal.
func FuzzVisible(f *testing.F) {
	for _, s := range []string{"plain", "\x1b]0;title\x07", "\xc2\x9b", "\xff\xfe", "e\u0301", "\u2028"} {
		f.Add([]byte(s), 2)
	}
	f.Fuzz(func(t *testing.T, text []byte, size int) {
		got := throughVisible(t, text, max(1, size))
		if !utf8.ValidString(got) {
			t.Errorf("%q is no text", got)
		}
		for _, r := range got {
			if r != '\n' && r != '\t' && (unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r)) {
				t.Errorf("%q holds %U", got, r)
			}
		}
		if got != onScreen(string(text)) {
			t.Errorf("%q in pieces, %q as a whole", got, onScreen(string(text)))
		}
	})
}
