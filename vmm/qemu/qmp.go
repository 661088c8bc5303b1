package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/clawvm/clawvm/vmm"
)

// maxLine bounds a line of QMP. What is asked for here answers in a few hundred bytes; a QEMU that a guest took over
// could send without end.
const maxLine = 256 << 10

// qmp speaks the QEMU Machine Protocol (docs/interop/qmp-spec): JSON objects, one a line. One command at a time.
type qmp struct {
	conn  net.Conn
	event func(qmpEvent) // called from the reader, in order

	turn chan struct{} // holds a token for whoever may send

	mu      sync.Mutex
	waiting chan qmpReply // where the answer to the command under way goes
	id      int           // that command's id
	done    chan struct{} // closed when the connection has ended
	err     error         // why, once done is closed
}

type qmpEvent struct {
	Name string
	Data struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
		Action string `json:"action"`
	}
}

type qmpReply struct {
	Return json.RawMessage
	Error  *qmpError
}

type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return vmm.Plain(e.Desc) }

// errQMPClosed means that QEMU closed its end, as it does when it ends.
var errQMPClosed = errors.New("QEMU has closed its control connection")

// openQMP reads QEMU's greeting, and makes it ready for commands. The connection is closed on an error, and by
// close otherwise. Events come from then on.
func openQMP(ctx context.Context, conn net.Conn, event func(qmpEvent)) (*qmp, error) {
	q := &qmp{conn: conn, event: event, turn: make(chan struct{}, 1), done: make(chan struct{})}
	q.turn <- struct{}{}
	greeted := make(chan error, 1)
	go q.read(greeted)
	err := ctx.Err()
	if err == nil {
		select {
		case err = <-greeted:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err == nil {
		_, err = q.do(ctx, "qmp_capabilities")
	}
	if err != nil {
		return nil, errors.Join(err, q.close())
	}
	return q, nil
}

// read reads until the connection ends.
func (q *qmp) read(greeted chan<- error) {
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(make([]byte, 0, 4096), maxLine)
	err := q.readGreeting(lines)
	greeted <- err
	for err == nil && lines.Scan() {
		err = q.take(lines.Bytes())
	}
	if err == nil {
		err = lines.Err()
	}
	if err == nil || errors.Is(err, net.ErrClosed) {
		err = errQMPClosed
	}
	q.err = err
	close(q.done)
}

func (q *qmp) readGreeting(lines *bufio.Scanner) error {
	if !lines.Scan() {
		if err := lines.Err(); err != nil {
			return fmt.Errorf("cannot read QEMU's greeting: %w", err)
		}
		return errQMPClosed
	}
	var greeting struct {
		QMP *struct{} `json:"QMP"`
	}
	if err := json.Unmarshal(lines.Bytes(), &greeting); err != nil || greeting.QMP == nil {
		return errors.New("cannot read QEMU's greeting: it is none")
	}
	return nil
}

// take takes one line: an event, or the answer to a command.
func (q *qmp) take(line []byte) error {
	var message struct {
		Event  string          `json:"event"`
		Data   json.RawMessage `json:"data"`
		Return json.RawMessage `json:"return"`
		Error  *qmpError       `json:"error"`
		ID     int             `json:"id"`
	}
	if err := json.Unmarshal(line, &message); err != nil {
		return fmt.Errorf("cannot read what QEMU says: %w", err)
	}
	if message.Event != "" {
		e := qmpEvent{Name: message.Event}
		if len(message.Data) > 0 {
			if err := json.Unmarshal(message.Data, &e.Data); err != nil {
				return nil // an event whose data look different isn't one of those that matter here
			}
		}
		q.event(e)
		return nil
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	// The answer to a command that nobody waits for any more has another id.
	if q.waiting != nil && message.ID == q.id {
		q.waiting <- qmpReply{Return: message.Return, Error: message.Error}
		q.waiting = nil
	}
	return nil
}

// do runs a command without arguments and returns what it returned.
func (q *qmp) do(ctx context.Context, command string) (json.RawMessage, error) {
	select {
	case <-q.turn:
		defer func() { q.turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, fmt.Errorf("cannot run QMP %s: %w", command, ctx.Err())
	case <-q.done:
		return nil, fmt.Errorf("cannot run QMP %s: %w", command, q.err)
	}
	answer := make(chan qmpReply, 1)
	q.mu.Lock()
	q.id++
	id := q.id
	q.waiting = answer
	q.mu.Unlock()
	line, err := json.Marshal(map[string]any{"execute": command, "id": id})
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline() // none is the zero time, which is no deadline here either
	if err := q.conn.SetWriteDeadline(deadline); err != nil {
		return nil, fmt.Errorf("cannot run QMP %s: %w", command, err)
	}
	if _, err := q.conn.Write(append(line, '\n')); err != nil {
		return nil, fmt.Errorf("cannot run QMP %s: %w", command, err)
	}
	select {
	case r := <-answer:
		if r.Error != nil {
			return nil, fmt.Errorf("cannot run QMP %s: %w", command, r.Error)
		}
		return r.Return, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("cannot run QMP %s: %w", command, ctx.Err())
	case <-q.done:
		return nil, fmt.Errorf("cannot run QMP %s: %w", command, q.err)
	}
}

func (q *qmp) close() error {
	err := q.conn.Close()
	<-q.done
	return err
}
