package storage

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
)

func readEntries(data []byte) ([]entry, error) {
	m := newManifestReader(bytes.NewReader(data))
	var all []entry
	for {
		e, err := m.next()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		all = append(all, *e)
	}
}

func TestManifestRefused(t *testing.T) {
	const root = "d 0755 0 0 0.000000000 0 - . -\n"
	sum := strings.Repeat("0", 64)
	for name, text := range map[string]string{
		"empty":               "",
		"another format":      "clawvm-image 2\n" + root,
		"no entries":          manifestHeader,
		"cut off":             manifestHeader + strings.TrimSuffix(root, "\n"),
		"no root":             manifestHeader + "d 0755 0 0 0.000000000 0 - a -\n",
		"root is a file":      manifestHeader + "f 0755 0 0 0.000000000 0 " + sum + " . -\n",
		"two roots":           manifestHeader + root + root,
		"twice":               manifestHeader + root + "d 0755 0 0 0.000000000 0 - a -\nd 0755 0 0 0.000000000 0 - a -\n",
		"order":               manifestHeader + root + "d 0755 0 0 0.000000000 0 - b -\nd 0755 0 0 0.000000000 0 - a -\n",
		"in no directory":     manifestHeader + root + "d 0755 0 0 0.000000000 0 - a/b -\n",
		"in a file":           manifestHeader + root + "f 0755 0 0 0.000000000 0 " + sum + " a -\nd 0755 0 0 0.000000000 0 - a/b -\n",
		"dotdot":              manifestHeader + root + "d 0755 0 0 0.000000000 0 - .. -\n",
		"absolute":            manifestHeader + root + "d 0755 0 0 0.000000000 0 - /a -\n",
		"zero byte":           manifestHeader + root + "d 0755 0 0 0.000000000 0 - a%00 -\n",
		"mode":                manifestHeader + root + "d 17755 0 0 0.000000000 0 - a -\n",
		"mode without zero":   manifestHeader + root + "d 755 0 0 0.000000000 0 - a -\n",
		"sign":                manifestHeader + root + "d 0755 +1 0 0.000000000 0 - a -\n",
		"size of a directory": manifestHeader + root + "d 0755 0 0 0.000000000 1 - a -\n",
		"file without digest": manifestHeader + root + "f 0755 0 0 0.000000000 1 - a -\n",
		"link without target": manifestHeader + root + "l 0777 0 0 0.000000000 0 - a -\n",
		"link to later":       manifestHeader + root + "h 0777 0 0 0.000000000 0 - a b\n",
		"unknown type":        manifestHeader + root + "c 0777 0 0 0.000000000 0 - a -\n",
		"lower case escape":   manifestHeader + root + "d 0755 0 0 0.000000000 0 - a%0a -\n",
		"needless escape":     manifestHeader + root + "d 0755 0 0 0.000000000 0 - %61 -\n",
		"xattr order":         manifestHeader + "d 0755 0 0 0.000000000 0 - . - user.b= user.a=\n",
		"xattr not hex":       manifestHeader + "d 0755 0 0 0.000000000 0 - . - user.b=z\n",
		"fields":              manifestHeader + "d 0755 0 0 0.000000000 0 - .\n",
		"blank line":          manifestHeader + root + "\n",
	} {
		if _, err := readEntries([]byte(text)); !errors.Is(err, errManifest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := readEntries([]byte(manifestHeader + root + strings.Repeat("x", 2*maxEntryLine))); err == nil {
		t.Error("a line of any length is read")
	}
}

func TestComparePaths(t *testing.T) {
	paths := []string{"", "a", "a/b", "a/b/c", "a/b-c", "a!", "a-b", "a.", "b", "ä"}
	have := slices.Clone(paths)
	slices.Reverse(have)
	slices.SortFunc(have, comparePaths)
	if !slices.Equal(have, paths) {
		t.Errorf("sorted: %q", have)
	}
}

// FuzzManifest looks that whatever is read is written the same.
func FuzzManifest(f *testing.F) {
	sample, err := os.ReadFile("testdata/sample.manifest")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sample)
	f.Add([]byte(manifestHeader + "d 0755 0 0 -1.000000001 0 - . - user.a%3D=00\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, err := readEntries(data)
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := writeManifest(&again, entries); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(again.Bytes(), data) {
			t.Errorf("%q was read and is written as %q", data, again.Bytes())
		}
	})
}

// FuzzImportTar looks that no archive writes outside of the store or leaves
// something in it, and that what comes out is what its manifest says.
func FuzzImportTar(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root: it makes files of other owners")
	}
	ram := smallFS(f, 64<<20) // a disk would be synced for each archive
	sample := sampleTar(f)
	for _, how := range []string{"", "gz", "zst", "xz"} {
		f.Add(compressed(f, how, sample))
	}
	f.Add(makeTar(f, link("a", ".."), file("a/b", "x")))
	f.Add(makeTar(f, link("a", "b"), hard("c", "a"), file("c", "x"), dir("c")))
	f.Fuzz(func(t *testing.T, data []byte) {
		base, err := os.MkdirTemp(ram, "")
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.RemoveAll(base); err != nil {
				t.Error(err)
			}
		}()
		s := &Store{Dir: base + "/store"}
		image, err := s.ImportTar(t.Context(), bytes.NewReader(data), "fuzz", ImportOptions{MaxFiles: 200, MaxBytes: 4 << 20})
		outside, rerr := os.ReadDir(base)
		if rerr != nil || len(outside) > 1 {
			t.Errorf("beside the store: %v, %v", outside, rerr)
		}
		nothingLeft(t, s)
		if err != nil {
			return
		}
		if err := s.Verify(t.Context(), image.Digest); err != nil {
			t.Error(err)
		}
		if _, err := s.ImportDir(t.Context(), image.Root, "copy", ImportOptions{Expect: image.Digest}); err != nil {
			t.Error(err)
		}
	})
}
