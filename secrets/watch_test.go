package secrets

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// limit is how long a test waits for what takes some 250 ms on an idle machine.
const limit = 30 * time.Second

func watched(t *testing.T, all ...Secret) <-chan struct{} {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	calls, ended := make(chan struct{}, 100), make(chan error, 1)
	go func() { ended <- Watch(ctx, all, func() { calls <- struct{}{} }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Watch ended with %v", err)
			}
		case <-time.After(limit):
			t.Error("Watch doesn't end")
		}
	})
	await(t, calls, "the first look")
	return calls
}

func await(t *testing.T, calls <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-calls:
	case <-time.After(limit):
		t.Fatalf("%s isn't noticed", what)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestWatchFile(t *testing.T) {
	dir := t.TempDir()
	file := put(t, filepath.Join(dir, "file"), "1", 0o600)
	calls := watched(t, Secret{Name: "file", File: file})

	put(t, file, "22", 0o600)
	await(t, calls, "writing")
	put(t, filepath.Join(dir, "other"), "333", 0o600)
	rename(t, filepath.Join(dir, "other"), file)
	await(t, calls, "a rename into its place")
	if err := os.Chmod(file, 0o400); err != nil {
		t.Fatal(err)
	}
	await(t, calls, "another mode")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	await(t, calls, "its removal")
	put(t, file, "4", 0o600)
	await(t, calls, "its return")
}

// Kubernetes and sops-nix keep the files in a directory of a generation, and turn a link to the next one.
func TestWatchLinkedDirectory(t *testing.T) {
	dir := t.TempDir()
	for _, generation := range []string{"1", "2", "3"} {
		if err := os.Mkdir(filepath.Join(dir, generation), 0o700); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, generation, "file"), generation, 0o600)
	}
	turn := func(to string) {
		t.Helper()
		if err := os.Symlink(to, filepath.Join(dir, "next")); err != nil {
			t.Fatal(err)
		}
		rename(t, filepath.Join(dir, "next"), filepath.Join(dir, "current"))
	}
	turn("1")
	calls := watched(t, Secret{Name: "file", File: filepath.Join(dir, "current/file")})
	turn("2")
	await(t, calls, "the turn to 2")
	turn(filepath.Join(dir, "3"))
	await(t, calls, "the turn to 3")
	put(t, filepath.Join(dir, "3/file"), "another", 0o600)
	await(t, calls, "writing in 3")
}

func TestWatchDirectoryThatIsReplaced(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a/b", "new/b"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, name, "file"), name, 0o600)
	}
	file := filepath.Join(dir, "a/b/file")
	calls := watched(t, Secret{Name: "file", File: file})
	rename(t, filepath.Join(dir, "a"), filepath.Join(dir, "old"))
	await(t, calls, "the directory's going")
	rename(t, filepath.Join(dir, "new"), filepath.Join(dir, "a"))
	await(t, calls, "the new directory")
	put(t, file, "written", 0o600)
	await(t, calls, "writing in the new directory")
}

// What happens beside a source is no change of it.
func TestLookIgnoresNeighbours(t *testing.T) {
	dir := t.TempDir()
	file := put(t, filepath.Join(dir, "file"), "1", 0o600)
	w, err := newWatch([]Secret{{Name: "file", File: file}, {Name: "made", Generate: 32}, {Name: "given", Stdin: true}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.watcher.Close(); err != nil {
			t.Error(err)
		}
	}()
	look := func(want bool, what string) {
		t.Helper()
		differ, err := w.look()
		if err != nil || differ != want {
			t.Errorf("after %s look gives %t, %v", what, differ, err)
		}
	}
	look(true, "the start")
	look(false, "nothing")
	put(t, filepath.Join(dir, "neighbour"), "x", 0o600)
	look(false, "a neighbour")
	put(t, file, "2", 0o600)
	look(true, "writing")
	if len(w.sources) != 1 {
		t.Errorf("sources are %v", w.sources)
	}
}

func TestDirectories(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "real/deep"), 0o700); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"link": "real", "real/up": "../real/deep", "loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string][]string{
		"real/deep/file": {"", "/real", "/real/deep"}, "link/deep/file": {"", "/real", "/real/deep"},
		"link/up/file": {"", "/real", "/real/deep"}, "absent/deep/file": {""}, "loop/file": {""},
	} {
		got := directories(filepath.Join(dir, path))
		for _, suffix := range want {
			if !slices.Contains(got, dir+suffix) {
				t.Errorf("%s leads through %v, without %s", path, got, dir+suffix)
			}
		}
		if got[0] != "/" {
			t.Errorf("%s doesn't begin at the root: %v", path, got)
		}
	}
}
