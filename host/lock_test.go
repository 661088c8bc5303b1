package host

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestLockIsHeldOnceAndCanBeAskedFor(t *testing.T) {
	file := filepath.Join(t.TempDir(), "vm", "lock")
	if held, err := locked(file); held || err != nil {
		t.Fatalf("a lock that is not there: held %v, error %v", held, err)
	}
	first, err := takeLock(file)
	if err != nil {
		t.Fatal(err)
	}
	if held, err := locked(file); !held || err != nil {
		t.Errorf("held %v, error %v while it is", held, err)
	}
	if _, err := takeLock(file); !errors.Is(err, errLocked) {
		t.Errorf("taking it twice: %v, want errLocked", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if held, err := locked(file); held || err != nil {
		t.Errorf("held %v, error %v after it was given up", held, err)
	}
}

func TestLockOfARemovedFileIsNotTheLock(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	first, err := takeLock(file)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	second, err := takeLock(file)
	if err != nil {
		t.Fatalf("the name is free again, and yet: %v", err)
	}
	defer second.Close()
	if held, err := locked(file); !held || err != nil {
		t.Errorf("the new file: held %v, error %v", held, err)
	}
}
