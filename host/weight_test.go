package host

import (
	"os"
	"path/filepath"
	"testing"
)

func TestReadWeight(t *testing.T) {
	file := filepath.Join(t.TempDir(), "unit-weight")
	if w, kept, err := readWeight(file); w != 0 || kept || err != nil {
		t.Errorf("without a file: %d, %t, %v", w, kept, err)
	}
	for text, want := range map[string]uint64{"50": 50, "18446744073709551615": 1<<64 - 1} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if w, kept, err := readWeight(file); w != want || !kept || err != nil {
			t.Errorf("%s: %d, %t, %v", text, w, kept, err)
		}
	}
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := readWeight(file); err == nil {
		t.Error("x is a weight")
	}
}
