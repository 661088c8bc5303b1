// Command hollow is a qemu-system-x86_64 with no machine in it: it takes the
// command line that clawvm gives QEMU, answers on QMP, and speaks for the guest's
// agent. A VM of it starts in milliseconds and takes a few MiB, so that tests of
// what clawvm does around a guest can start hundreds, and let them misbehave: the
// file NAME.mode beside the program says how VM NAME does.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/clawvm/clawvm/guest/agent"
)

// The modes.
const (
	modeReady   = "ready"    // as a guest should
	modeUnready = "unready"  // the workload is never ready
	modeSilent  = "silent"   // the agent never answers
	modeDies    = "dies"     // the VMM ends at once
	modeGone    = "goes"     // the VMM ends when the agent has been reached
	modeDeaf    = "deaf"     // heeds neither the agent's shutdown nor the power button
	modeLeaves  = "poweroff" // powers off when it is ready
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Println("QEMU emulator version 7.2.0 (hollow)")
		return
	}
	if err := run(strings.Join(os.Args[1:], "\n")); err != nil {
		fmt.Fprintln(os.Stderr, "hollow:", err)
		os.Exit(1)
	}
}

func run(args string) error {
	name, err := option(args, `(?m)^-name\n(.*)$`)
	if err != nil {
		return err
	}
	qmp, err := descriptor(args, "qmp")
	if err != nil {
		return err
	}
	channel, err := descriptor(args, "agent")
	if err != nil {
		return err
	}
	m := &machine{mode: mode(name), qmp: qmp, board: agent.NewBoard(), end: make(chan string, 1), reached: make(chan struct{}, 1)}
	if m.mode == modeDies {
		return fmt.Errorf("it is made to end at once")
	}
	fmt.Printf("hollow: %s is %s\n", name, m.mode)
	go m.serveQMP()
	if m.mode != modeSilent {
		go m.serveAgent(name, channel)
	}
	if m.mode == modeGone {
		<-m.reached
		return fmt.Errorf("it is made to end")
	}
	reason := <-m.end
	m.say(map[string]any{"event": "SHUTDOWN", "data": map[string]any{"guest": reason == "guest-shutdown", "reason": reason}})
	return nil
}

// option finds the value of an option among arguments, one a line.
func option(args, pattern string) (string, error) {
	found := regexp.MustCompile(pattern).FindStringSubmatch(args)
	if found == nil {
		return "", fmt.Errorf("no argument is as %s", pattern)
	}
	return found[1], nil
}

// descriptor is the inherited end of a character device.
func descriptor(args, id string) (*os.File, error) {
	value, err := option(args, `(?m)^socket,id=`+id+`,fd=(\d+)$`)
	if err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(value)
	return os.NewFile(uintptr(n), id), err
}

// mode reads how the machine is to behave.
func mode(name string) string {
	self, err := os.Executable()
	if err != nil {
		return modeReady
	}
	text, err := os.ReadFile(filepath.Join(filepath.Dir(self), name+".mode"))
	if err != nil {
		return modeReady
	}
	return strings.TrimSpace(string(text))
}

type machine struct {
	mode  string
	board *agent.Board
	end   chan string // the reason of QMP's SHUTDOWN

	reached chan struct{} // gets one when the host has reached the agent

	mu  sync.Mutex
	qmp *os.File
}

// say writes a line of QMP.
func (m *machine) say(message any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := json.NewEncoder(m.qmp).Encode(message); err != nil {
		fmt.Fprintln(os.Stderr, "hollow: QMP:", err)
	}
}

func (m *machine) shutdown(reason string) {
	select {
	case m.end <- reason:
	default: // it ends already
	}
}

func (m *machine) serveQMP() {
	m.say(map[string]any{"QMP": map[string]any{}})
	for lines := bufio.NewScanner(m.qmp); lines.Scan(); {
		var command struct {
			Execute string `json:"execute"`
			ID      int    `json:"id"`
		}
		if err := json.Unmarshal(lines.Bytes(), &command); err != nil {
			fmt.Fprintln(os.Stderr, "hollow: QMP:", err)
			continue
		}
		answer := map[string]any{}
		if command.Execute == "query-status" {
			answer = map[string]any{"running": true, "status": "running"}
		}
		m.say(map[string]any{"return": answer, "id": command.ID})
		switch {
		case command.Execute == "system_powerdown" && m.mode != modeDeaf:
			m.shutdown("guest-shutdown")
		case command.Execute == "quit":
			m.shutdown("host-qmp-quit")
		}
	}
}

func (m *machine) serveAgent(name string, channel io.ReadWriteCloser) {
	s := &agent.Server{
		Hello: agent.Hello{Version: "hollow", Name: name, Boot: "hollow", Kernel: "hollow"}, Board: m.board, Log: agent.NewLog(),
		Clock: func(time.Time) error { m.connected(); return nil },
		Shutdown: func(time.Duration) {
			if m.mode != modeDeaf {
				m.board.Post(agent.Event{Kind: agent.Ending, Reason: agent.ReasonPowerOff})
				m.shutdown("guest-shutdown")
			}
		},
	}
	m.board.Post(agent.Event{Kind: agent.WorkloadStarted})
	if m.mode != modeUnready {
		m.board.Post(agent.Event{Kind: agent.Ready})
	}
	if m.mode == modeLeaves {
		m.board.Post(agent.Event{Kind: agent.Ending, Reason: agent.ReasonPowerOff})
		m.shutdown("guest-shutdown")
	}
	err := s.ServeConn(context.Background(), channel, true)
	fmt.Fprintln(os.Stderr, "hollow: the agent's connection ended:", err)
}

// connected is called when the host has reached the agent.
func (m *machine) connected() {
	select {
	case m.reached <- struct{}{}:
	default:
	}
}
