package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestMain is the program itself where a test starts it as a shell would.
func TestMain(m *testing.M) {
	if os.Getenv("CLAWVM_TEST_IS_CLAWVM") != "" {
		os.Exit(run(os.Args))
	}
	os.Exit(m.Run())
}

// typed is a root with VMs, and the program under its name.
type typed struct {
	t    *testing.T
	root string
	env  []string
}

func newTyped(t *testing.T) *typed {
	t.Helper()
	root, bin := t.TempDir(), t.TempDir()
	vms := filepath.Join(root, "etc/clawvm/vms")
	if err := os.MkdirAll(vms, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web", "well", "openclaw"} {
		text := "image: tiny\nsecrets:\n  token: {stdin: true}\n  made: {generate: 32}\n"
		if err := os.WriteFile(filepath.Join(vms, name+".yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(bin, "clawvm")); err != nil {
		t.Fatal(err)
	}
	return &typed{t, root, append(os.Environ(), "CLAWVM_TEST_IS_CLAWVM=1", "CLAWVM_ROOT="+root, "PATH="+bin+":"+os.Getenv("PATH"))}
}

func (p *typed) run(name string, args ...string) string {
	p.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = p.env
	cmd.Path = name
	if !strings.Contains(name, "/") {
		for _, e := range p.env {
			if dirs, ok := strings.CutPrefix(e, "PATH="); ok {
				for _, dir := range filepath.SplitList(dirs) {
					if _, err := os.Stat(filepath.Join(dir, name)); err == nil && cmd.Path == name {
						cmd.Path = filepath.Join(dir, name)
					}
				}
			}
		}
		cmd.Err = nil
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		p.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// completions are lines that are typed, to where the cursor is, and what may come next.
var completions = []struct {
	line string
	want string // words, in their order
}{
	{"clawvm sta", "status"},
	{"clawvm up ", "openclaw web well"},
	{"clawvm up we", "web well"},
	{"clawvm up web ", "openclaw well"},
	{"clawvm image build --", "--force --verbose"},
	{"clawvm logs web --con", "--console"},
	{"clawvm status web ", ""},
	{"clawvm image ver", "verify"},
	{"clawvm image build ", "base openclaw tiny"},
	{"clawvm secret set ", "openclaw web well"},
	{"clawvm secret set web ", "token"},
	{"clawvm completion ", "bash fish zsh"},
	{"clawvm cp we", "web: well:"},
	{"clawvm cp /etc/hosts we", "web: well:"},
	{"clawvm exec we", "web well"},
	{"clawvm exec web rm ", ""},
	{"clawvm exec web -- rm ", ""},
}

// filtered is what a shell leaves of the words that it was given.
func filtered(out, line string) string {
	cur := line[strings.LastIndexByte(line, ' ')+1:]
	var words []string
	for _, w := range strings.Fields(out) {
		if strings.HasPrefix(w, cur) && w != "--help" {
			words = append(words, w)
		}
	}
	return strings.Join(words, " ")
}

func sorted(words string) string {
	list := strings.Fields(words)
	slices.Sort(list)
	return strings.Join(list, " ")
}

func TestCompletion(t *testing.T) {
	p := newTyped(t)
	for _, c := range completions {
		words := strings.Fields(c.line)
		if strings.HasSuffix(c.line, " ") || !strings.HasPrefix(words[len(words)-1], "-") {
			// The word at the cursor is given only when it is a flag.
			words = strings.Fields(c.line[:strings.LastIndexByte(c.line, ' ')])
		} else {
			words[len(words)-1] = strings.Replace(words[len(words)-1], "--", "-", 1)
		}
		if got := filtered(p.run("clawvm", append(words[1:], completionFlag)...), c.line); sorted(got) != sorted(c.want) {
			t.Errorf("%q: %q, want %q", c.line, got, c.want)
		}
	}
}

func TestCompletionInShells(t *testing.T) {
	ask := map[string]func(p *typed, script, line string) string{
		"bash": func(p *typed, script, line string) string {
			words := strings.Split(line, " ")
			for i, w := range words {
				words[i] = fmt.Sprintf("%q", w)
			}
			return p.run("bash", "-c", fmt.Sprintf(". %s; COMP_WORDS=(%s); COMP_CWORD=%d; _clawvm; printf '%%s\\n' \"${COMPREPLY[@]}\"",
				script, strings.Join(words, " "), len(words)-1))
		},
		"fish": func(p *typed, script, line string) string {
			return p.run("fish", "-c", fmt.Sprintf("source %s; complete -C %q", script, line))
		},
	}
	for _, shell := range []string{"bash", "fish"} {
		t.Run(shell, func(t *testing.T) {
			if _, err := exec.LookPath(shell); err != nil {
				t.Skip(shell + " is not installed")
			}
			p := newTyped(t)
			script := filepath.Join(p.root, "script")
			if err := os.WriteFile(script, []byte(p.run("clawvm", "completion", shell)), 0o644); err != nil {
				t.Fatal(err)
			}
			for _, c := range completions {
				if got := filtered(ask[shell](p, script, c.line), c.line); c.want != "" && sorted(got) != sorted(c.want) {
					t.Errorf("%q: %q, want %q", c.line, got, c.want)
				}
			}
		})
	}
	t.Run("zsh", func(t *testing.T) {
		if _, err := exec.LookPath("zsh"); err != nil {
			t.Skip("zsh is not installed")
		}
		p := newTyped(t)
		script := filepath.Join(p.root, "script")
		if err := os.WriteFile(script, []byte(p.run("clawvm", "completion", "zsh")), 0o644); err != nil {
			t.Fatal(err)
		}
		// Completion proper needs a terminal; this is what stands between the shell and the program.
		got := p.run("zsh", "-fc", "compdef() { :; }; compadd() { shift; print -l -- $@; }; source "+script+"; words=(clawvm up we); CURRENT=3; _clawvm")
		if filtered(got, "clawvm up we") != "web well" {
			t.Errorf("%q", got)
		}
	})
}

// Words behind `--` are another program's: it must not be run to complete them.
func TestCompletionRunsNothing(t *testing.T) {
	if asked, foreign := completing([]string{"clawvm", "exec", "web", "--", "rm", completionFlag}); !asked || !foreign {
		t.Error("it would be run")
	}
	if asked, _ := completing([]string{"clawvm", "exec", "web", "--", "rm"}); asked {
		t.Error("it would not be run")
	}
}
