package agent

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// Command is a program that a Runner prepared.
type Command struct {
	*exec.Cmd
	Files    []*os.File // to close when it is started, or isn't to be
	UID, GID int        // who the terminal, if there is one, belongs to
}

// Runner runs the programs that a host asks for.
type Runner interface {
	// Command prepares a program: all but its standard streams, session and terminal.
	Command(ExecRequest) (*Command, error)
	// Start starts and Wait awaits it, as (*exec.Cmd).Start and Wait do, and so that nobody else takes its exit status.
	Start(*exec.Cmd) error
	Wait(*exec.Cmd) error
}

// Server is the guest's end.
type Server struct {
	Hello    Hello // Protocol is set by the server
	Board    *Board
	Log      *Log
	Runner   Runner                    // nil: nothing can be run yet
	Clock    func(time.Time) error     // sets the guest's clock
	Shutdown func(grace time.Duration) // asks the guest to end and returns at once; 0: the declared grace

	mu      sync.Mutex
	running int // exec sessions
}

// SetRunner makes exec possible. What is run before is refused.
func (s *Server) SetRunner(r Runner) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.Runner = r
}

func (s *Server) runner() Runner {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Runner
}

// headerTime is how long a request's header may take. The guest's clock may run slower than the host's, never faster.
const headerTime = 30 * time.Second

// Handler returns the endpoints, for a Server's own streams or for a test.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathHello, func(w http.ResponseWriter, _ *http.Request) {
		h := s.Hello
		h.Protocol = ProtocolVersion
		w.Header().Set("Content-Type", "application/json")
		if json.NewEncoder(w).Encode(h) != nil {
			return // the connection has ended
		}
	})
	mux.HandleFunc("GET "+pathPing, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("GET "+pathEvents, s.events)
	mux.HandleFunc("GET "+pathLog, s.log)
	mux.HandleFunc("POST "+pathExec, s.exec)
	mux.HandleFunc("POST "+pathClock, s.clock)
	mux.HandleFunc("POST "+pathShutdown, s.shutdown)
	return mux
}

// ServeConn serves one connection of a host until it ends and closes it. With resync it waits for the handshake first.
func (s *Server) ServeConn(ctx context.Context, conn io.ReadWriteCloser, resync bool) error {
	stop := context.AfterFunc(ctx, func() { closeQuietly(conn) })
	defer stop()
	if resync {
		r := bufio.NewReaderSize(conn, maxWrite)
		if err := syncGuest(r, conn); err != nil {
			closeQuietly(conn)
			return err
		}
		conn = buffered{r, conn}
	}
	session, err := yamux.Server(conn, muxConfig())
	if err != nil {
		closeQuietly(conn)
		return err
	}
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: headerTime,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.New(io.Discard, "", 0), // a broken stream is the host's business
	}
	err = srv.Serve(streams{session})
	return errors.Join(err, srv.Close(), session.Close())
}

// buffered reads what is left in a buffer first.
type buffered struct {
	*bufio.Reader
	conn io.ReadWriteCloser
}

func (b buffered) Write(p []byte) (int, error) { return b.conn.Write(p) }
func (b buffered) Close() error                { return b.conn.Close() }

// reopenAfter is the pause between two attempts to reach the host: a port without a host ends at once, again and again.
const reopenAfter = 100 * time.Millisecond

// Run keeps a connection to the host until the context ends: it opens one, serves it, and opens the next. The first failure to
// open, and each another one, is told to warn.
func (s *Server) Run(ctx context.Context, open func(context.Context) (io.ReadWriteCloser, error), resync bool, warn func(error)) {
	last := ""
	for ctx.Err() == nil {
		conn, err := open(ctx)
		if err == nil {
			last = ""
			err = s.ServeConn(ctx, conn, resync)
			if errors.Is(err, io.EOF) {
				err = nil // the host closed, or isn't there yet
			}
		} else {
			err = fmt.Errorf("cannot reach the host: %w", err)
		}
		if err != nil && err.Error() != last && ctx.Err() == nil {
			last = err.Error()
			warn(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(reopenAfter):
		}
	}
}

func (s *Server) events(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	if rc.Flush() != nil {
		return
	}
	enc := json.NewEncoder(w)
	for seq := -1; ; {
		events, next, err := s.Board.after(r.Context(), seq)
		if err != nil {
			return
		}
		for _, e := range events {
			if enc.Encode(e) != nil {
				return
			}
		}
		if rc.Flush() != nil {
			return
		}
		seq = next
		s.Board.sent(seq)
	}
}

func (s *Server) log(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/octet-stream")
	if rc.Flush() != nil {
		return
	}
	reader := s.Log.follow()
	defer reader.stop()
	out := &frameWriter{w: w}
	for {
		stream, data, lost, err := reader.take(r.Context())
		if err != nil {
			return
		}
		if lost > 0 {
			err = out.write(frameLost, binary.BigEndian.AppendUint64(nil, lost))
		} else {
			err = out.write(frameKind(stream), data)
		}
		if err != nil || rc.Flush() != nil {
			return
		}
	}
}

// decode reads a request's JSON body of at most limit bytes, or answers the request.
func decode(w http.ResponseWriter, r *http.Request, limit int64, into any) bool {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		http.Error(w, "cannot read the request: "+err.Error(), http.StatusBadRequest)
		return false
	}
	if _, err := dec.Token(); err != io.EOF {
		http.Error(w, "cannot read the request: something follows it", http.StatusBadRequest)
		return false
	}
	return true
}

func (s *Server) clock(w http.ResponseWriter, r *http.Request) {
	var req clockRequest
	if !decode(w, r, maxAnswer, &req) {
		return
	}
	if err := s.Clock(req.Time); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) shutdown(w http.ResponseWriter, r *http.Request) {
	var req shutdownRequest
	if !decode(w, r, maxAnswer, &req) {
		return
	}
	if req.Grace < 0 || req.Grace > 24*60*60 {
		http.Error(w, "grace must be between 0 and 86400 seconds", http.StatusBadRequest)
		return
	}
	s.Shutdown(time.Duration(req.Grace * float64(time.Second)))
	w.WriteHeader(http.StatusAccepted)
}
