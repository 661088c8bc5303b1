package config

import (
	"bytes"
	"errors"
	"flag"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got, -update rewrites it):\n%s", file, diff)
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	var all []string
	for _, ending := range []string{".yaml", ".json"} {
		files, err := filepath.Glob(pattern + ending)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, files...)
	}
	if len(all) == 0 {
		t.Fatalf("no file is called %s", pattern)
	}
	return all
}

func TestBad(t *testing.T) {
	for _, file := range glob(t, "testdata/bad/*") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			vm, err := Load(file, nil)
			var problems Problems
			if vm != nil || !errors.As(err, &problems) || len(problems) == 0 {
				t.Fatalf("Load gives %v and %v, want Problems", vm, err)
			}
			if strings.Contains(err.Error(), "not-to-be-shown") {
				t.Errorf("a message shows what may be a secret: %s", err)
			}
			golden(t, file+".want", err.Error()+"\n")
		})
	}
}

func TestBadHost(t *testing.T) {
	for _, file := range glob(t, "testdata/badhost/*") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			h, err := LoadHost(file)
			var problems Problems
			if h != nil || !errors.As(err, &problems) {
				t.Fatalf("LoadHost gives %v and %v, want Problems", h, err)
			}
			golden(t, file+".want", err.Error()+"\n")
		})
	}
}

// sameVM compares what a declaration means, and not where it stood.
var sameVM = []cmp.Option{
	cmpopts.IgnoreUnexported(VM{}), cmpopts.IgnoreFields(VM{}, "File"), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}),
}

func show(t *testing.T, vm *VM, origins bool) string {
	t.Helper()
	var b bytes.Buffer
	if err := vm.Show(&b, origins); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestShowRoundTrip(t *testing.T) {
	dir, err := filepath.Abs("testdata/good")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range glob(t, "testdata/good/*") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			vm, err := Load(file, nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, origins := range []bool{false, true} {
				shown := show(t, vm, origins)
				again, err := Parse(vm.Name, "/elsewhere/x.yaml", []byte(shown), nil)
				if err != nil {
					t.Fatalf("what Show prints isn't read: %v\n%s", err, shown)
				}
				if diff := cmp.Diff(vm, again, sameVM...); diff != "" {
					t.Errorf("what Show prints reads as another VM:\n%s\n%s", diff, shown)
				}
				suffix := ".shown"
				if origins {
					suffix = ".origins"
				}
				golden(t, file+suffix, strings.ReplaceAll(shown, dir, "DIR"))
			}
		})
	}
}

// Every field of every struct has some text in some good declaration that sets it, and Show prints it, as the round trip shows.
func TestEveryFieldIsReachable(t *testing.T) {
	set := map[string]bool{}
	for _, file := range glob(t, "testdata/good/*") {
		vm, err := Load(file, nil)
		if err != nil {
			t.Fatal(err)
		}
		collect(reflect.ValueOf(*vm), set)
	}
	for _, typ := range []any{
		VM{}, Overlay{}, Volume{}, Share{}, Secret{}, Port{}, Egress{}, Allow{}, Run{}, Ready{}, HTTPReady{}, Health{}, Stop{},
		OpenClaw{}, OpenClawAuth{}, OpenClawTelegram{}, OpenClawProvider{},
	} {
		for _, f := range reflect.VisibleFields(reflect.TypeOf(typ)) {
			if name := reflect.TypeOf(typ).Name() + "." + f.Name; f.IsExported() && !set[name] {
				t.Errorf("no good declaration sets %s", name)
			}
		}
	}
}

func collect(v reflect.Value, set map[string]bool) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			collect(v.Elem(), set)
		}
	case reflect.Slice:
		for i := range v.Len() {
			collect(v.Index(i), set)
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			collect(v.MapIndex(key), set)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() && !v.Field(i).IsZero() {
				set[v.Type().Name()+"."+v.Type().Field(i).Name] = true
				collect(v.Field(i), set)
			}
		}
	}
}

func TestDefaultsOfTheHost(t *testing.T) {
	h, err := LoadHost("testdata/host.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if h.Bridge != "clawbr" || h.Address.String() != "10.20.0.1/16" || h.UIDBase != 3000000000 {
		t.Errorf("the host is %+v", h)
	}
	for _, name := range []string{"a", "b", "c"} {
		vm, err := Load("testdata/merge/"+name+".yaml", h)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "testdata/merge/"+name+".yaml.origins", strings.ReplaceAll(show(t, vm, true), filepath.Dir(vm.Shares[0].Source), "DIR"))
	}
	_, err = Load("testdata/merge/bad.yaml", h)
	if err == nil {
		t.Fatal("a declaration that doesn't fit the defaults is read")
	}
	golden(t, "testdata/merge/bad.want", err.Error()+"\n")
}

func TestNoHostFile(t *testing.T) {
	h, err := LoadHost(filepath.Join(t.TempDir(), "none.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if h.Bridge != "microbr" || h.Address.String() != "192.168.83.1/24" || h.UIDBase != 2000000000 || h.File != "" {
		t.Errorf("without a file the host is %+v", h)
	}
}

func TestLoadRefusesWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.Mkdir(at("dir.yaml"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(at("pipe.yaml"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", at("zero.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("Upper.yaml"), []byte("image: a\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("large.yaml"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(at("large.yaml"), 100<<20); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"dir.yaml":    "DIR/dir.yaml: it is a directory; want a file",
		"pipe.yaml":   "DIR/pipe.yaml: it is a pipe; want a file",
		"zero.yaml":   "DIR/zero.yaml: it is a device; want a file",
		"large.yaml":  "DIR/large.yaml: it is larger than 1MiB; want a declaration, which is some 1 KiB",
		"Upper.yaml":  `DIR/Upper.yaml: the VM would be called as the file: "Upper" is no name for a VM: a lower-case letter, then lower-case letters, digits and -, 32 at most`,
		"a.toml":      "DIR/a.toml: it isn't called as a declaration is; want a name that ends with .yaml, .yml or .json",
		"absent.yaml": "cannot read the declaration DIR/absent.yaml: there is no such file: file does not exist",
	} {
		_, err := Load(at(name), nil)
		if err == nil {
			t.Errorf("%s is read", name)
			continue
		}
		if got := strings.ReplaceAll(err.Error(), dir, "DIR"); got != want {
			t.Errorf("%s: the error is\n%s\nwant\n%s", name, got, want)
		}
	}
	if _, err := Load(at("absent.yaml"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the error of an absent file is %v, want fs.ErrNotExist", err)
	}
}

// What is made to cost much must cost little.
func TestHostileFilesAreCheap(t *testing.T) {
	nested := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for i := 'b'; i < 'z'; i++ {
		last := string(i - 1)
		nested += string(i) + ": &" + string(i) + " [" + strings.Repeat("*"+last+",", 9) + "]\n"
	}
	full := func(s string) string { return strings.Repeat(s, maxFile/len(s)) }
	for name, text := range map[string]string{
		"billion laughs": nested, "brackets": full("["), "dashes": full("- "), "questions": full("? "), "braces": full("{a: "),
		"lines": full("abc: def\n"), "keys": full("a:\n"), "anchors": full("&a "), "tags": full("!a "), "documents": full("---\n"),
		"items": "x:\n" + full("- a\n"), "comments": full("#\n"), "one text": full("x"), "open quote": `"` + full("x\n"),
		"just fewer tokens": strings.Repeat("a:\n", maxTokens/2-1), "wide": "x: [" + strings.Repeat("1,", maxTokens/2-3) + "]",
	} {
		if len(text) > maxFile {
			text = text[:maxFile]
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		_, err := Parse("x", "x.yaml", []byte(text), nil)
		took := time.Since(start)
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Errorf("%s: is read", name)
		}
		if len(err.Error()) > 64<<10 {
			t.Errorf("%s: the message has %d bytes", name, len(err.Error()))
		}
		// The bounds are far above what it takes (see -v), and far below what it takes without the limits: minutes.
		if allocated := after.TotalAlloc - before.TotalAlloc; took > time.Minute || allocated > 1<<30 {
			t.Errorf("%s: took %s and %d MiB", name, took, allocated>>20)
		}
		t.Logf("%-18s %8s %4d MiB", name, took.Round(time.Millisecond), (after.TotalAlloc-before.TotalAlloc)>>20)
	}
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "1": 1, "17B": 17, "1KiB": 1 << 10, "512MiB": 512 << 20, "2GiB": 2 << 30, "1TiB": 1 << 40,
		"1K": 1000, "3KB": 3000, "4M": 4e6, "4G": 4e9, "5GB": 5e9, "1T": 1e12, "9223372036854775807": 1<<63 - 1,
	} {
		got, err := ParseSize(text)
		if err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", text, got, err, want)
		}
		again, err := ParseSize(got.String())
		if err != nil || again != got {
			t.Errorf("%d prints as %s, which reads as %d, %v", got, got, again, err)
		}
	}
	for _, text := range []string{"", "GiB", "-1", "+1", "1.5GiB", "1gib", "1 GiB", "1GiBGiB", "8388608TiB", "9223372036854775808", "1i", "0x10", "1_0"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", text, got)
		}
	}
}

func TestSuggestions(t *testing.T) {
	known := []string{"image", "vcpus", "memory", "tap", "mac", "ports", "openclaw", "run"}
	for typo, want := range map[string]string{
		"memroy": "memory", "Memory": "memory", "cpus": "vcpus", "port": "ports", "opneclaw": "openclaw", "pat": "tap", "xyzzy": "", "": "", "q": "",
	} {
		if got := nearest(typo, known); got != want {
			t.Errorf("for %q %q is suggested, want %q", typo, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/bad/*", "testdata/good/*", "testdata/badhost/*"} {
		for _, ending := range []string{".yaml", ".json"} {
			files, err := filepath.Glob(pattern + ending)
			if err != nil {
				f.Fatal(err)
			}
			for _, file := range files {
				data, err := os.ReadFile(file)
				if err != nil {
					f.Fatal(err)
				}
				f.Add(data)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := ParseHost("/host.yaml", data)
		positioned(t, err)
		vm, err := Parse("x", "/x.yaml", data, nil)
		positioned(t, err)
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				if !strings.HasPrefix(line, "/x.yaml:") {
					t.Errorf("a line of the message isn't a problem's: %q", line)
				}
			}
			return
		}
		shown := show(t, vm, true)
		again, err := Parse("x", "/x.yaml", []byte(shown), nil)
		if err != nil {
			t.Fatalf("what Show prints isn't read: %v\n%s", err, shown)
		}
		if diff := cmp.Diff(vm, again, sameVM...); diff != "" {
			t.Fatalf("what Show prints reads as another VM:\n%s\n%s", diff, shown)
		}
	})
}

// positioned fails for a problem that doesn't say where it is and what is wrong, or that would drive a terminal.
func positioned(t *testing.T, err error) {
	t.Helper()
	var problems Problems
	if err != nil && !errors.As(err, &problems) {
		t.Fatalf("%T is no list of problems: %v", err, err)
	}
	for _, p := range problems {
		if p.Line < 1 || p.Column < 1 || p.Wrong == "" {
			t.Errorf("a problem without a place: %+v", p)
		}
		if text := p.String(); unprintable(text) || len(text) > maxProblem {
			t.Errorf("a problem of %d bytes: %q", len(text), text)
		}
	}
}

// maxProblem is the longest that a message has been with a declaration of the size that is read.
const maxProblem = 2 << 10

// FuzzMerge lays one declaration over another: whatever the host's defaults are, what comes out has a place, too.
func FuzzMerge(f *testing.F) {
	f.Add([]byte("defaults: {memory: 1GiB, run: {argv: [a]}}\n"), []byte("image: x\nopenclaw: {}\n"))
	f.Add([]byte("defaults: {overlay: {tmpfs: 16MiB}}\n"), []byte("image: x\noverlay: {size: 1GiB}\n"))
	f.Add([]byte("defaults: {image: x, vcpus: many}\n"), []byte("{}\n"))
	f.Fuzz(func(t *testing.T, host, vm []byte) {
		h, err := ParseHost("/host.yaml", host)
		if err != nil {
			return
		}
		got, err := Parse("x", "/x.yaml", vm, h)
		positioned(t, err)
		if err == nil && got.Image == "" {
			t.Error("a VM without an image")
		}
	})
}

// FuzzNames looks that what is taken for a name can be part of a path, a unit and a line of text.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"openclaw", "a-b", "../x", "a\nb", "", strings.Repeat("a", 33), "A", "a\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if err := ValidName(s); err != nil {
			if unprintable(err.Error()) {
				t.Errorf("the refusal holds what is no text: %q", err)
			}
			return
		}
		if len(s) > 32 || filepath.Base(s) != s || strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || s[0] == '-' {
			t.Errorf("%q is taken for a name", s)
		}
	})
}

// FuzzSize reads a size.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"1", "512MiB", "8388607TiB", "-1", "1.5GiB", "18446744073709551616"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseSize(s)
		if err != nil {
			return
		}
		if again, err := ParseSize(got.String()); got < 0 || err != nil || again != got {
			t.Errorf("%q is %d, which prints as %s and reads as %d, %v", s, got, got, again, err)
		}
	})
}
