package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func loadText(t *testing.T, text string) *VM {
	t.Helper()
	h, err := LoadHost(filepath.Join(t.TempDir(), "none.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "web.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	vm, err := Load(file, h)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

func TestChanges(t *testing.T) {
	const base = "image: tiny\nmemory: 256MiB\nports: [\"8080:80\"]\nrun: {argv: [a, b]}\n"
	for name, c := range map[string]struct {
		was, is string
		want    []string
	}{
		"nothing":         {base, base, nil},
		"another wording": {base, "run: {argv: [\"a\", \"b\"]}\nports: [\"127.0.0.1:8080:80\"]\nmemory: 262144KiB\nimage: tiny\n", nil},
		"a value":         {base, strings.Replace(base, "256", "512", 1), []string{"memory 256MiB → 512MiB"}},
		"a default":       {base, base + "vcpus: 1\n", []string{"vcpus 4 → 1"}},
		"a list":          {base, strings.Replace(base, "8080:80", "8081:80", 1), []string{`ports ["127.0.0.1:8080:80"] → ["127.0.0.1:8081:80"]`}},
		"added": {base, base + "secrets: {a: {generate: 32}}\nvolumes: [{name: v, mount: /v, size: 64MiB}]\n", []string{
			"volumes[0].name added: v", "volumes[0].mount added: /v", "volumes[0].size added: 64MiB", "secrets.a.generate added: 32", `secrets.a.mode added: "0400"`,
		}},
		"removed": {base + "secrets: {a: {file: /a}}\n", base, []string{"secrets.a.file removed: /a", `secrets.a.mode removed: "0400"`}},
	} {
		t.Run(name, func(t *testing.T) {
			was, is := loadText(t, c.was).Fields(), loadText(t, c.is).Fields()
			var got []string
			for _, c := range Changes(was, is) {
				got = append(got, c.String())
			}
			if strings.Join(got, "\n") != strings.Join(c.want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			if same := Digest(was) == Digest(is); same != (len(c.want) == 0) {
				t.Errorf("the digests are the same: %v", same)
			}
		})
	}
}

// What an older program told of its VM knows nothing of the fields that came later.
func TestChangesSinceAnOlderProgram(t *testing.T) {
	var was []Field
	text := "image: tiny\nrun: {argv: [a]}\n"
	for _, f := range loadText(t, text).Fields() {
		if f.Top() != "restart" {
			was = append(was, f)
		}
	}
	if got := Changes(was, loadText(t, text).Fields()); len(got) > 0 {
		t.Errorf("a default that is new counts as a change: %v", got)
	}
	if got := Changes(was, loadText(t, text+"restart: always\n").Fields()); len(got) != 1 {
		t.Errorf("what is declared and new does not count: %v", got)
	}
}
