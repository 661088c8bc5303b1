package vmm

import "testing"

func TestPlain(t *testing.T) {
	const said = "a\tb\r\nc\x1b[2J\x07\u009b\u202e\xff ü €"
	if got, want := Plain(said), "a b\nc?[2J???? ü €"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	tail := NewTail(&Machine{})
	if _, err := tail.Write([]byte("error: \x1b]0;x\x07\n")); err != nil {
		t.Fatal(err)
	}
	if got := tail.String(); got != "error: ?]0;x?" {
		t.Errorf("a VMM's last words are %q", got)
	}
}
