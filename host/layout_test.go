package host

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// shortDir is a temporary directory whose path leaves room for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "root")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestRootIDIsMadeOnceByMany(t *testing.T) {
	root := shortDir(t)
	ids := make([]string, 32)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			l, err := OpenLayout(root)
			if err != nil {
				t.Error(err)
			}
			ids[i] = l.ID
		})
	}
	wg.Wait()
	slices.Sort(ids)
	if got := slices.Compact(ids); len(got) != 1 || len(got[0]) != 8 {
		t.Errorf("ids %v, want one of eight digits", got)
	}
}

func TestRootWithABrokenIDIsRefused(t *testing.T) {
	root := shortDir(t)
	if _, err := OpenLayout(root); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "var/lib/clawvm/root-id"), []byte("x\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLayout(root); err == nil || !strings.Contains(err.Error(), "eight hexadecimal digits") {
		t.Errorf("error is %v", err)
	}
}

func TestRootThatIsTooDeepIsRefused(t *testing.T) {
	deep := filepath.Join(t.TempDir(), strings.Repeat("d", 60))
	_, err := OpenLayout(deep)
	if err == nil || !strings.Contains(err.Error(), "the kernel allows 107") {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(deep); !errors.Is(err, os.ErrNotExist) {
		t.Error("a refused root was made all the same")
	}
}

func TestPathsForOtherUsersAreRelativeToTheRoot(t *testing.T) {
	l := Layout{Root: "/home/somebody/clawvm"}
	if got := l.relative(l.VM("x").VMM()); got != "run/clawvm/x/vmm" {
		t.Errorf("got %q", got)
	}
	system := Layout{Root: "/"}
	if got := system.relative(system.VM("x").VMM()); got != "/run/clawvm/x/vmm" {
		t.Errorf("the system's own root: got %q", got)
	}
}

func TestDeclaredListsEachNameOnce(t *testing.T) {
	l := Layout{Root: t.TempDir()}
	if names, err := l.Declared(); err != nil || names != nil {
		t.Errorf("without a directory: %v, %v", names, err)
	}
	if err := os.MkdirAll(l.Declarations(), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"b.yaml", "a.json", "a.yaml", "Not-A-Name.yaml", "notes.txt"} {
		if err := os.WriteFile(filepath.Join(l.Declarations(), f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	names, err := l.Declared()
	if err != nil || !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("got %v, %v", names, err)
	}
}
