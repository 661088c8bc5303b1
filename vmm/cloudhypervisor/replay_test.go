package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/clawvm/clawvm/vmm"
)

// replay serves a recording and gives a client to it.
func replay(t *testing.T, d *double) *client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "api")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	played := make(chan error, 1)
	go func() {
		err := d.play(l, discard{})
		l.Close()
		played <- err
	}()
	t.Cleanup(func() {
		l.Close()
		if err := <-played; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return newClient(path)
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// again makes the request that was recorded, through the client.
func again(t *testing.T, c *client, x exchange) error {
	t.Helper()
	if x.Body == nil {
		return c.do(t.Context(), callLimit, x.Method, x.Call, nil, nil)
	}
	return c.do(t.Context(), callLimit, x.Method, x.Call, x.Body, nil)
}

func TestClientReadsWhatWasRecorded(t *testing.T) {
	ok := &APIError{}
	refusal := func(status int, call string, chain ...string) *APIError { return &APIError{call, status, chain} }
	notBoot := []string{"Error from API", "The VM could not boot"}
	for name, want := range map[string][]*APIError{
		"poweroff": {ok, ok, ok, ok},
		"stop":     {ok, ok, ok, ok, ok, ok},
		"pause": {
			ok, ok, ok, ok, ok, ok,
			refusal(500, "vm.pause", "Error from API", "The VM could not be paused", "Cannot pause VM", "Failed to pause migratable component", "Invalid transition: InvalidStateTransition(Paused, Paused)"),
			ok, ok,
			refusal(500, "vm.resume", "Error from API", "The VM could not resume", "Cannot resume VM", "Failed to resume migratable component", "Invalid transition: InvalidStateTransition(Running, Running)"),
			ok, ok,
		},
		"full":          {ok, ok, ok},
		"no-kernel":     {ok, ok, refusal(500, "vm.boot", append(notBoot[:2:2], "Cannot open kernel file", "No such file or directory (os error 2)")...)},
		"no-disk":       {ok, ok, refusal(500, "vm.boot", append(notBoot[:2:2], "Error from device manager", "Cannot open disk path", "I/O error (path=/no/disk op=open)", "No such file or directory (os error 2)")...)},
		"bad-tap":       {ok, ok, refusal(500, "vm.boot", append(notBoot[:2:2], "Error from device manager", "Cannot create virtio-net device", "Failed to open taps", "Open tap device failed", "Unable to configure tap interface", "Invalid argument (os error 22)")...)},
		"bad-type":      {refusal(400, "vm.create", "Failed to deserialize JSON", `invalid type: string "two", expected struct CpusConfig at line 1 column 13`)},
		"no-json":       {refusal(400, "vm.create", "Failed to deserialize JSON", "invalid type: integer `1`, expected struct CpusConfig at line 1 column 2")},
		"no-body":       {refusal(400, "vm.create")},
		"body-on-boot":  {ok, refusal(400, "vm.boot", "Bad Request")},
		"boot-twice":    {ok, ok, ok, refusal(500, "vm.boot", append(notBoot[:2:2], "VM is already created")...)},
		"create-twice":  {ok, refusal(500, "vm.create", "Error from API", "The VM could not be created", "VM is already created")},
		"unknown-route": {refusal(404, "vm.reticulate", "Not Found")},
		"wrong-method":  {refusal(400, "vm.boot", "Bad Request")},
		"before-create": {
			refusal(404, "vm.boot", append(notBoot[:2:2], "VM config is missing")...),
			refusal(404, "vm.info", "Error from API", "The VM info is not available", "VM is not created"),
			refusal(500, "vm.power-button", "Error from API", "Error triggering power button", "VM is not running"),
		},
		"too-long": {refusal(400, "vm.create", "{ \"error\": \"Request payload with size 51669 is larger than the limit of 51200 allowed by server.\nAll previous unanswered requests will be dropped.\" }")},
		"longest":  {refusal(400, "vm.create", "Failed to deserialize JSON", "invalid type: integer `1`, expected struct CpusConfig at line 1 column 51199")},
	} {
		t.Run(name, func(t *testing.T) {
			r := loadRecording(t, name)
			if len(r.Exchanges) != len(want) {
				t.Fatalf("%d exchanges were recorded; the test knows %d", len(r.Exchanges), len(want))
			}
			c := replay(t, &double{Recording: r})
			for n, x := range r.Exchanges {
				err := again(t, c, x)
				if want[n] == ok {
					if err != nil {
						t.Errorf("%s: %v", x.Call, err)
					}
					continue
				}
				if got := new(APIError); !errors.As(err, &got) || fmt.Sprintf("%+v", *got) != fmt.Sprintf("%+v", *want[n]) {
					t.Errorf("%s: got\n%#v\nwant\n%#v", x.Call, err, want[n])
				}
			}
		})
	}
}

func TestClientAnswers(t *testing.T) {
	c := replay(t, &double{Recording: loadRecording(t, "full")})
	if p, err := c.ping(t.Context()); err != nil || p.Version != "53.0.0" {
		t.Errorf("ping: %+v, %v", p, err)
	}
	if err := again(t, c, loadRecording(t, "full").Exchanges[1]); err != nil {
		t.Error(err)
	}
	if i, err := c.info(t.Context()); err != nil || i.State != "Created" {
		t.Errorf("info: %+v, %v", i, err)
	}
}

func TestClientSendsNothingThatIsTooLong(t *testing.T) {
	c := newClient("/no/socket")
	err := c.create(t.Context(), &vmConfig{Payload: payloadConfig{Cmdline: strings.Repeat("x", maxRequest)}})
	if err == nil || !strings.Contains(err.Error(), "takes 51200") {
		t.Error(err)
	}
}

func TestClientWithoutAnAnswer(t *testing.T) {
	r := loadRecording(t, "unknown-route")
	r.Exchanges[0].Call, r.Exchanges[0].Method = "vmm.ping", http.MethodGet
	t.Run("torn", func(t *testing.T) {
		_, err := replay(t, &double{Recording: r, Cut: "vmm.ping"}).ping(t.Context())
		if err == nil || refused(err) || !strings.Contains(err.Error(), "did not answer vmm.ping") {
			t.Error(err)
		}
	})
	t.Run("slow", func(t *testing.T) {
		c := replay(t, &double{Recording: r, Hang: "vmm.ping"})
		err := c.do(t.Context(), 50*time.Millisecond, http.MethodGet, "vmm.ping", nil, nil)
		if err == nil || !strings.Contains(err.Error(), "did not answer vmm.ping: no answer in 50ms") {
			t.Error(err)
		}
	})
	t.Run("nobody", func(t *testing.T) {
		_, err := newClient(filepath.Join(t.TempDir(), "none")).ping(t.Context())
		if err == nil || !strings.Contains(err.Error(), "no such file") || strings.Contains(err.Error(), "localhost") {
			t.Error(err)
		}
	})
}

func TestErrorChain(t *testing.T) {
	for body, want := range map[string][]string{
		`["a","b"]`:                    {"a", "b"},
		"Error from API: no":           {"Error from API: no"}, // before v47
		`{ "error": "Too many open" }`: {"Too many open"},
		"":                             nil,
		"  \n":                         nil,
	} {
		if got := errorChain([]byte(body)); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%q: %q", body, got)
		}
	}
}

// startDouble starts a machine under a double.
func startDouble(t *testing.T, d *double) (vmm.Instance, error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a VMM is started as another user, which takes root")
	}
	dir, err := os.MkdirTemp("", "ch")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		left, err := os.ReadDir(dir)
		if err != nil || len(left) > 0 {
			t.Errorf("left in the machine's directory: %v, %v", left, err)
		}
		os.RemoveAll(dir)
	})
	v := New(d.install(t))
	m := recordedMachine(dir, "/opt/inside")
	if m.Agent, err = v.OpenChannel(m); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Agent.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	i, err := v.Start(ctx, m)
	if err == nil {
		t.Cleanup(func() {
			if err := errors.Join(i.Kill(), waited(i), i.Close()); err != nil {
				t.Error(err)
			}
		})
	}
	return i, err
}

func waited(i vmm.Instance) error {
	i.Wait()
	return nil
}

func TestInstanceLives(t *testing.T) {
	for _, c := range []struct {
		name  string
		d     double
		do    func(vmm.Instance) error
		want  vmm.Exit
		kinds []vmm.EventKind
	}{
		{name: "poweroff", want: vmm.Exit{Reason: vmm.ExitPoweredOff, Detail: "the guest turned itself off"}, kinds: []vmm.EventKind{vmm.Booted, vmm.PoweredOff}},
		{name: "poweroff", d: double{Tear: true}, want: vmm.Exit{Reason: vmm.ExitPoweredOff, Detail: "the guest turned itself off"}, kinds: []vmm.EventKind{vmm.Booted, vmm.PoweredOff}},
		{name: "reboot", want: vmm.Exit{Reason: vmm.ExitRebooted, Detail: "the guest asked for a reset"}, kinds: []vmm.EventKind{vmm.Booted, vmm.Rebooting}},
		{name: "panic", want: vmm.Exit{Reason: vmm.ExitPanicked, Detail: "the guest's kernel panicked (panic)"}, kinds: []vmm.EventKind{vmm.Booted, vmm.Panicked, vmm.Rebooting}},
		{name: "poweroff", d: double{Babble: true}, want: vmm.Exit{Reason: vmm.ExitFailed}},
	} {
		t.Run(fmt.Sprintf("%s tear=%v babble=%v", c.name, c.d.Tear, c.d.Babble), func(t *testing.T) {
			c.d.Recording = loadRecording(t, c.name)
			i, err := startDouble(t, &c.d)
			if c.d.Babble {
				if err == nil {
					t.Fatal("it starts")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := i.Wait(); got != c.want {
				t.Errorf("got %+v; want %+v", got, c.want)
			}
			var kinds []vmm.EventKind
			for e := range i.Events() {
				kinds = append(kinds, e.Kind)
			}
			if fmt.Sprint(kinds) != fmt.Sprint(c.kinds) {
				t.Errorf("events %v; want %v", kinds, c.kinds)
			}
		})
	}
}

func TestInstanceStops(t *testing.T) {
	r := loadRecording(t, "stop")
	// The instance asks no vm.info.
	r.Exchanges[2].Events += r.Exchanges[3].Events
	r.Exchanges = append(r.Exchanges[:3:3], r.Exchanges[4:]...)
	i, err := startDouble(t, &double{Recording: r})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(i.PowerButton(t.Context()), i.Stop(t.Context())); err != nil {
		t.Error(err)
	}
	if got := i.Wait(); got.Reason != vmm.ExitKilled || got.Code != 0 || got.Signal != 0 {
		t.Errorf("got %+v", got)
	}
	if err := i.Stop(t.Context()); err != nil {
		t.Errorf("stopping it again: %v", err)
	}
}

// The exchanges of the recording "pause".
const (
	pauseTaken    = 4
	infoPaused    = 5
	pauseRefused  = 6
	resumeTaken   = 7
	infoRunning   = 8
	shutdownTaken = 11
)

func TestInstancePauses(t *testing.T) {
	for _, c := range []struct {
		name          string
		pause, resume []int  // the exchanges that these make
		resumed       string // the error's words
	}{
		{"in order", []int{pauseTaken}, []int{infoPaused, resumeTaken}, ""},
		{"refused", []int{pauseRefused}, []int{infoRunning}, ""},
		{"refused to resume", []int{pauseTaken}, []int{infoPaused, 9}, "cannot resume recorded: cloud-hypervisor refused vm.resume"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := loadRecording(t, "pause")
			all := r.Exchanges
			r.Exchanges = append([]exchange(nil), all[:3]...)
			for _, n := range append(append(c.pause, c.resume...), pauseTaken, shutdownTaken) {
				r.Exchanges = append(r.Exchanges, all[n])
			}
			i, err := startDouble(t, &double{Recording: r})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(i.Pause(t.Context()), i.Pause(t.Context())); err != nil {
				t.Error(err)
			}
			if state := processState(t, i.PID()); state != "T" {
				t.Errorf("the process is in state %s, not stopped", state)
			}
			err = i.Resume(t.Context())
			if c.resumed == "" && err != nil || c.resumed != "" && (err == nil || !strings.Contains(err.Error(), c.resumed)) {
				t.Errorf("got %v; want %q", err, c.resumed)
			}
			if err := i.Resume(t.Context()); err != nil {
				t.Errorf("resuming what isn't paused: %v", err)
			}
			if err := errors.Join(i.Pause(t.Context()), i.Stop(t.Context())); err != nil {
				t.Error(err)
			}
			if got := i.Wait(); got.Reason != vmm.ExitKilled || got.Code != 0 {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestInstanceIsKilled(t *testing.T) {
	r := loadRecording(t, "no-kernel")
	r.Exchanges[2].Reply = r.Exchanges[1].Reply
	i, err := startDouble(t, &double{Recording: r})
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Kill(); err != nil {
		t.Error(err)
	}
	if got := i.Wait(); got.Reason != vmm.ExitKilled || got.Code != -1 || got.Signal != syscall.SIGKILL {
		t.Errorf("got %+v", got)
	}
}

func TestStartFails(t *testing.T) {
	for _, c := range []struct {
		name, recording string
		d               double
		want            []string
	}{
		{"refused", "no-kernel", double{}, []string{"cannot start cloud-hypervisor: cloud-hypervisor refused vm.boot: Error from API: The VM could not boot: Cannot open kernel file: No such file"}},
		{"the process ends without an answer", "too-much-memory", double{}, []string{"did not answer vm.boot", "it said: memory allocation of 34359640064 bytes failed"}},
		{"the process ends at create", "too-much-memory", double{Die: "vm.create"}, []string{"did not answer vm.create"}},
		{"a torn answer", "poweroff", double{Cut: "vm.boot"}, []string{"did not answer vm.boot"}},
		{"another program", "unknown-route", double{}, []string{"vmm.ping", "the double"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.d.Recording = loadRecording(t, c.recording)
			_, err := startDouble(t, &c.d)
			if err == nil {
				t.Fatal("it starts")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v\ndoes not say\n%s", err, want)
				}
			}
		})
	}
}

func TestStartRefusesAnOldVersion(t *testing.T) {
	r := loadRecording(t, "poweroff")
	r.Version = "v51.1"
	r.Exchanges[0].Reply = strings.Replace(r.Exchanges[0].Reply, `"53.0.0"`, `"51.1.0"`, 1)
	d := &double{Recording: r}
	if _, err := startDouble(t, d); !errors.Is(err, ErrTooOld) || !strings.Contains(err.Error(), "https://") {
		t.Errorf("Start: %v", err)
	}
	if _, err := New(d.install(t)).Version(t.Context()); !errors.Is(err, ErrTooOld) {
		t.Errorf("Version: %v", err)
	}
}

func TestVersion(t *testing.T) {
	d := &double{Recording: loadRecording(t, "poweroff")}
	if got, err := New(d.install(t)).Version(t.Context()); err != nil || got != d.Recording.Version {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := New("/no/such/program").Version(t.Context()); !errors.Is(err, ErrNotInstalled) || !strings.Contains(err.Error(), BinaryVariable) {
		t.Error(err)
	}
}

func TestParseVersion(t *testing.T) {
	for said, want := range map[string]int{
		"cloud-hypervisor v53.0\nMigration Protocol Versions: 0": 53,
		"cloud-hypervisor v53.0-dirty":                           53,
		"cloud-hypervisor v52.1.0-12-gabcdef":                    52,
		"53.0.0":                                                 53,
		"cloud-hypervisor":                                       0,
		"QEMU emulator version x":                                0,
		"":                                                       0,
	} {
		if _, got, err := parseVersion(said); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d, %v", said, got, err)
		}
	}
}
