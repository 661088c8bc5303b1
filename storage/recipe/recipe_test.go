package recipe

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) {
	RunChild()
	os.Exit(m.Run())
}

// golden compares with a file of testdata, or writes it with -update.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs (-want +got; -update rewrites it):\n%s", file, diff)
	}
}

func TestBundledRecipesAreRight(t *testing.T) {
	if diff := cmp.Diff([]string{"base", "openclaw", "tiny"}, Names()); diff != "" {
		t.Errorf("bundled recipes (-want +got):\n%s", diff)
	}
	for _, name := range Names() {
		r, err := Builtin(name)
		if err != nil {
			t.Error(err)
			continue
		}
		if r.Name != name {
			t.Errorf("the recipe %s calls itself %s", name, r.Name)
		}
		if r.Description == "" || r.Downloads == "" {
			t.Errorf("the recipe %s doesn't say what it is or what it downloads", name)
		}
	}
}

// A lock file with addresses in it would tie every user to one registry, and
// one without a hash would trust whatever a registry answers.
func TestLockFilesHaveHashesAndNoAddresses(t *testing.T) {
	address := regexp.MustCompile(`"resolved"|registry\.|\.tgz`)
	for _, name := range Names() {
		r, err := Builtin(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range r.NPM {
			if found := address.FindString(n.Locked); found != "" {
				t.Errorf("%s: the lock file of %s has %s", name, n.Into, found)
			}
			var lock struct {
				Packages map[string]struct {
					Integrity string
					InBundle  bool
				}
			}
			if err := json.Unmarshal([]byte(n.Locked), &lock); err != nil {
				t.Fatal(err)
			}
			for key, p := range lock.Packages {
				// The project itself has none, and what comes inside
				// another package is covered by that one's.
				if key != "" && !p.InBundle && !strings.HasPrefix(p.Integrity, "sha512-") {
					t.Errorf("%s: %s has no hash in the lock file of %s", name, key, n.Into)
				}
			}
		}
	}
}

func TestBuiltinThatIsNotThere(t *testing.T) {
	_, err := Builtin("nginx")
	if !errors.Is(err, ErrNoRecipe) {
		t.Fatalf("got %v, want ErrNoRecipe", err)
	}
	golden(t, "no-recipe.txt", err.Error()+"\n")
}

func TestWrongRecipes(t *testing.T) {
	cases := map[string]string{
		"unknown-field": "name: x\ndebian: {suite: trixie}\npackages: [a]\n",
		"everything-wrong": `name: "../x"
debian: {suite: "trixie main", variant: huge, packages: ["a b", --yes], exclude: ["/usr/*'"]}
npm: [{lock: ../up, into: opt}]
users: [{name: root, uid: 0, home: home, shell: "/bin/sh:x"}]
files:
  - {path: /a/../b, content: x}
  - {path: /both, content: x, link: y}
  - {path: /mode, content: x, mode: "0999"}
  - {path: /owner, content: x, user: nobody-here}
commands:
  - {name: nothing}
  - {name: who, argv: [a], user: ghost}
  - {name: never, argv: [a], until: {port: 0, path: x}}
remove: ["/", "rel/*", "/[", "/a/.."]
removeContent: [var]
`,
		"no-lock": "name: x\ndebian: {suite: trixie}\nnpm: [{lock: here, into: /opt/x}]\n",
	}
	for name, text := range cases {
		t.Run(name, func(t *testing.T) {
			_, err := read(fstest.MapFS{"x.yaml": {Data: []byte(text)}, "here/package.json": {Data: []byte("{}")}}, "x.yaml")
			if err == nil {
				t.Fatal("the recipe was accepted")
			}
			golden(t, name+".txt", err.Error()+"\n")
		})
	}
}

func TestRecipeThatIsTooLarge(t *testing.T) {
	_, err := read(fstest.MapFS{"x.yaml": {Data: make([]byte, maxRecipe+1)}}, "x.yaml")
	if err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("got %v, want a refusal for the size", err)
	}
}

func TestDigestFollowsValuesNotComments(t *testing.T) {
	const text = "name: x\ndebian: {suite: trixie}\nnpm: [{lock: l, into: /opt/x}]\n"
	digest := func(text, lock string) string {
		t.Helper()
		r, err := read(fstest.MapFS{
			"x.yaml":              {Data: []byte(text)},
			"l/package.json":      {Data: []byte("{}")},
			"l/package-lock.json": {Data: []byte(lock)},
		}, "x.yaml")
		if err != nil {
			t.Fatal(err)
		}
		d, err := r.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := digest(text, "{}")
	if digest("# why\n"+text, "{}") != first {
		t.Error("a comment changed the digest")
	}
	if digest(strings.Replace(text, "trixie", "bookworm", 1), "{}") == first {
		t.Error("another suite left the digest as it was")
	}
	if digest(text, "{ }") == first {
		t.Error("another lock file left the digest as it was")
	}
}

func TestMode(t *testing.T) {
	for _, c := range []struct {
		file File
		want uint32
	}{{File{}, 0o644}, {File{Directory: true}, 0o755}, {File{Mode: "4755"}, 0o4755}, {File{Mode: "0600"}, 0o600}} {
		got, err := c.file.mode()
		if err != nil || got != c.want {
			t.Errorf("mode of %+v is %o, %v; want %o", c.file, got, err, c.want)
		}
	}
}
