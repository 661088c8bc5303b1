package host

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host/gate"
)

// Status is what a supervisor says of its VM.
type Status struct {
	Name    string    `json:"name"`
	State   State     `json:"state"`
	Step    string    `json:"step,omitempty"` // while starting
	Started time.Time `json:"started"`
	// Ready is when the workload first answered; zero before that.
	Ready    time.Time `json:"ready,omitzero"`
	VMM      string    `json:"vmm,omitempty"`
	Address  string    `json:"address,omitempty"`
	VCPUs    int       `json:"vcpus,omitempty"`
	Memory   int64     `json:"memory,omitempty"` // bytes
	Ports    []string  `json:"ports,omitempty"`
	Image    string    `json:"image,omitempty"` // digest
	Kernel   string    `json:"kernel,omitempty"`
	Reboots  int       `json:"reboots,omitempty"`  // by the guest, since the supervisor started
	Restarts int       `json:"restarts,omitempty"` // of the workload, by the guest's init
	// VMRestarts is how often the supervisor started the VM again, by its policy.
	VMRestarts int `json:"vmRestarts,omitempty"`
	// Since is since when the workload is ready without a break; zero when it isn't.
	Since time.Time `json:"since,omitzero"`
	// Check is what the workload's health check found last; nil before the first.
	Check *HealthCheck `json:"check,omitempty"`
	// Again is when the VM is started again, of one that is Restarting.
	Again time.Time `json:"again,omitzero"`
	// Previous is how the life before this one ended.
	Previous *End `json:"previous,omitempty"`
	// Faults are the last ones of VM and workload since the supervisor started.
	Faults []Fault `json:"faults,omitempty"`
	// Workload is how the workload ended last.
	Workload string `json:"workload,omitempty"`
	// Lost is why the guest's agent can't be reached any more; the guest may live on.
	Lost string `json:"lost,omitempty"`
	PID  int    `json:"pid"` // the supervisor's
	// Limits are those that hold; nil before the start has come to them.
	Limits *Limits `json:"limits,omitempty"`
	// Made is what the VM was started with; nil before its VMM is started.
	Made *Made `json:"made,omitempty"`
}

// HealthCheck is the health of a workload that was ready.
type HealthCheck struct {
	// Time is when the guest told of it: of checks that pass, the first of a row.
	Time time.Time `json:"time"`
	// Failures counts those in a row; Unhealthy: they are too many.
	Failures  int  `json:"failures,omitempty"`
	Unhealthy bool `json:"unhealthy,omitempty"`
	// Answer is what was wrong.
	Answer string `json:"answer,omitempty"`
}

// State is where a VM is in its life.
//
//	stopped → starting → ready → stopping → stopped
//	           ↑  │       │ ↑↓
//	           │  │       │ paused
//	           │  └───────┴──→ failed
//	           └ restarting ┘
type State string

// The states. Stopped and Failed are derived where there is no supervisor, which
// says the others.
const (
	Stopped    State = "stopped"
	Starting   State = "starting"
	Running    State = "ready"
	Paused     State = "paused"
	Stopping   State = "stopping"
	Restarting State = "restarting" // between two lives
	Failed     State = "failed"
)

// control is the supervisor's socket: HTTP, for root only.
type control struct {
	listener net.Listener
	server   *http.Server
}

// controlHeaderTimeout bounds a client that says nothing.
const controlHeaderTimeout = 5 * time.Second

// serveControl listens on path. The socket is made 0600 before anyone can
// connect to it, by the process's umask, since there is no other moment.
func serveControl(path string, s *Supervisor) (*control, error) {
	l, err := listenUnix(path)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue(settledQuery) != "" {
			s.answer(w, s.settled(r.Context()))
			return
		}
		s.answer(w, s.Status())
	})
	mux.HandleFunc("GET /v1/declaration", func(w http.ResponseWriter, r *http.Request) { s.answer(w, s.declaration()) })
	mux.HandleFunc("GET /v1/progress", s.serveProgress)
	mux.HandleFunc("POST /v1/down", func(w http.ResponseWriter, r *http.Request) {
		grace, err := strconv.ParseInt(r.FormValue("grace"), 10, 64)
		if err != nil || grace < 0 {
			http.Error(w, "grace: milliseconds are wanted", http.StatusBadRequest)
			return
		}
		s.requestDown(time.Duration(grace) * time.Millisecond)
		w.WriteHeader(http.StatusAccepted)
	})
	mux.HandleFunc("POST /v1/start", func(w http.ResponseWriter, r *http.Request) {
		s.startNow()
		w.WriteHeader(http.StatusAccepted)
	})
	mux.HandleFunc("POST /v1/rotate", func(w http.ResponseWriter, r *http.Request) {
		if err := s.rotate(); err != nil {
			refuse(w, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, r *http.Request) {
		done, err := s.reload(r.Context())
		if err != nil {
			refuse(w, err)
			return
		}
		s.answer(w, done)
	})
	for how, method := range map[string]string{reachShow: "GET", reachAllow: "POST", reachDeny: "POST"} {
		mux.HandleFunc(method+" /v1/reach/"+how, func(w http.ResponseWriter, r *http.Request) {
			keep, err := strconv.ParseInt(cmp.Or(r.FormValue("for"), "0"), 10, 64)
			if err != nil || keep < 0 {
				http.Error(w, "for: milliseconds are wanted", http.StatusBadRequest)
				return
			}
			by := gate.Printable(r.FormValue("by"), callerMax)
			reach, err := s.changeReach(r.Context(), how, r.Form["entry"], time.Duration(keep)*time.Millisecond, by)
			if err != nil {
				refuse(w, err)
				return
			}
			s.answer(w, reach)
		})
	}
	for what, do := range map[string]func(context.Context) (bool, error){"pause": s.pause, "resume": s.resume} {
		mux.HandleFunc("POST /v1/"+what, func(w http.ResponseWriter, r *http.Request) {
			changed, err := do(r.Context())
			if err != nil {
				refuse(w, err)
				return
			}
			s.answer(w, Changed{changed})
		})
	}
	c := &control{listener: l, server: &http.Server{Handler: mux, ReadHeaderTimeout: controlHeaderTimeout}}
	go func() {
		if err := c.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.logf("the control socket is gone: %v", err)
		}
	}()
	return c, nil
}

// answer sends v as JSON.
func (s *Supervisor) answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.logf("cannot answer a request: %v", err)
	}
}

// callerMax bounds the name of who asked, for the log.
const callerMax = 64

// exitHeader carries the exit code that an error stands for.
const exitHeader = "Clawvm-Exit-Code"

// refuse answers with an error.
func refuse(w http.ResponseWriter, err error) {
	w.Header().Set(exitHeader, strconv.Itoa(ExitCode(err)))
	http.Error(w, err.Error(), http.StatusConflict)
}

// Changed is the answer to a request that may find things as they were asked for.
type Changed struct {
	Changed bool `json:"changed"`
}

// close ends the socket after its answers are sent, and removes it.
func (c *control) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), controlDrain)
	defer cancel()
	if err := c.server.Shutdown(ctx); err != nil {
		return c.server.Close()
	}
	return nil
}

// controlDrain is how long followers have to read the last event.
const controlDrain = 2 * time.Second

// listenUnix listens on a socket at path that only root can connect to. A
// left-over of an earlier process is removed first: the caller holds the VM's
// lock, so nobody serves it.
func listenUnix(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", path, err)
	}
	return l, nil
}

// serveProgress writes the progress so far and then what comes, a JSON line
// each, until the VM is ready or has ended.
func (s *Supervisor) serveProgress(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/jsonl")
	enc := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	for n := 0; ; {
		events, next, more := s.journal.from(n)
		n = next
		for _, e := range events {
			if enc.Encode(e) != nil || e.Last() && flush.Flush() == nil {
				return
			}
		}
		if flush.Flush() != nil {
			return
		}
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
}

// Client speaks to a VM's supervisor.
type Client struct {
	name string
	http *http.Client
}

var (
	// ErrNotRunning is the error of a VM that has no supervisor.
	ErrNotRunning = errors.New("the VM is not running")
	// ErrEnded is that of a VM whose supervisor ended while it was asked: it may
	// have done what it was asked for.
	ErrEnded = errors.New("its supervisor ended before it answered")
)

// Dial returns a client for the supervisor of the VM name. No connection is kept;
// there is nothing to close.
func (l Layout) Dial(name string) *Client {
	path := l.VM(name).Control()
	return &Client{name: name, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	}}}
}

// statusTimeout bounds one question to a supervisor: it answers from memory.
const statusTimeout = 2 * time.Second

// Status asks for the VM's status; [ErrNotRunning] when there is no supervisor.
func (c *Client) Status(ctx context.Context) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	var st Status
	err := c.question(ctx, "GET", "status", &st)
	return st, err
}

// settledQuery asks for a status that is sure. A supervisor of an older clawvm
// doesn't know it, and says what it thinks.
const settledQuery = "settled"

// settledTimeout bounds how long the kernel may take to end a killed process.
const settledTimeout = 20 * time.Second

// Settled is Status, but waits where a part of the VM has just died until the
// supervisor has noticed.
func (c *Client) Settled(ctx context.Context) (Status, error) {
	ctx, cancel := context.WithTimeout(ctx, settledTimeout)
	defer cancel()
	var st Status
	err := c.question(ctx, "GET", "status?"+settledQuery+"=1", &st)
	return st, err
}

// Follow calls each for the progress of the start until the VM is ready or has
// ended, and returns the last event.
func (c *Client) Follow(ctx context.Context, each func(Progress)) (Progress, error) {
	resp, err := c.do(ctx, "GET", "progress", nil)
	if err != nil {
		return Progress{}, err
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(resp.Body)
	for {
		var p Progress
		if err := dec.Decode(&p); err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return Progress{}, fmt.Errorf("cannot follow the start of VM %s: %w", c.name, err)
		}
		each(p)
		if p.Last() {
			return p, nil
		}
	}
}

// Down asks for the end of the VM, giving the guest grace to end by itself. It
// returns when the request is taken, not when the VM is down.
func (c *Client) Down(ctx context.Context, grace time.Duration) error {
	resp, err := c.do(ctx, "POST", "down?grace="+strconv.FormatInt(grace.Milliseconds(), 10), nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Start has a VM that is Restarting start without waiting any longer.
func (c *Client) Start(ctx context.Context) error {
	resp, err := c.do(ctx, "POST", "start", nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Rotate stages the secrets anew from their sources.
func (c *Client) Rotate(ctx context.Context) error {
	resp, err := c.do(ctx, "POST", "rotate", nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Declaration asks for the effective declaration that the VM goes by.
func (c *Client) Declaration(ctx context.Context) ([]config.Field, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	var fields []config.Field
	err := c.question(ctx, "GET", "declaration", &fields)
	return fields, err
}

// Reload reads the declaration anew and applies what can be applied to a running
// VM; on an error nothing is changed.
func (c *Client) Reload(ctx context.Context) (Reload, error) {
	var r Reload
	err := c.question(ctx, "POST", "reload", &r)
	return r, err
}

// Reach asks what the VM may reach now.
func (c *Client) Reach(ctx context.Context) (Reach, error) {
	var r Reach
	err := c.question(ctx, "GET", "reach/"+reachShow, &r)
	return r, err
}

// Allow lets the VM reach more for a time, 0 is until it is taken down, and returns
// what it may reach then. by is who asked, for the log.
func (c *Client) Allow(ctx context.Context, entries []string, keep time.Duration, by string) (Reach, error) {
	return c.changeReach(ctx, reachAllow, url.Values{"entry": entries, "for": {strconv.FormatInt(keep.Milliseconds(), 10)}, "by": {by}})
}

// Deny takes entries away from what the VM may reach, until it is taken down, and
// returns what is left.
func (c *Client) Deny(ctx context.Context, entries []string, by string) (Reach, error) {
	return c.changeReach(ctx, reachDeny, url.Values{"entry": entries, "by": {by}})
}

func (c *Client) changeReach(ctx context.Context, how string, v url.Values) (Reach, error) {
	var r Reach
	err := c.question(ctx, "POST", "reach/"+how+"?"+v.Encode(), &r)
	return r, err
}

// Pause stops the VM where it stands; changed is false for one that is paused
// already. [Client.Resume] lets it go on.
func (c *Client) Pause(ctx context.Context) (changed bool, err error) {
	return c.change(ctx, "pause")
}

// Resume lets a paused VM go on, with its clock set; changed is false for one that
// isn't paused.
func (c *Client) Resume(ctx context.Context) (changed bool, err error) {
	return c.change(ctx, "resume")
}

func (c *Client) change(ctx context.Context, what string) (bool, error) {
	var answer Changed
	err := c.question(ctx, "POST", what, &answer)
	return answer.Changed, err
}

// question reads the answer to a request as JSON.
func (c *Client) question(ctx context.Context, method, what string, answer any) error {
	resp, err := c.do(ctx, method, what, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(answer); err != nil {
		return fmt.Errorf("cannot read the answer of the supervisor of VM %s: %w", c.name, err)
	}
	return nil
}

// answerMax bounds an error's text.
const answerMax = 64 << 10

func (c *Client) do(ctx context.Context, method, what string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://supervisor/v1/"+what, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if method == http.MethodGet && hungUp(err) {
		// It changes nothing: who is there now answers, or nobody.
		resp, err = c.http.Do(req)
	}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, coded(ExitNotRunning, fmt.Errorf("VM %s: %w", c.name, ErrNotRunning))
	}
	if hungUp(err) {
		return nil, coded(ExitNotRunning, fmt.Errorf("VM %s: %w", c.name, ErrEnded))
	}
	if err != nil {
		return nil, fmt.Errorf("cannot ask the supervisor of VM %s: %w", c.name, err)
	}
	if resp.StatusCode >= 300 {
		text, err := io.ReadAll(io.LimitReader(resp.Body, answerMax))
		refusal := errors.New(string(bytes.TrimSpace(text)))
		if resp.StatusCode == http.StatusNotFound {
			refusal = fmt.Errorf("the supervisor of VM %s knows no %q: it is of an older clawvm; clawvm restart %s starts it with this one", c.name, what, c.name)
		} else if code, cerr := strconv.Atoi(resp.Header.Get(exitHeader)); cerr == nil {
			refusal = coded(code, refusal)
		}
		return nil, errors.Join(refusal, err, resp.Body.Close())
	}
	return resp, nil
}

// hungUp says whether err is that of a supervisor which took the connection, and
// ended before it answered.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}
