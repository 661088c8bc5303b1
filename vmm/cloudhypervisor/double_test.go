package cloudhypervisor

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// double stands in for cloud-hypervisor where there is none: it plays a recording, one request at a time, and
// refuses what isn't like the recorded request.
type double struct {
	Recording *recording
	Hang      string // the call that is never answered
	Cut       string // the call of whose answer half is sent
	Die       string // the call at which the process dies, as Recording ended
	Tear      bool   // the first event is torn
	Babble    bool   // events without end that are none
}

// doubleLife bounds a double that nobody kills.
const doubleLife = time.Minute

// TestMain makes the test's program a double when it is started as cloud-hypervisor.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == program {
		if err := doubleMain(); err != nil {
			fmt.Fprintln(os.Stderr, "double:", err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// install makes a program of d.
func (d *double) install(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	b, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, program)
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "double.json"), b, 0o644), os.Symlink(self, path)); err != nil {
		t.Fatal(err)
	}
	return path
}

func doubleMain() error {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(os.Args[0]), "double.json"))
	if err != nil {
		return err
	}
	d := &double{}
	if err := json.Unmarshal(b, d); err != nil {
		return err
	}
	if slices.Equal(os.Args[1:], []string{"--version"}) {
		fmt.Printf("cloud-hypervisor %s\nMigration Protocol Versions: 0\n", d.Recording.Version)
		return nil
	}
	if !slices.Equal(os.Args[1:], arguments()) {
		return fmt.Errorf("started with %q", os.Args[1:])
	}
	time.AfterFunc(doubleLife, func() { os.Exit(4) })
	l, err := net.FileListener(os.NewFile(3, "api"))
	if err != nil {
		return err
	}
	events := os.NewFile(4, "events")
	if err := d.play(l, events); err != nil {
		return err
	}
	if _, err := io.WriteString(os.Stderr, d.Recording.Stderr); err != nil {
		return err
	}
	if d.Recording.ExitCode < 0 {
		return syscall.Kill(os.Getpid(), syscall.SIGKILL) // SIGABRT would make Go list its goroutines
	}
	os.Exit(d.Recording.ExitCode)
	return nil
}

// play plays the recording to its end; it returns when the process it stands for ended by itself.
func (d *double) play(l net.Listener, events io.Writer) error {
	if err := d.emit(events, d.Recording.Before); err != nil {
		return err
	}
	for _, x := range d.Recording.Exchanges {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		ended, err := d.answer(c, x)
		if err != nil {
			return err
		}
		if ended {
			return nil
		}
		if err := d.emit(events, x.Events); err != nil {
			return err
		}
	}
	if d.Recording.Ended {
		return nil
	}
	for {
		if _, err := l.Accept(); err != nil { // it has nothing to say any more
			return err
		}
	}
}

func (d *double) emit(w io.Writer, events string) error {
	if d.Babble {
		for {
			if _, err := io.WriteString(w, strings.Repeat("[", 4096)); err != nil {
				return err
			}
		}
	}
	if d.Tear && events != "" {
		d.Tear = false
		events = events[:len(events)/2] + "\n" + events
	}
	_, err := io.WriteString(w, events)
	return err
}

// answer answers one request. The connection stays open, as the real one's does, until its other end closes it.
func (d *double) answer(c net.Conn, x exchange) (ended bool, err error) {
	req, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return false, err
	}
	reply := x.Reply
	if why := differs(req, x); why != "" {
		body := fmt.Sprintf("[%q]", "the double: "+why)
		reply = fmt.Sprintf("HTTP/1.1 400 \r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	switch x.Call {
	case d.Hang:
		return false, nil
	case d.Die:
		return true, nil
	case d.Cut:
		_, err := io.WriteString(c, reply[:len(reply)/2])
		return false, errors.Join(err, c.Close())
	}
	if reply == "" {
		return true, nil
	}
	if _, err := io.WriteString(c, reply); err != nil {
		return false, err
	}
	go func() {
		io.Copy(io.Discard, c)
		c.Close()
	}()
	return false, nil
}

// differs says how a request is unlike the recorded one: its method, its call, whether it has a body, and the body's keys.
func differs(req *http.Request, x exchange) string {
	if req.Method != x.Method || req.URL.Path != "/api/v1/"+x.Call {
		return fmt.Sprintf("%s %s instead of %s %s", req.Method, req.URL.Path, x.Method, x.Call)
	}
	if len(req.TransferEncoding) > 0 || req.Header.Get("Expect") != "" {
		return "a body in chunks, or one that waits to be asked for"
	}
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return err.Error()
	}
	if (len(body) > 0) != (len(x.Body) > 0) {
		return fmt.Sprintf("a body of %d bytes instead of %d", len(body), len(x.Body))
	}
	if len(body) == 0 {
		return ""
	}
	var got, want any
	if err := errors.Join(json.Unmarshal(body, &got), json.Unmarshal(x.Body, &want)); err != nil {
		return err.Error()
	}
	if g, w := keys(got), keys(want); !slices.Equal(g, w) {
		return fmt.Sprintf("a body with %v instead of %v", g, w)
	}
	return ""
}
