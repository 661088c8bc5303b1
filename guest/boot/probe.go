package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/clawvm/clawvm/guest"
)

// Limits of one look: a busy program answers late, an emulated one later. A command takes longer, for it has to start.
const (
	lookTime    = 5 * time.Second
	commandTime = 30 * time.Second
)

// answerMax is how much of an answer is read, and told when it is the wrong one.
const answerMax = 256

// newProbe returns the look of a declaration, or nil when there is none to take. A workload may listen on the guest's address, on
// its loopback or on both; addresses are asked in their order. run runs a command as the workload is run.
func newProbe(r guest.Ready, addresses []netip.Addr, run func(context.Context, []string) error) func(context.Context) error {
	return newLook(r, addresses, run, lookTime, commandTime)
}

// newHealthLook returns the look of a health check. Loopback is asked first: programs tell more there.
func newHealthLook(h *guest.Health, addresses []netip.Addr, run func(context.Context, []string) error) func(context.Context) error {
	limit := time.Duration(h.Timeout) * time.Second
	ordered := slices.Clone(addresses)
	slices.SortStableFunc(ordered, func(a, b netip.Addr) int {
		switch {
		case a.IsLoopback() == b.IsLoopback():
			return 0
		case a.IsLoopback():
			return -1
		}
		return 1
	})
	return newLook(h.Check, ordered, run, limit, limit)
}

func newLook(r guest.Ready, addresses []netip.Addr, run func(context.Context, []string) error, look, command time.Duration) func(context.Context) error {
	switch {
	case r.TCP != 0:
		return func(ctx context.Context) error { return anyAddress(ctx, addresses, r.TCP, look, lookTCP) }
	case r.HTTP != nil:
		client := newHTTPLook()
		return func(ctx context.Context) error {
			return anyAddress(ctx, addresses, r.HTTP.Port, look, func(ctx context.Context, address string) error {
				return lookHTTP(ctx, client, address, r.HTTP)
			})
		}
	case len(r.Exec) > 0:
		return func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, command)
			defer cancel()
			if err := run(ctx, r.Exec); err != nil {
				return fmt.Errorf("%s: %w", r.Exec[0], err)
			}
			return nil
		}
	}
	return nil
}

func anyAddress(ctx context.Context, addresses []netip.Addr, port int, limit time.Duration, look func(context.Context, string) error) (err error) {
	for _, a := range addresses {
		oneCtx, cancel := context.WithTimeout(ctx, limit)
		oneErr := look(oneCtx, net.JoinHostPort(a.String(), strconv.Itoa(port)))
		cancel()
		if oneErr == nil {
			return nil
		}
		err = errors.Join(err, oneErr)
	}
	return err
}

func lookTCP(ctx context.Context, address string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

func newHTTPLook() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func lookHTTP(ctx context.Context, client *http.Client, address string, h *guest.HTTPReady) error {
	want := h.Status
	if want == 0 {
		want = http.StatusOK
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+h.Path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	said, readErr := io.ReadAll(io.LimitReader(resp.Body, answerMax))
	if err := errors.Join(readErr, resp.Body.Close()); err != nil && resp.StatusCode != want {
		return err
	}
	if resp.StatusCode != want {
		err := fmt.Errorf("http://%s%s answered %d instead of %d", address, h.Path, resp.StatusCode, want)
		if text := strings.TrimSpace(string(said)); text != "" {
			err = fmt.Errorf("%w: %s", err, text)
		}
		return err
	}
	return nil
}
