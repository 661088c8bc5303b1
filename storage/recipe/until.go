package recipe

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"syscall"
	"time"
)

const (
	pollInterval = 250 * time.Millisecond
	// stopLimit is how long a service may take to end by SIGTERM.
	stopLimit = 60 * time.Second
	// errorBody bounds what is read of an answer.
	errorBody = 64 << 10
)

// wait waits until the service that cmd is answers, and stops it. A service
// that ends by itself or doesn't answer in time is an error.
func (u *Until) wait(cmd *exec.Cmd) error {
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	deadline := time.After(u.Timeout)
	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	for last := error(nil); ; {
		select {
		case err := <-ended:
			return fmt.Errorf("ended before it answered: %w", notNil(err))
		case <-deadline:
			return errors.Join(fmt.Errorf("did not answer within %s: %w", u.Timeout, notNil(last)), cmd.Process.Kill(), <-ended)
		case <-poll.C:
		}
		if last = u.ask(); last == nil {
			return stop(cmd, ended)
		}
	}
}

func notNil(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}

// ask returns nil for status 200.
func (u *Until) ask() error {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get("http://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(u.Port)) + u.Path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(response.Body, errorBody)); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// stop asks the service to end; one that ends by the signal did as it was told.
func stop(cmd *exec.Cmd, ended <-chan error) error {
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("cannot stop it: %w", err)
	}
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			status, ok := exit.Sys().(syscall.WaitStatus)
			if ok && (status.Signaled() && status.Signal() == syscall.SIGTERM || status.ExitStatus() == 128+int(syscall.SIGTERM)) {
				return nil
			}
		}
		return err
	case <-time.After(stopLimit):
		return errors.Join(fmt.Errorf("did not end within %s of SIGTERM", stopLimit), cmd.Process.Kill(), <-ended)
	}
}
