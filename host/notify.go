package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/clawvm/clawvm/config"
)

// How the service manager is kept from thinking that a supervisor hangs.
const (
	// attendEvery is how often it hears of us. systemd's shortest useful watchdog
	// is a multiple of it.
	attendEvery = 10 * time.Second
	// extension is how much longer a start or an end may take from each word on: a
	// supervisor that says nothing for so long does hang.
	extension = 30 * time.Second
	// endSlack is what an end takes beyond the rungs of its ladder: daemons, links,
	// rules, mounts.
	endSlack = 30 * time.Second
	// statusMax bounds the line that systemctl status shows.
	statusMax = 300
)

// attend tells the service manager, as long as that asked for it (sd_notify(3)),
// that a long start or end goes on, and feeds its watchdog. The caller calls stop
// when the supervisor has nothing more to do.
func (s *Supervisor) attend() (stop func()) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return func() {}
	}
	every := attendEvery
	if watchdog, err := daemon.SdWatchdogEnabled(false); err == nil && watchdog > 0 {
		every = min(every, watchdog/3)
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(every)
		defer tick.Stop()
		var state State
		var since time.Time // when it was first seen in this state
		for {
			st := s.Status()
			if st.State != state {
				state, since = st.State, time.Now()
			}
			overdue := st.State == Stopping && time.Since(since) > s.endLimit()
			word := pulse(st, overdue, func() error {
				err := s.alive(since)
				if err != nil {
					s.logf("the service manager's watchdog is not fed: %v", err)
				}
				return err
			})
			if word != "" {
				s.tellSystemd(word)
			}
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

// endLimit is how long the end of the VM may take.
func (s *Supervisor) endLimit() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(s.grace, defaultGrace) + powerButtonWait + vmmStopWait + gateStop + endSlack
}

// pulse is what the service manager hears of a supervisor that is well; nothing
// of one that isn't. A start and an end have limits of their own, step by step;
// a VM that its owner paused can answer nothing.
func pulse(st Status, overdue bool, alive func() error) string {
	fed := "WATCHDOG=1"
	switch {
	case st.State == Starting, st.State == Stopping && !overdue:
		return fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d\n%s", extension.Microseconds(), fed)
	case st.State == Stopping, st.State == Running && alive() != nil:
		return ""
	}
	return fed
}

// Of a VM that is up.
const (
	// silence is how long its agent may leave questions unanswered, which are put
	// every gate.AnswersEvery; emulated, it may be at work on its own for longer.
	silence         = time.Minute
	emulatedSilence = 10 * time.Minute
	// vmmAnswer bounds the VMM's answer.
	vmmAnswer = 5 * time.Second
)

// hear takes note that the guest's agent answered.
func (s *Supervisor) hear(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = at
}

// alive says why a VM that is up since then can't be told from one that hangs.
func (s *Supervisor) alive(since time.Time) error {
	s.mu.Lock()
	l, heard, lost := s.life, s.heard, s.status.Lost
	s.mu.Unlock()
	if l == nil || l.instance == nil {
		return nil // between two lives
	}
	if lost != "" {
		return fmt.Errorf("the guest's agent is lost: %s", lost)
	}
	limit := silence
	if l.emulated {
		limit = emulatedSilence
	}
	if heard.Before(since) {
		heard = since
	}
	if quiet := time.Since(heard); quiet > limit {
		return fmt.Errorf("the guest's agent has not answered for %s", quiet.Round(time.Second))
	}
	ctx, cancel := context.WithTimeout(context.Background(), vmmAnswer)
	defer cancel()
	return l.instance.Alive(ctx)
}

// statusText is the line that systemctl status shows.
func statusText(st Status) string {
	text := string(st.State)
	if st.Step != "" {
		text += ": " + st.Step
	}
	if st.State == Running || st.State == Paused {
		text += fmt.Sprintf(" at %s (%s)", st.Address, st.VMM)
	}
	if st.Lost != "" {
		text += "; the guest's agent does not answer: " + st.Lost
	}
	return oneLine(text)
}

// oneLine makes text fit a line of the service manager's protocol, where a line
// break would begin another message: a guest has a say in some of it.
func oneLine(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
	if len(text) > statusMax {
		text = strings.ToValidUTF8(text[:statusMax], "") + "…"
	}
	return text
}

// decided says whether an end of the supervision is what the declaration's restart
// policy makes of it, and not a start that failed, which may be tried again.
func (s *Supervisor) decided(kind EndKind) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch kind {
	case EndWorkload, EndOutOfMemory, EndUnhealthy: // in the guest, by the same policy
		return true
	}
	return s.lived || s.policy == config.RestartNo
}

// UnitExit tells the service manager, where there is one, how [Supervise] ended,
// and returns the exit code that keeps the manager's own restarts to what the
// supervisor did not decide.
func UnitExit(err error) int {
	code := ExitCode(err)
	if err == nil || os.Getenv("NOTIFY_SOCKET") == "" {
		return code
	}
	// Without a manager that listens the words are lost, and the log has them.
	_, _ = daemon.SdNotify(false, "STATUS="+oneLine(err.Error()))
	var logged *LoggedError
	if errors.As(err, &logged) && logged.Decided && code != ExitDeclaration {
		return ExitForGood
	}
	return code
}

// SupervisorOutput is where the supervisor of VM name writes what it does: to
// stderr, and, where that leads to the journal, to the log file too, which is the
// record.
func SupervisorOutput(l Layout, name string, stderr *os.File) (io.Writer, error) {
	if !leadsToJournal(stderr) {
		return stderr, nil
	}
	path := l.VM(name).SupervisorLog()
	file, err := openLog(path)
	if err != nil {
		return nil, fmt.Errorf("cannot log what the supervisor of VM %s does: %w", name, err)
	}
	return io.MultiWriter(&boundedLog{out: file, path: path}, journalWriter{stderr}), nil
}

// leadsToJournal says whether the journal reads what is written to f
// (systemd.exec(5), JOURNAL_STREAM).
func leadsToJournal(f *os.File) bool {
	var st syscall.Stat_t
	return syscall.Fstat(int(f.Fd()), &st) == nil && os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// journalWriter leaves the time of a log line away, since the journal has its own.
type journalWriter struct{ w io.Writer }

// logTime is as long as the time that package log puts before a line.
const logTime = len("2006/01/02 15:04:05 ")

func (j journalWriter) Write(line []byte) (int, error) {
	text := line
	if len(line) > logTime && bytes.Count(line[:logTime], []byte("/")) == 2 && line[logTime-1] == ' ' {
		text = line[logTime:]
	}
	if _, err := j.w.Write(text); err != nil {
		return 0, err
	}
	return len(line), nil
}
