// The hostile guest of the tests: PID 1 of a guest whose agent lies. It answers as
// an honest agent does until it is ready. Each copy out of it is a lie of its own,
// by the path that is asked for (lies.go), and each command too. The command
// "flood" makes it flood the host by every way that there is: events, the
// workload's log, the console, and an exec that never ends.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/agent"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("hostile:", err)
	}
	select {} // PID 1 must not end
}

func run() error {
	for _, m := range []struct{ what, where string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := os.MkdirAll(m.where, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.what, m.where, m.what, 0, ""); err != nil {
			return err
		}
	}
	list, err := os.ReadFile(guest.ModulesPath)
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(list)) {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			fmt.Println(path, err)
		}
		f.Close()
	}
	conn, err := open()
	if err != nil {
		return err
	}
	if err := greet(conn); err != nil {
		return err
	}
	config := yamux.DefaultConfig()
	config.EnableKeepAlive, config.LogOutput = false, io.Discard
	session, err := yamux.Server(conn, config)
	if err != nil {
		return err
	}
	go shout()
	return http.Serve(session, http.HandlerFunc(lie))
}

// open opens the port, or a vsock connection where there is none.
func open() (io.ReadWriteCloser, error) {
	for deadline := time.Now().Add(30 * time.Second); ; {
		if conn, err := agent.OpenPort(context.Background()); err == nil {
			return conn, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no port")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// greet does the guest's half of the port's handshake.
func greet(c io.ReadWriter) error {
	magic := []byte("\xfeclawvm\x01")
	var seen []byte
	answered := false
	for one := make([]byte, 1); ; {
		if _, err := c.Read(one); err != nil {
			return err
		}
		seen = append(seen, one[0])
		at := bytes.LastIndex(seen, magic)
		if at < 0 || len(seen) < at+len(magic)+17 {
			continue
		}
		message := bytes.Clone(seen[at : at+len(magic)+17])
		if message[len(magic)] == 'G' {
			return nil
		}
		if !answered {
			answered = true
			message[len(magic)] = 'A'
			if _, err := c.Write(message); err != nil {
				return err
			}
		}
		seen = seen[:0]
	}
}

func lie(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/v1/hello":
		fmt.Fprint(w, `{"protocol":1,"version":"liar","name":"liar"}`)
	case "/v1/events":
		fmt.Fprint(w, `{"kind":"ready"}`+"\n"+`{"kind":"ready"}`+"\n")
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		<-flood
		for i := 0; ; i++ {
			// A restart a line, as honest agents say it, with all that a line may hold.
			if _, err := fmt.Fprintf(w, `{"kind":"workload-exited","code":1,"next":1,"detail":"%d %s"}`+"\n", i, strings.Repeat(`\u001b[2J`, 100)); err != nil {
				return
			}
		}
	case "/v1/log":
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		<-flood
		for line := frame(2, bytes.Repeat([]byte("liar \x1b[2J\n"), 3000)); ; {
			if _, err := w.Write(line); err != nil {
				return
			}
		}
	case "/v1/exec":
		exec(w, r)
	default: // the clock is set, and a request to end is understood, and nothing more
		status := http.StatusNoContent
		if r.URL.Path == "/v1/shutdown" {
			status = http.StatusAccepted
		}
		w.WriteHeader(status)
	}
}

// flood is closed when the floods are to begin.
var (
	flood      = make(chan struct{})
	beginFlood = sync.OnceFunc(func() { close(flood) })
)

// shout writes to the console without an end.
func shout() {
	<-flood
	for deadline := time.Now().Add(30 * time.Second); ; {
		f, err := os.OpenFile("/dev/hvc0", os.O_WRONLY|unix.O_NOCTTY, 0)
		if err != nil && time.Now().Before(deadline) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			fmt.Println("no console:", err)
			return
		}
		for line := bytes.Repeat([]byte("\x1b]0;owned\x07\x1b[2J liar \x9b31m\n"), 200); ; {
			if _, err := f.Write(line); err != nil {
				return
			}
		}
	}
}
