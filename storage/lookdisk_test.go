package storage

import (
	"errors"
	"io/fs"
	"os"
	"testing"
)

func TestLookDisk(t *testing.T) {
	d := newDisk(t, 16<<20)
	look := func(d Disk) DiskState {
		t.Helper()
		s, err := LookDisk(d)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	write := func(at int64, b ...byte) {
		t.Helper()
		f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(b, superblockOffset+at)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if s := look(d); s != (DiskState{}) {
		t.Errorf("a new disk: %+v", s)
	}
	before, err := os.ReadFile(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	write(sbState, 3)
	write(sbFeatureIncompat, before[superblockOffset+sbFeatureIncompat]|incompatRecover)
	if s := look(d); !s.Unfinished || !s.Errors {
		t.Errorf("a disk that wants care: %+v", s)
	}
	write(sbMagic, 0, 0)
	if _, err := LookDisk(d); !errors.Is(err, ErrCorruptDisk) {
		t.Error(err)
	}
	larger := d
	larger.Size *= 2
	if _, err := LookDisk(larger); !errors.Is(err, ErrDiskSize) {
		t.Error(err)
	}
	if _, err := LookDisk(Disk{Path: d.Path + ".none", Size: d.Size}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
