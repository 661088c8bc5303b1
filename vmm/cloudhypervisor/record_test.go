package cloudhypervisor

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/clawvm/clawvm/vmm"
)

// recordVariable names the directory that TestInsideRecord writes to; integration/emuhost's TestRecord fetches it from there.
const recordVariable = "CLAWVM_RECORD_TO"

// TestInsideRecord records the scenarios from a real cloud-hypervisor.
func TestInsideRecord(t *testing.T) {
	files, to := insideDir(t), os.Getenv(recordVariable)
	if to == "" {
		t.Skip("records only when " + recordVariable + " says where")
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			r := record(t, s, files)
			b, err := json.MarshalIndent(r, "", " ")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(to, s.name+".json"), append(b, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// eventLog collects the raw event stream.
type eventLog struct {
	mu   sync.Mutex
	text strings.Builder
	more chan struct{}
}

func (l *eventLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	select {
	case l.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (l *eventLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// await waits until the stream has all these events from an offset on.
func (l *eventLog) await(t *testing.T, from int, events ...string) {
	t.Helper()
	deadline := time.After(bootWait)
	for {
		seen := map[string]bool{}
		if err := readEvents(strings.NewReader(l.String()[from:]), func(e event) { seen[e.String()] = true }); err != nil {
			t.Fatal(err)
		}
		missing := false
		for _, e := range events {
			missing = missing || !seen[e]
		}
		if !missing {
			return
		}
		select {
		case <-l.more:
		case <-deadline:
			t.Fatalf("no %v in %s", events, l.String()[from:])
		}
	}
}

func record(t *testing.T, s scenario, files string) *recording {
	t.Helper()
	// The same directory in each recording, so that they differ in nothing but what they are about.
	const dir = "/run/recorded"
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	m := recordedMachine(dir, files)
	channel, err := New("").OpenChannel(m)
	if err != nil {
		t.Fatal(err)
	}
	m.Agent = channel
	agent, err := net.FileListener(channel.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	defer channel.Close()
	if s.spoil != nil {
		s.spoil(m)
	}
	p := startRecorded(t, m)
	defer p.stop(t)
	r := &recording{About: s.about, Version: p.version}
	p.events.await(t, 0, "vmm/starting")
	r.Before = p.events.String()
	at := len(r.Before)
	for n, c := range append(s.calls[:len(s.calls):len(s.calls)], s.after...) {
		x := p.exchange(t, m, c, s.landlock)
		last := n == len(s.calls)-1
		if c.name == "vm.boot" && strings.Contains(x.Reply, " 204 ") {
			p.events.await(t, at, "vm/booted")
			told := tell(t, agent, s.tell)
			defer told.Close()
		}
		if last {
			p.events.await(t, at, s.until...)
		}
		text := p.events.String()
		x.Events, at = text[at:], len(text)
		r.Exchanges = append(r.Exchanges, x)
		if x.Reply == "" || c.name == "vmm.shutdown" {
			r.Ended, r.ExitCode = true, p.wait(t)
			r.Stderr = p.stderr.String()
		}
	}
	return r
}

// tell waits for the guest and tells it what to do; "" leaves it waiting.
func tell(t *testing.T, agent net.Listener, what string) net.Conn {
	t.Helper()
	if err := agent.(*net.UnixListener).SetDeadline(time.Now().Add(bootWait)); err != nil {
		t.Fatal(err)
	}
	c, err := agent.Accept()
	if err != nil {
		t.Fatalf("the guest does not call: %v", err)
	}
	lines := bufio.NewScanner(c)
	for lines.Scan() && lines.Text() != "what now" {
		continue
	}
	if what != "" {
		if _, err := fmt.Fprintln(c, what); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// recorded is a process that is recorded from.
type recorded struct {
	cmd     *exec.Cmd
	socket  string
	events  *eventLog
	stderr  bytes.Buffer
	version string
	done    chan struct{}
}

func startRecorded(t *testing.T, m *vmm.Machine) *recorded {
	t.Helper()
	version, err := New("").Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	path, err := New("").find()
	if err != nil {
		t.Fatal(err)
	}
	api, err := listen(apiPath(m))
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &recorded{socket: apiPath(m), events: &eventLog{more: make(chan struct{}, 1)}, version: version, done: make(chan struct{})}
	p.cmd = exec.Command(path, arguments()...)
	p.cmd.ExtraFiles = []*os.File{api, w}
	p.cmd.Stderr = &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(api.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	go func() {
		io.Copy(p.events, r)
		r.Close()
	}()
	go func() {
		p.cmd.Wait()
		close(p.done)
	}()
	return p
}

func (p *recorded) wait(t *testing.T) int {
	t.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(bootWait):
		t.Fatal("the process does not end")
	}
	return 0
}

func (p *recorded) stop(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	p.wait(t)
}

// exchange makes one request on a connection of its own and keeps every byte of the reply.
func (p *recorded) exchange(t *testing.T, m *vmm.Machine, c call, landlock bool) exchange {
	t.Helper()
	x := exchange{Method: c.method, Call: c.name, Pad: c.pad}
	var body io.Reader
	if c.body != nil {
		v := c.body
		if _, ok := v.(config); ok {
			v = configure(m, landlock)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		x.Body = b
		body = bytes.NewReader(append(bytes.Repeat([]byte(" "), c.pad), b...))
	}
	conn, err := net.Dial("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(bootWait)); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(c.method, "http://localhost/api/v1/"+c.name, body)
	if err != nil {
		t.Fatal(err)
	}
	if err := req.Write(conn); err != nil {
		t.Log(err) // the server may refuse before it has read all
	}
	var raw bytes.Buffer
	resp, err := http.ReadResponse(bufio.NewReader(io.TeeReader(conn, &raw)), req)
	if err == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		err = errors.Join(err, resp.Body.Close())
	}
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		t.Fatalf("%s: %v", c.name, err)
	}
	x.Reply = raw.String()
	return x
}
