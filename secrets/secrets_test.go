package secrets

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"
)

// content is what must never appear in a message.
const content = "hunter2-the-content"

func put(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func mine(s Secret) Secret {
	s.UID, s.GID = os.Getuid(), os.Getgid()
	if s.Mode == 0 {
		s.Mode = 0o400
	}
	return s
}

func TestCheck(t *testing.T) {
	dir, keep := t.TempDir(), t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	put(t, at("good"), content, 0o600)
	put(t, at("good400"), content, 0o400)
	put(t, at("empty"), "", 0o600)
	put(t, at("world"), content, 0o644)
	put(t, at("group"), content, 0o640)
	put(t, at("execute"), content, 0o601)
	put(t, at("large"), "", 0o600)
	if err := os.Truncate(at("large"), MaxSize+1); err != nil {
		t.Fatal(err)
	}
	put(t, at("limit"), "", 0o600)
	if err := os.Truncate(at("limit"), MaxSize); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(at("good"), at("link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(at("dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(at("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := func(name string) Secret { return Secret{Name: name, File: at(name)} }
	outside := put(t, filepath.Join(filepath.Dir(dir), "outside"), content, 0o600)
	credential := func(id string) Secret {
		return Secret{VM: "vm", Name: "c-" + filepath.Base(id), Credential: id, Credentials: dir}
	}
	bad := []Secret{
		file("absent"), file("empty"), file("world"), file("group"), file("execute"), file("large"), file("link"), file("dir"), file("pipe"),
		{Name: "below", File: at("good/x")}, {VM: "web", Name: "token", Stdin: true}, {Name: "../x", Stdin: true}, {Name: ".hidden", Stdin: true},
		{Name: "none"}, {Name: "two", Stdin: true, Generate: 32}, {Name: "short", Generate: 15}, {Name: "long", Generate: 1025},
		{Name: "relative", File: "good"}, file("good"), file("good"),
		{VM: "vm", Name: "unmanaged", Credential: "good"}, credential("gone"), credential("link"), credential("../outside"), credential("group"),
	}
	want := []string{
		"cannot use secret absent: DIR/absent: there is no such file; write the secret there (mode 0600), or declare another source",
		"cannot use secret empty: DIR/empty: the file is empty; write the secret there",
		"cannot use secret world: DIR/world: others may read it (mode 0644); chmod 600 DIR/world",
		"cannot use secret group: DIR/group: others may read it (mode 0640); chmod 600 DIR/group",
		"cannot use secret execute: DIR/execute: others may read it (mode 0601); chmod 600 DIR/execute",
		"cannot use secret large: DIR/large: it is larger than 1 MiB",
		"cannot use secret link: DIR/link: it isn't a regular file: it is a symbolic link; name what it points to",
		"cannot use secret dir: DIR/dir: it isn't a regular file",
		"cannot use secret pipe: DIR/pipe: it isn't a regular file",
		"cannot use secret below: DIR/good/x: there is no such file; write the secret there (mode 0600), or declare another source",
		"cannot use secret token: it was never given; `clawvm secret set web token` reads it from standard input (KEEP/stdin/token: there is no such file)",
		`"../x" is no name for a secret: a letter or digit, then letters, digits, ., _ and -, 64 at most`,
		`".hidden" is no name for a secret: a letter or digit, then letters, digits, ., _ and -, 64 at most`,
		"cannot use secret none: it has 0 sources: one of file, credential, generate and stdin",
		"cannot use secret two: it has 2 sources: one of file, credential, generate and stdin",
		"cannot use secret short: 15 bytes of entropy: from 16 to 1024",
		"cannot use secret long: 1025 bytes of entropy: from 16 to 1024",
		"cannot use secret relative: good isn't an absolute path",
		"cannot use secret good: it is declared twice",
		"cannot use secret unmanaged: there are no credentials: systemd gives them to the unit clawvm@vm, and this is no start of it; start the VM by systemd, or declare another source",
		"cannot use secret c-gone: there is no credential gone in DIR; add `LoadCredential=gone:/path/of/its/file` to the unit: `systemctl edit clawvm@vm`",
		"cannot use secret c-link: DIR/link: it isn't a regular file: it is a symbolic link; name what it points to",
		"cannot use secret c-outside: OUTSIDE: it can't be read: invalid cross-device link",
		"cannot use secret c-group: DIR/group: others may read it (mode 0640); chmod 600 DIR/group",
	}
	if os.Getuid() != 0 { // root reads everything
		put(t, at("locked"), content, 0)
		bad, want = append(bad, file("locked")), append(want, "cannot use secret locked: DIR/locked: it can't be read: permission denied")
	}
	err := Check(keep, bad)
	if err == nil {
		t.Fatal("nothing is wrong")
	}
	got := strings.NewReplacer(outside, "OUTSIDE", dir, "DIR", keep, "KEEP").Replace(err.Error())
	if got != strings.Join(want, "\n") {
		t.Errorf("the problems are\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
	for _, reason := range []error{ErrNoCredentials, ErrMissing, ErrEmpty, ErrExposed, ErrTooLarge, ErrNotRegular} {
		if !errors.Is(err, reason) {
			t.Errorf("the error isn't %q", reason)
		}
	}
	if err := Check(keep, []Secret{file("good"), file("good400"), file("limit"), {Name: "new", Generate: 32}, credential("good400"), {Name: "later", Credential: "x", Awaited: true}}); err != nil {
		t.Errorf("what is right is refused: %v", err)
	}
	if _, err := os.Stat(filepath.Join(keep, generatedDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Check made something: %v", err)
	}
}

func TestValueShowsNothing(t *testing.T) {
	v := &Value{bytes: []byte(content)}
	type holder struct {
		V *Value
		W Value
	}
	for _, value := range []any{v, *v, holder{v, *v}, &holder{v, *v}, []any{v, *v}} {
		for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			got := fmt.Sprintf(format, value)
			if strings.Contains(got, content) || strings.Contains(got, fmt.Sprintf("%x", content)) || strings.Contains(got, "104 117") || strings.Contains(got, "0x68, 0x75") {
				t.Errorf("%s of %T shows %s", format, value, got)
			}
		}
		got, err := json.Marshal(value)
		if err != nil || strings.Contains(string(got), content) || !strings.Contains(string(got), hidden) {
			t.Errorf("%T as JSON is %s, %v", value, got, err)
		}
	}
	if v.String() != hidden {
		t.Errorf("String gives %s", v.String())
	}
	buffer := v.bytes
	v.wipe()
	if !bytes.Equal(buffer, make([]byte, len(content))) || v.bytes != nil {
		t.Error("a wiped value is still there")
	}
}

func TestReadAll(t *testing.T) {
	for _, size := range []int{1, 4095, 4096, 4097, MaxSize - 1, MaxSize} {
		text := bytes.Repeat([]byte("x"), size)
		for _, expect := range []int{0, size, 10 * size} {
			v, err := readAll(iotest.HalfReader(bytes.NewReader(text)), expect)
			if err != nil || !bytes.Equal(v.bytes, text) {
				t.Fatalf("of %d bytes, expecting %d: %v", size, expect, err)
			}
		}
	}
	if _, err := readAll(bytes.NewReader(make([]byte, MaxSize+1)), 10); !errors.Is(err, ErrTooLarge) {
		t.Errorf("one byte too many: %v", err)
	}
	if _, err := readAll(strings.NewReader(""), 10); !errors.Is(err, ErrEmpty) {
		t.Errorf("nothing: %v", err)
	}
	if _, err := readAll(iotest.ErrReader(errors.New("broken")), 10); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a broken reader: %v", err)
	}
}

func stage(t *testing.T) Stage {
	t.Helper()
	return Stage{Dir: t.TempDir(), Keep: filepath.Join(t.TempDir(), "vm")}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestWrite(t *testing.T) {
	s, dir := stage(t), t.TempDir()
	file := put(t, filepath.Join(dir, "file"), content+"\n", 0o600)
	if err := Set(s.Keep, "given", strings.NewReader("from a terminal\r\n")); err != nil {
		t.Fatal(err)
	}
	all := []Secret{
		mine(Secret{Name: "file", File: file}), mine(Secret{Name: "given", Stdin: true, Mode: 0o440}), mine(Secret{Name: "made", Generate: 32}),
	}
	if err := s.Write(all); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(s.Dir, name) }
	if got := read(t, at("file")); got != content+"\n" {
		t.Errorf("the file holds %q", got)
	}
	if got := read(t, at("given")); got != "from a terminal" {
		t.Errorf("what was given is %q", got)
	}
	made := read(t, at("made"))
	if !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(made) {
		t.Errorf("what was generated is %q", made)
	}
	for name, mode := range map[string]os.FileMode{at("file"): 0o400, at("given"): 0o440, at("made"): 0o400,
		filepath.Join(s.Keep, "generated/made"): 0o600, filepath.Join(s.Keep, "stdin/given"): 0o600,
		filepath.Join(s.Keep, "generated"): os.ModeDir | 0o700, filepath.Join(s.Keep, "stdin"): os.ModeDir | 0o700} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != mode {
			t.Errorf("%s has the mode %s, want %s", name, info.Mode(), mode)
		}
	}

	// Again, nothing is touched; the unfinished file of an interrupted write and what isn't declared any more go.
	inode := func(name string) uint64 {
		t.Helper()
		info, err := os.Stat(at(name))
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*syscall.Stat_t).Ino
	}
	before := inode("file")
	put(t, at(".new.file"), "half", 0o600)
	put(t, at("gone"), "old", 0o400)
	if err := s.Write(all); err != nil {
		t.Fatal(err)
	}
	if inode("file") != before {
		t.Error("a file that was right was written again")
	}
	if got := read(t, at("made")); got != made {
		t.Error("what was generated changed")
	}
	entries, err := os.ReadDir(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(all) {
		t.Errorf("staged are %v", entries)
	}

	// A file that is open keeps what it held: nothing is torn.
	open, err := os.Open(at("file"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := open.Close(); err != nil {
			t.Error(err)
		}
	}()
	put(t, file, "rotated", 0o600)
	if err := s.Write(all); err != nil {
		t.Fatal(err)
	}
	if got := read(t, at("file")); got != "rotated" || inode("file") == before {
		t.Errorf("after the rotation the file holds %q", got)
	}
	var old bytes.Buffer
	if _, err := old.ReadFrom(open); err != nil || old.String() != content+"\n" {
		t.Errorf("what was open holds %q, %v", old.String(), err)
	}

	// The same content with another mode is written, too.
	all[0].Mode = 0o440
	if err := s.Write(all); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(at("file")); err != nil || info.Mode() != 0o440 {
		t.Errorf("the mode is %v, %v", info.Mode(), err)
	}
}

// Where a source fails, what is staged stays, and the others are written.
func TestWriteGoesOn(t *testing.T) {
	s, dir := stage(t), t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	put(t, a, content, 0o600)
	put(t, b, content, 0o600)
	all := []Secret{mine(Secret{Name: "a", File: a}), mine(Secret{Name: "b", File: b})}
	if err := s.Write(all); err != nil {
		t.Fatal(err)
	}
	put(t, a, "readable by all", 0o644)
	put(t, b, "new", 0o600)
	err := s.Write(all)
	if !errors.Is(err, ErrExposed) || strings.Contains(err.Error(), "readable by all") || strings.Contains(err.Error(), "secret b") {
		t.Errorf("the error is %v", err)
	}
	if got := read(t, filepath.Join(s.Dir, "a")); got != content {
		t.Errorf("the secret whose source fails is %q", got)
	}
	if got := read(t, filepath.Join(s.Dir, "b")); got != "new" {
		t.Errorf("the other is %q", got)
	}
}

// A name in the stage that isn't a file is replaced, and not followed.
func TestWriteFollowsNoLink(t *testing.T) {
	s, dir := stage(t), t.TempDir()
	file, victim := put(t, filepath.Join(dir, "file"), content, 0o600), put(t, filepath.Join(dir, "victim"), "unharmed", 0o600)
	for _, name := range []string{"file", ".new.file"} {
		if err := os.Symlink(victim, filepath.Join(s.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Write([]Secret{mine(Secret{Name: "file", File: file})}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, victim); got != "unharmed" {
		t.Errorf("a link was followed: %q", got)
	}
	if info, err := os.Lstat(filepath.Join(s.Dir, "file")); err != nil || !info.Mode().IsRegular() {
		t.Errorf("the staged file is %v, %v", info, err)
	}
}

func TestSet(t *testing.T) {
	keep := filepath.Join(t.TempDir(), "vm")
	for _, name := range []string{"", ".x", "../x", "a/b", strings.Repeat("a", 65)} {
		if err := Set(keep, name, strings.NewReader(content)); err == nil {
			t.Errorf("a secret is called %q", name)
		}
	}
	for text, reason := range map[string]error{"": ErrEmpty, "\n": nil, strings.Repeat("x", MaxSize+1): ErrTooLarge} {
		if err := Set(keep, "a", strings.NewReader(text)); err == nil || reason != nil && !errors.Is(err, reason) {
			t.Errorf("%d bytes: %v", len(text), err)
		}
	}
	for _, text := range []string{"one", "two\n"} {
		if err := Set(keep, "a", strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
		if got := read(t, filepath.Join(keep, "stdin/a")); got != strings.TrimSuffix(text, "\n") {
			t.Errorf("kept is %q", got)
		}
	}
	if err := Check(keep, []Secret{{Name: "a", Stdin: true}}); err != nil {
		t.Error(err)
	}
}

func TestList(t *testing.T) {
	s, dir := stage(t), t.TempDir()
	file := put(t, filepath.Join(dir, "file"), content, 0o644)
	all := []Secret{mine(Secret{Name: "z", Generate: 16}), mine(Secret{VM: "web", Name: "b", Stdin: true}), mine(Secret{Name: "a", File: file})}
	list := List(s.Keep, all)
	if len(list) != 3 || list[0].Name != "a" || list[1].Name != "b" || list[2].Name != "z" {
		t.Fatalf("the list is %+v", list)
	}
	if a := list[0]; !a.Present || a.Source != file || time.Since(a.Modified) > time.Hour || !strings.Contains(a.Problem, "chmod 600") {
		t.Errorf("the file is %+v", a)
	}
	if b := list[1]; b.Present || b.Source != "standard input" || !strings.Contains(b.Problem, "clawvm secret set web b") {
		t.Errorf("what was never given is %+v", b)
	}
	if z := list[2]; z.Present || z.Source != "generated, 16 bytes" || z.Problem != "" {
		t.Errorf("what isn't generated yet is %+v", z)
	}
	if err := s.Write(all[:1]); err != nil {
		t.Fatal(err)
	}
	if z := List(s.Keep, all)[2]; !z.Present || z.Problem != "" || z.Modified.IsZero() {
		t.Errorf("what is generated is %+v", z)
	}
}

// What systemd gives is staged like any other source, and read only where systemd put it.
func TestWriteCredential(t *testing.T) {
	s, dir := stage(t), t.TempDir()
	put(t, filepath.Join(dir, "api-key"), content, 0o400)
	key := mine(Secret{Name: "key", Credential: "api-key", Credentials: dir})
	if err := s.Write([]Secret{key}); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(s.Dir, "key")); got != content {
		t.Errorf("the file holds %q", got)
	}
	key.Credentials, key.Awaited = "", true
	if err := s.Write([]Secret{key}); err == nil {
		t.Error("a secret that is still awaited was staged")
	}
}
