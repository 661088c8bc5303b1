package emuhost

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestWriteCache writes across pages, and fails the power between two flushes.
func TestWriteCache(t *testing.T) {
	const number = 64
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, number*cachePage), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := openWriteCache(path)
	if err != nil {
		t.Fatal(err)
	}
	whole := func(b byte) []byte { return bytes.Repeat([]byte{b}, number*cachePage) }
	onDisk := func() []byte {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	want := whole(0)
	// Half a page, and one and two halves around it.
	for _, w := range []struct{ off, length int }{{0, 512}, {cachePage / 2, 2 * cachePage}, {5*cachePage - 512, 512}} {
		p := bytes.Repeat([]byte{'a'}, w.length)
		copy(want[w.off:], p)
		must(c.writeAt(p, int64(w.off)))
	}
	got := whole(1)
	must(c.readAt(got, 0))
	if !bytes.Equal(got, want) {
		t.Error("what was written isn't read")
	}
	if !bytes.Equal(onDisk(), whole(0)) {
		t.Error("it is on the disk before a flush")
	}
	must(c.flush())
	if !bytes.Equal(onDisk(), want) {
		t.Error("it isn't on the disk after a flush")
	}
	must(c.writeAt(whole('b'), 0))
	cached, lost, err := c.powerOff(rand.New(rand.NewPCG(1, 1)))
	if err != nil || cached != number || lost < number/4 || lost > number*3/4 {
		t.Errorf("%d of %d pages are lost, %v", lost, cached, err)
	}
	old := 0
	for i := range number {
		at := i * cachePage
		switch page := onDisk()[at : at+cachePage]; {
		case bytes.Equal(page, want[at:at+cachePage]):
			old++
		case !bytes.Equal(page, whole('b')[:cachePage]):
			t.Errorf("page %d is torn", i)
		}
	}
	if old != lost {
		t.Errorf("%d pages are the old ones, and %d were lost", old, lost)
	}
	if c.writeAt(whole('c'), 0) == nil || c.flush() == nil {
		t.Error("the disk works without power")
	}
	// A disk whose cache is full writes on its own account.
	if c, err = openWriteCache(path); err != nil {
		t.Fatal(err)
	}
	must(c.file.Truncate((cachePages + 1) * cachePage))
	must(c.writeAt(make([]byte, (cachePages+1)*cachePage), 0))
	if len(c.dirty) != 0 {
		t.Errorf("the cache holds %d pages", len(c.dirty))
	}
	must(c.file.Close())
}
