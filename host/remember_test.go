package host

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestRemember(t *testing.T) {
	dir := t.TempDir()
	on, file := filepath.Join(dir, "program"), filepath.Join(dir, "known", "program.json")
	asked := 0
	good := true
	ask := func(t *testing.T, wantAsked int) {
		t.Helper()
		got, err := remember(file, []string{on, filepath.Join(dir, "absent")}, func(string) bool { return good }, func() (string, error) {
			asked++
			raw, err := os.ReadFile(on)
			return string(raw), err
		})
		want, rerr := os.ReadFile(on)
		if err != nil || rerr != nil || got != string(want) {
			t.Fatalf("got %q, %v; want %q, %v", got, err, want, rerr)
		}
		if asked != wantAsked {
			t.Fatalf("asked %d times, want %d", asked, wantAsked)
		}
	}
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(t, on, "one")
	ask(t, 1)
	ask(t, 1)

	// Replaced by another of the same size and time, as a package manager does.
	st, err := os.Stat(on)
	if err != nil {
		t.Fatal(err)
	}
	write(t, on+".new", "two")
	if err := errors.Join(os.Chtimes(on+".new", st.ModTime(), st.ModTime()), os.Rename(on+".new", on)); err != nil {
		t.Fatal(err)
	}
	ask(t, 2)
	ask(t, 2)

	write(t, filepath.Join(dir, "absent"), "") // what wasn't there counts as well
	ask(t, 3)

	good = false
	ask(t, 4)
	good = true
	ask(t, 4)

	write(t, file, `{"on": [`) // torn
	ask(t, 5)
}

// An error is found again each time.
func TestRememberErrors(t *testing.T) {
	dir := t.TempDir()
	asked, broken := 0, errors.New("broken")
	for range 2 {
		_, err := remember(filepath.Join(dir, "known.json"), []string{dir}, func(int) bool { return true }, func() (int, error) {
			asked++
			return 0, broken
		})
		if !errors.Is(err, broken) {
			t.Fatalf("got %v", err)
		}
	}
	if asked != 2 {
		t.Errorf("asked %d times, want 2", asked)
	}
}
