package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/clawvm/clawvm/guest/agent"
)

// agentLink is the connection to the guest's agent, once there is one.
type agentLink struct {
	mu     sync.Mutex
	client *agent.Client
	paused bool // the VM stands still
}

func (a *agentLink) set(c *agent.Client) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.client = c
}

func (a *agentLink) pause(paused bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.paused = paused
}

func (a *agentLink) isPaused() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.paused
}

// get returns nil as long as the guest has not connected.
func (a *agentLink) get() *agent.Client {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.client
}

// serveAgent connects to the guest's agent and tells the supervisor what it says.
// A guest whose agent goes silent lives on: the supervisor is told, and decides.
func (g *gate) serveAgent(ctx context.Context) error {
	stream, err := g.agentStream(ctx)
	if err != nil {
		return err
	}
	// On a serial port both ends must find each other first; a socket's
	// connection is the agent's from its first byte.
	client, err := agent.Connect(ctx, stream, !g.AgentListens)
	if err != nil {
		return g.lost(ctx, err)
	}
	defer client.Close()
	g.agent.set(client)
	if err := g.supervisor.Send(Message{Kind: Connected}); err != nil {
		return err
	}
	if !g.InstructionClock {
		if err := client.SetClock(ctx, time.Now()); err != nil {
			return g.lost(ctx, err)
		}
	}
	go g.heartbeat(ctx, client)
	logged := make(chan error, 1)
	go func() { logged <- g.workloadLog(ctx, client) }()
	err = g.relayEvents(ctx, client)
	client.Close() // so that the log ends too
	return errors.Join(err, <-logged)
}

// AnswersEvery is how often the guest's agent is asked whether it is there.
const AnswersEvery = 20 * time.Second

// heartbeat asks the guest's agent whether it is there, and tells the supervisor
// when it is. An agent that is not is nobody's error here: silence tells it, and
// one that is late may still come.
func (g *gate) heartbeat(ctx context.Context, client *agent.Client) {
	tick := time.NewTicker(AnswersEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-client.Done():
			return
		case <-tick.C:
		}
		if client.Ping(ctx) != nil {
			continue
		}
		if err := g.supervisor.Send(Message{Kind: Answers}); err != nil {
			return // the supervisor is gone, and obey ends the gate
		}
	}
}

// lost tells the supervisor that the agent can't be reached, and waits for the
// end: resolver and ports go on without an agent.
func (g *gate) lost(ctx context.Context, why error) error {
	if ctx.Err() != nil {
		return nil
	}
	if err := g.supervisor.Send(Message{Kind: Lost, Detail: why.Error()}); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// agentStream returns the guest's byte stream: what was handed over, or the first
// connection that arrives there. (A guest makes no second one: its reboot is a
// new gate's.)
func (g *gate) agentStream(ctx context.Context) (io.ReadWriteCloser, error) {
	if !g.AgentListens {
		c, err := net.FileConn(g.files[FileAgent])
		// The copy is what is used, and whose end hangs up.
		if err := errors.Join(err, g.files[FileAgent].Close()); err != nil {
			return nil, fmt.Errorf("cannot use the agent's descriptor: %w", err)
		}
		return c, nil
	}
	l, err := g.listener(FileAgent)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	return l.Accept()
}

// relayEvents translates what the agent says into the supervisor's few words,
// until the connection ends.
func (g *gate) relayEvents(ctx context.Context, client *agent.Client) error {
	events, failure, err := client.Events(ctx)
	if err != nil {
		return g.lost(ctx, err)
	}
	for e := range events {
		m, ok := translate(e)
		if !ok {
			continue
		}
		if err := g.supervisor.Send(m); err != nil {
			return err
		}
	}
	why := failure()
	if why == nil {
		why = errors.New("its connection ended")
	}
	return g.lost(ctx, why)
}

// translate says an agent's event in the words of the supervisor's protocol.
func translate(e agent.Event) (Message, bool) {
	switch e.Kind {
	case agent.WorkloadStarted:
		if e.Restarts > 0 {
			return Message{Kind: Progress, Detail: fmt.Sprintf("the workload is started again (restart %d)", e.Restarts)}, true
		}
		return Message{Kind: Progress, Detail: "the workload is started"}, true
	case agent.Ready:
		return Message{Kind: Ready}, true
	case agent.NotReady:
		return Message{Kind: Progress, Detail: "the workload is not ready yet: " + e.Detail}, true
	case agent.HealthChecked:
		return Message{Kind: Checked, Failures: e.Failures, Unhealthy: e.Unhealthy, Detail: e.Detail}, true
	case agent.WorkloadExited:
		how := fmt.Sprintf("exit code %d", e.Code)
		if e.Signal != 0 {
			how = fmt.Sprintf("signal %d", e.Signal)
		}
		if e.Detail != "" {
			how += ": " + e.Detail
		}
		if !e.Final {
			how += fmt.Sprintf("; started again in %.0f s", e.Next)
		}
		return Message{Kind: WorkloadEnded, Code: e.Code, Again: !e.Final, Cause: e.Cause, Detail: how}, true
	case agent.Ending:
		return Message{Kind: Ending, Code: e.Code, Detail: endings[e.Reason]}, true
	}
	return Message{}, false
}

// endings are the agent's reasons in the supervisor's words.
var endings = map[string]string{
	agent.ReasonPowerOff: EndPowerOff,
	agent.ReasonReboot:   EndReboot,
	agent.ReasonExit:     EndWorkload,
	agent.ReasonFailed:   EndFailed,
}

// workloadLog writes what the workload prints to its log.
func (g *gate) workloadLog(ctx context.Context, client *agent.Client) error {
	r, err := client.Logs(ctx)
	if err != nil {
		return nil // relayEvents tells of a connection that is gone
	}
	defer r.Close()
	log := g.rotating("workload.log")
	lines := newStamper(lossy{log})
	for {
		piece, err := r.Next()
		if err != nil { // the connection's end, which is relayEvents' to tell
			lines.flush()
			return log.Close()
		}
		switch {
		case piece.Lost > 0:
			lines.flush()
			lines.add(Stdout, fmt.Appendf(nil, "[%d bytes are missing here]\n", piece.Lost))
		case piece.Stream == agent.Stderr:
			lines.add(Stderr, piece.Data)
		default:
			lines.add(Stdout, piece.Data)
		}
	}
}

// serveExec lets the command line reach the guest.
func (g *gate) serveExec(ctx context.Context) error {
	l, err := g.listener(FileExec)
	if err != nil {
		return err
	}
	srv := &http.Server{
		ReadHeaderTimeout: execHeaderTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if g.agent.isPaused() {
				http.Error(w, fmt.Sprintf("VM %s is paused; clawvm resume %s lets it go on", g.VM, g.VM), http.StatusConflict)
				return
			}
			client := g.agent.get()
			if client == nil {
				http.Error(w, "the guest's agent is not there yet", http.StatusServiceUnavailable)
				return
			}
			client.Proxy().ServeHTTP(w, r)
		}),
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// execHeaderTimeout bounds a local client that says nothing.
const execHeaderTimeout = 5 * time.Second

// obey does what the supervisor says, until it hangs up.
func (g *gate) obey(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { g.supervisor.Close() })
	defer stop()
	for {
		m, file, err := g.supervisor.ReceiveFile()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch m.Kind {
		case Shutdown:
			g.shutDown(ctx, time.Duration(m.Grace)*time.Millisecond)
		case Publish:
			err = g.publisher.publish(ctx, *m.Port, file)
			file = nil
		case Unpublish:
			g.publisher.unpublish(m.Port.Host)
		case Resolve:
			var how Naming
			if how, err = readNaming(file); err == nil {
				g.naming.set(how)
			}
		case Paused:
			g.agent.pause(true)
		case Resumed:
			g.agent.pause(false)
			go g.setClock(ctx)
		}
		if file != nil {
			err = errors.Join(err, file.Close())
		}
		if err != nil {
			return err
		}
	}
}

// shutDown asks the guest to end. Without an agent the supervisor goes on to the power button.
func (g *gate) shutDown(ctx context.Context, grace time.Duration) {
	client := g.agent.get()
	if client == nil {
		return
	}
	go func() {
		if err := client.Shutdown(ctx, grace); err != nil && ctx.Err() == nil {
			// That the supervisor is gone is obey's to see.
			_ = g.supervisor.Send(Message{Kind: Lost, Detail: "asked to end: " + err.Error()})
		}
	}()
}

// setClock sets the guest's clock after a pause, which is missing from it, and
// tells the supervisor how that went. A clock that counts instructions is left alone.
func (g *gate) setClock(ctx context.Context) {
	done := Message{Kind: ClockSet}
	if client := g.agent.get(); client == nil {
		done.Detail = "the guest's agent is not there"
	} else if !g.InstructionClock {
		if err := client.SetClock(ctx, time.Now()); err != nil {
			done.Detail = err.Error()
		}
	}
	// That the supervisor is gone is obey's to see.
	_ = g.supervisor.Send(done)
}
