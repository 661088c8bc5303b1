package cloudhypervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/clawvm/clawvm/vmm"
)

// maxRequest is the longest request body that cloud-hypervisor takes (micro_http's limit up to v53); it answers a longer one with
// a 400 that names no limit.
const maxRequest = 51200

// maxReply bounds what is read of an answer; vm.info, the longest, is some tens of KiB.
const maxReply = 1 << 20

// The deadlines of the calls. Nothing is tried again: the server works on one request at a time, and one that
// was given up goes on in it, so that whoever runs into a deadline has to kill the process.
const (
	pingLimit   = 20 * time.Second // the process starts in 5 ms; under emulation, on a busy machine, in seconds
	createLimit = 10 * time.Second
	// bootLimit is over the 60 s for which cloud-hypervisor itself waits for a virtiofsd.
	bootLimit = 75 * time.Second
	callLimit = 10 * time.Second
	// stopLimit is for flushing disks.
	stopLimit = 15 * time.Second
)

// client speaks cloud-hypervisor's REST API over its unix socket, in the dialect of v52 and v53.
type client struct{ http http.Client }

func newClient(socket string) *client {
	return &client{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		// The server takes ten connections, idle ones included.
		DisableKeepAlives:  true,
		DisableCompression: true,
	}}}
}

// APIError is a request that cloud-hypervisor refused.
type APIError struct {
	Call   string   // such as "vm.boot"
	Status int      // the HTTP status, 500 for nearly everything
	Chain  []string // its reasons, outermost first
}

func (e *APIError) Error() string {
	if len(e.Chain) == 0 {
		return fmt.Sprintf("cloud-hypervisor refused %s with status %d", e.Call, e.Status)
	}
	return fmt.Sprintf("cloud-hypervisor refused %s: %s", e.Call, vmm.Plain(strings.Join(e.Chain, ": ")))
}

// pong is vmm.ping's answer.
type pong struct {
	Version string `json:"version"` // "53.0.0", the program's own whatever its build is called
}

func (c *client) ping(ctx context.Context) (p pong, err error) {
	return p, c.do(ctx, pingLimit, http.MethodGet, "vmm.ping", nil, &p)
}

// create hands over the configuration. It says nothing about what it names: a missing file shows at boot.
func (c *client) create(ctx context.Context, config *vmConfig) error {
	return c.do(ctx, createLimit, http.MethodPut, "vm.create", config, nil)
}

func (c *client) boot(ctx context.Context) error {
	return c.do(ctx, bootLimit, http.MethodPut, "vm.boot", nil, nil)
}

func (c *client) powerButton(ctx context.Context) error {
	return c.do(ctx, callLimit, http.MethodPut, "vm.power-button", nil, nil)
}

func (c *client) pause(ctx context.Context) error {
	return c.do(ctx, callLimit, http.MethodPut, "vm.pause", nil, nil)
}

func (c *client) resume(ctx context.Context) error {
	return c.do(ctx, callLimit, http.MethodPut, "vm.resume", nil, nil)
}

// shutdown ends the VMM and with it the machine.
func (c *client) shutdown(ctx context.Context) error {
	return c.do(ctx, stopLimit, http.MethodPut, "vmm.shutdown", nil, nil)
}

// vmInfo is the part of vm.info's answer that anything depends on.
type vmInfo struct {
	State string `json:"state"` // stateRunning, "Paused", "Created", …
}

// stateRunning is the state of a machine that has booted and isn't paused.
const stateRunning = "Running"

func (c *client) info(ctx context.Context) (i vmInfo, err error) {
	return i, c.do(ctx, callLimit, http.MethodGet, "vm.info", nil, &i)
}

// do makes one call. A call without a body is sent without one: the server refuses even "{}" where it expects none.
func (c *client) do(ctx context.Context, limit time.Duration, method, call string, in, out any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer in %s", limit))
	defer cancel()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("cannot encode %s: %w", call, err)
		}
		if len(b) > maxRequest {
			return fmt.Errorf("cannot send %s: it is %d bytes long, and cloud-hypervisor takes %d; declare fewer disks or shares", call, len(b), maxRequest)
		}
		body = bytes.NewReader(b) // has a length: the server knows no chunks
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://localhost/api/v1/"+call, body)
	if err != nil {
		return fmt.Errorf("cannot make the request %s: %w", call, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return unanswered(ctx, call, err)
	}
	defer resp.Body.Close()
	reply, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return unanswered(ctx, call, err)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return &APIError{Call: call, Status: resp.StatusCode, Chain: errorChain(reply)}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(reply, out); err != nil {
		return fmt.Errorf("cannot read cloud-hypervisor's answer to %s: %w", call, err)
	}
	return nil
}

// unanswered says what really ended the call: a deadline, the process's end, or the connection.
func unanswered(ctx context.Context, call string, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	} else if wrapped := new(url.Error); errors.As(err, &wrapped) {
		err = wrapped.Err // the URL says nothing: its host is made up
	}
	return fmt.Errorf("cloud-hypervisor did not answer %s: %w", call, err)
}

// errorChain reads the body of a refusal: an array of reasons since v47, an object from the HTTP server itself, plain text
// before, or nothing.
func errorChain(body []byte) []string {
	body = bytes.TrimSpace(body)
	var chain []string
	if json.Unmarshal(body, &chain) == nil {
		return chain
	}
	var object struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(body, &object) == nil && object.Error != "" {
		return []string{object.Error}
	}
	if len(body) == 0 {
		return nil
	}
	return []string{string(body)}
}

// refused tells a refusal from a call that was not answered.
func refused(err error) bool {
	var api *APIError
	return errors.As(err, &api)
}
