package storage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// eachVirtiofsd runs a test with every virtiofsd that the machine has.
func eachVirtiofsd(t *testing.T, test func(t *testing.T, v *Virtiofsd)) {
	needRoot(t)
	paths := []string{os.Getenv(VirtiofsdVariable)}
	paths = append(paths, virtiofsdPaths...)
	found := 0
	for _, path := range paths {
		v, err := askVersion(t.Context(), path)
		if err != nil {
			continue
		}
		found++
		t.Run(fmt.Sprintf("%s-legacy=%t", v.Version, v.Legacy), func(t *testing.T) { test(t, v) })
	}
	if found == 0 {
		t.Skip("no virtiofsd here")
	}
}

// shareFor prepares a share whose directories other users can reach.
func shareFor(t *testing.T, readonly bool) Share {
	t.Helper()
	base, err := os.MkdirTemp("/tmp", "share")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			t.Error(err)
		}
	})
	log, err := os.Create(filepath.Join(base, "log"))
	if err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(base, "source, with a comma")
	if err := errors.Join(os.Chmod(base, 0o755), os.Mkdir(source, 0o755), os.WriteFile(filepath.Join(source, "file"), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	s := Share{
		Tag: "data", Source: source, Socket: filepath.Join(base, "data.sock"),
		ReadOnly: readonly, Cache: CacheNever, OwnerUID: 30001, OwnerGID: 30002, Log: log,
	}
	if !readonly {
		s.SquashUID, s.SquashGID, s.GuestUID, s.GuestGID = 30003, 30004, 20001, 20001
		if err := os.Chown(source, s.SquashUID, s.SquashGID); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		text, err := os.ReadFile(log.Name())
		if err != nil {
			t.Error(err)
		}
		if len(text) > 0 {
			t.Logf("virtiofsd: %s", text)
		}
		if err := log.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// family returns a process and its descendants.
func family(pid int) []int {
	all := []int{pid}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return all
	}
	for _, f := range strings.Fields(string(text)) {
		child, err := strconv.Atoi(f)
		if err == nil {
			all = append(all, family(child)...)
		}
	}
	return all
}

// alive says whether a process runs (a zombie doesn't).
func alive(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	after := text[bytes.LastIndexByte(text, ')')+1:]
	return !bytes.HasPrefix(after, []byte(" Z")) && !bytes.HasPrefix(after, []byte(" X"))
}

// gone waits until none of the processes is left: a process closes its files,
// which is what Daemon waits for, a moment before it ends.
func gone(t *testing.T, pids []int) {
	t.Helper()
	eventually(t, fmt.Sprintf("none of %v is left", pids), func() bool {
		for _, pid := range pids {
			if alive(pid) {
				return false
			}
		}
		return true
	})
}

// sandboxed waits until virtiofsd has made its sandbox and returns the whole
// family. QEMU's makes it when the VMM connects, so this connects then.
func sandboxed(t *testing.T, v *Virtiofsd, s Share, d *Daemon) []int {
	t.Helper()
	t.Cleanup(func() {
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
	})
	if v.Legacy {
		connect(t, s)
	}
	var all []int
	eventually(t, "virtiofsd has a child in the sandbox", func() bool {
		select {
		case <-d.Done():
			t.Fatalf("virtiofsd ended: %v", d.Err())
		default:
		}
		all = family(d.PID())
		if len(all) != 2 {
			return false
		}
		own, err1 := os.Readlink("/proc/self/ns/mnt")
		theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", all[1]))
		return err1 == nil && err2 == nil && own != theirs
	})
	return all
}

// connect connects as a VMM would, until the test ends.
func connect(t *testing.T, s Share) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return c
}

func TestServe(t *testing.T) {
	eachVirtiofsd(t, func(t *testing.T, v *Virtiofsd) {
		for _, readonly := range []bool{true, false} {
			t.Run(fmt.Sprintf("readonly=%t", readonly), func(t *testing.T) {
				s := shareFor(t, readonly)
				d, err := v.Serve(t.Context(), s)
				if !readonly && v.Legacy {
					if !errors.Is(err, ErrShare) || !strings.Contains(err.Error(), "install virtiofsd 1.13.0") {
						t.Fatalf("a writable share gave %v", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				var st syscall.Stat_t
				if err := syscall.Stat(s.Socket, &st); err != nil {
					t.Fatal(err)
				}
				if st.Uid != 30001 || st.Gid != 30002 || st.Mode&0o777 != 0o600 {
					t.Errorf("the socket is %d:%d %o", st.Uid, st.Gid, st.Mode)
				}
				all := sandboxed(t, v, s, d)
				nofile, _, err := fileLimit()
				if err != nil {
					t.Fatal(err)
				}
				limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", all[1]))
				if err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(string(limits), fmt.Sprintf("Max open files            %d ", nofile)) {
					t.Errorf("its limits are:\n%s", limits)
				}
				status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", all[1]))
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, "the sandboxed process has a seccomp filter", func() bool {
					status, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", all[1]))
					return err == nil && strings.Contains(string(status), "Seccomp:\t2")
				})
				for line := range strings.Lines(string(status)) {
					if strings.HasPrefix(line, "Cap") || strings.HasPrefix(line, "Uid") || strings.HasPrefix(line, "NoNew") {
						t.Log(strings.TrimSpace(line))
					}
				}
				if err := d.Stop(); err != nil {
					t.Fatal(err)
				}
				gone(t, all)
				if err := d.Err(); err != nil {
					t.Errorf("after Stop: %v", err)
				}
				left, err := filepath.Glob(s.Socket + "*")
				if err != nil || len(left) != 0 {
					t.Errorf("left: %v, %v", left, err)
				}
				if err := d.Stop(); err != nil {
					t.Errorf("a second Stop: %v", err)
				}
			})
		}
	})
}

// TestServeDisconnect connects as a VMM would and goes.
func TestServeDisconnect(t *testing.T) {
	eachVirtiofsd(t, func(t *testing.T, v *Virtiofsd) {
		s := shareFor(t, true)
		d, err := v.Serve(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		c := connect(t, s)
		all := sandboxed(t, &Virtiofsd{}, s, d)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		<-d.Done()
		if d.Err() == nil {
			t.Error("its end isn't told of")
		}
		gone(t, all)
		// Nobody listens any more, so a VMM is refused instead of waiting for ever.
		if _, err := net.Dial("unix", s.Socket); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connecting gave %v", err)
		}
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
	})
}

// TestServeKilled kills virtiofsd and looks that its child goes too, and that
// the next start isn't hindered by what is left.
func TestServeKilled(t *testing.T) {
	eachVirtiofsd(t, func(t *testing.T, v *Virtiofsd) {
		s := shareFor(t, true)
		d, err := v.Serve(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		all := sandboxed(t, v, s, d)
		if err := syscall.Kill(d.PID(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-d.Done()
		gone(t, all)
		if err := d.Err(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("its end is told as %v", err)
		}
		if err := d.Stop(); err != nil {
			t.Fatal(err)
		}
		again, err := v.Serve(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		if err := again.Stop(); err != nil {
			t.Error(err)
		}
	})
}

// serveUntilKilled is the process that TestServeStarterKilled kills.
func serveUntilKilled() int {
	f := strings.Split(os.Getenv(serveMark), "|")
	v, err := askVersion(context.Background(), f[0])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	s := Share{Tag: "data", Source: f[1], Socket: f[2], ReadOnly: f[3] == "ro", Cache: CacheAlways,
		SquashUID: 30003, SquashGID: 30004, GuestUID: 20001, GuestGID: 20001}
	// The main goroutine holds the main thread, which ends with the process.
	s.Spawn = func(cmd *exec.Cmd) error {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
		return cmd.Start()
	}
	d, err := v.Serve(context.Background(), s)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(d.PID())
	<-d.Done()
	fmt.Println(d.Err())
	return 1
}

func TestServeStarterKilled(t *testing.T) {
	eachVirtiofsd(t, func(t *testing.T, v *Virtiofsd) {
		for _, mode := range []string{"ro", "rw"} {
			if mode == "rw" && v.Legacy {
				continue
			}
			t.Run(mode, func(t *testing.T) {
				s := shareFor(t, mode == "ro")
				starter := exec.Command("/proc/self/exe")
				starter.Env = append(os.Environ(), serveMark+"="+strings.Join([]string{v.Path, s.Source, s.Socket, mode}, "|"))
				starter.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
				out, err := starter.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := starter.Start(); err != nil {
					t.Fatal(err)
				}
				var pid int
				if _, err := fmt.Fscan(out, &pid); err != nil {
					t.Fatal(err, starter.Process.Kill())
				}
				if v.Legacy {
					connect(t, s)
				}
				var all []int
				eventually(t, "virtiofsd's child sleeps in its sandbox", func() bool {
					all = family(pid)
					if len(all) != 2 {
						return false
					}
					status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", all[1]))
					return err == nil && strings.Contains(string(status), "Seccomp:\t2")
				})
				if err := starter.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				if err := starter.Wait(); err == nil {
					t.Error("the starter ended well")
				}
				gone(t, all)
				// What is left must not hinder the next start.
				d, err := v.Serve(t.Context(), s)
				if err != nil {
					t.Fatal(err)
				}
				if err := d.Stop(); err != nil {
					t.Error(err)
				}
			})
		}
	})
}
