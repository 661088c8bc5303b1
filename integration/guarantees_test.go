package integration

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestGuaranteesHaveTests looks that each test that docs/failure.md names exists,
// with the subtest, and that each guarantee names one.
func TestGuaranteesHaveTests(t *testing.T) {
	var code strings.Builder
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		raw, err := os.ReadFile(path)
		code.Write(raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../docs/failure.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`\b(Test[A-Z][A-Za-z0-9]*)(?:/([^,;|()]*[^,;|() ]))?`).FindAllStringSubmatch(string(doc), -1)
	if len(named) < 50 {
		t.Fatalf("docs/failure.md names %d tests only", len(named))
	}
	for _, n := range named {
		if !strings.Contains(code.String(), "func "+n[1]+"(") {
			t.Errorf("docs/failure.md names %s, and there is no such test", n[1])
		}
		if sub := n[2]; sub != "" && !strings.Contains(code.String(), `"`+sub+`"`) {
			t.Errorf("docs/failure.md names %s, and no test has such a part", n[0])
		}
	}

	// The tables of guarantees say what, what holds, within what time, and the test.
	guarantees, tested := 0, false
	for line := range strings.Lines(string(doc)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		switch last := strings.TrimSpace(cells[len(cells)-1]); {
		case !strings.HasPrefix(line, "|"):
			tested = false
		case last == "test":
			tested = true
		case tested && !strings.HasPrefix(line, "|---"):
			guarantees++
			if !strings.Contains(last, "Test") {
				t.Errorf("this guarantee names no test: %s", line)
			}
		}
	}
	if guarantees < 50 {
		t.Errorf("docs/failure.md has %d guarantees only", guarantees)
	}
}
