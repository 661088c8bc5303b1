package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
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

// TestAnothersLockIsWaitedFor: of a lock that is held, the VM's supervisor answers,
// and a command gives it up soon.
func TestAnothersLockIsWaitedFor(t *testing.T) {
	l := Layout{Root: t.TempDir()}
	file := l.VM("vm").Lock()
	command, err := takeLock(file)
	if err != nil {
		t.Fatal(err)
	}
	type taken struct {
		lock *os.File
		err  error
	}
	waiting := make(chan taken, 1)
	go func() {
		lock, err := l.lockVM(t.Context(), "vm")
		waiting <- taken{lock, err}
	}()
	select {
	case got := <-waiting:
		t.Fatalf("it was not waited for: %v", got.err)
	case <-time.After(10 * lockPoll):
	}
	// As rm does: the file goes while it is held, and its directory.
	if err := errors.Join(os.RemoveAll(filepath.Dir(file)), command.Close()); err != nil {
		t.Fatal(err)
	}
	got := <-waiting
	if got.err != nil {
		t.Fatal(got.err)
	}
	if held, err := locked(file); !held || err != nil {
		t.Errorf("held %v, error %v", held, err)
	}

	// A supervisor is not waited for.
	s := &Supervisor{status: Status{Name: "vm", State: Running}}
	control, err := serveControl(l.VM("vm").Control(), s)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.lockVM(t.Context(), "vm"); !errors.Is(err, errLocked) {
		t.Errorf("%v, want errLocked", err)
	}
	if err := control.close(); err != nil {
		t.Fatal(err)
	}

	// Nor is anyone for ever.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.lockVM(ctx, "vm"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that it was cancelled", err)
	}
	if err := got.lock.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLockWhileItsDirectoryGoes lets many take and remove the lock at once, as gc
// does with a VM of which nothing is there: each gets it, one after the other.
func TestLockWhileItsDirectoryGoes(t *testing.T) {
	p := Layout{Root: t.TempDir()}.VM("vm")
	var holders atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for got := 0; got < 50; {
				lock, err := takeLock(p.Lock())
				if errors.Is(err, errLocked) {
					runtime.Gosched()
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				got++
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d hold the lock", n)
				}
				err = os.WriteFile(p.GateSocket(), nil, 0o600)
				holders.Add(-1)
				if err := errors.Join(err, removeRunDir(p), lock.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}
