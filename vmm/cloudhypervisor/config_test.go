package cloudhypervisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/clawvm/clawvm/vmm"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestConfigure(t *testing.T) {
	small := &vmm.Machine{Name: "small", VCPUs: 1, Memory: 128 << 20, Kernel: "/k/vmlinux", Dir: "/run/clawvm/small/vmm"}
	all := &vmm.Machine{
		Name: "full", VCPUs: 4, Memory: 2 << 30, Kernel: "/k/vmlinux", Initramfs: "/r/initramfs", Cmdline: "console=hvc0 quiet",
		Disks:  []vmm.Disk{{ID: "overlay", Path: "/v/overlay.raw"}, {ID: "vol-state", Path: "/v/state.raw"}, {ID: "base", Path: "/s/base", ReadOnly: true}},
		Shares: []vmm.Share{{Tag: "store", Socket: "/run/s.sock"}, {Tag: "secrets", Socket: "/run/t.sock"}},
		TAP:    "clawc0a8530a", MAC: net.HardwareAddr{2, 0x63, 0xc0, 0xa8, 0x53, 0x0a},
		Agent: &vmm.Channel{}, Dir: "/run/clawvm/full/vmm", Console: os.Stdout,
	}
	for name, config := range map[string]*vmConfig{"small": configure(small, false), "full": configure(all, true)} {
		got, err := json.MarshalIndent(config, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join("testdata", "config-"+name+".json")
		if *update {
			if err := os.WriteFile(path, append(got, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(append(got, '\n'), want) {
			t.Errorf("%s is\n%s\nwant\n%s", name, got, want)
		}
	}
}

// The server ignores fields that it doesn't know: each of ours must be in what it says that it understood, with our value.
func TestEveryFieldWasUnderstood(t *testing.T) {
	r := loadRecording(t, "full")
	var sent any
	var info struct{ Config any }
	_, body, _ := strings.Cut(r.Exchanges[2].Reply, "\r\n\r\n")
	for v, b := range map[any]string{&sent: string(r.Exchanges[1].Body), &info: body} {
		if err := json.Unmarshal([]byte(b), v); err != nil {
			t.Fatal(err)
		}
	}
	contains(t, "", info.Config, sent)
	m := recordedMachine("/run/recorded", "/opt/inside")
	m.Agent = &vmm.Channel{}
	full(m)
	var now any
	b, err := json.Marshal(configure(m, true))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &now); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(now, sent) {
		t.Errorf("what is sent has changed since it was recorded; record it again:\n%v\nwas\n%v", now, sent)
	}
}

func contains(t *testing.T, at string, got, want any) {
	t.Helper()
	switch want := want.(type) {
	case map[string]any:
		got, ok := got.(map[string]any)
		if !ok {
			t.Errorf("%s was not understood", at)
			return
		}
		for k, v := range want {
			contains(t, at+"."+k, got[k], v)
		}
	case []any:
		got, ok := got.([]any)
		if !ok || len(got) != len(want) {
			t.Errorf("%s was not understood", at)
			return
		}
		for i := range want {
			contains(t, fmt.Sprintf("%s[%d]", at, i), got[i], want[i])
		}
	default:
		if got != want {
			t.Errorf("%s was understood as %v instead of %v", at, got, want)
		}
	}
}

func TestCheck(t *testing.T) {
	good := func() *vmm.Machine {
		return &vmm.Machine{Name: "a", VCPUs: 1, Memory: 1 << 28, Kernel: "/k", Dir: "/run/a"}
	}
	if err := check(good()); err != nil {
		t.Error(err)
	}
	for want, spoil := range map[string]func(*vmm.Machine){
		"needs a CPU":    func(m *vmm.Machine) { m.VCPUs = 0 },
		"no MAC address": func(m *vmm.Machine) { m.TAP = "tap0" },
		"1 to 20 bytes":  func(m *vmm.Machine) { m.Disks = []vmm.Disk{{ID: strings.Repeat("x", 21), Path: "/d"}} },
		"107 is the most": func(m *vmm.Machine) {
			m.Dir = "/" + strings.Repeat("d", 100)
		},
	} {
		m := good()
		spoil(m)
		if err := check(m); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
}

func TestExit(t *testing.T) {
	for name, c := range map[string]struct {
		e    ending
		want vmm.ExitReason
	}{
		"poweroff":                          {ending{poweredOff: true, code: -1, signal: syscall.SIGKILL}, vmm.ExitPoweredOff},
		"reboot":                            {ending{rebooting: true, code: -1, signal: syscall.SIGKILL}, vmm.ExitRebooted},
		"panic and the reboot after it":     {ending{panicked: "panic", rebooting: true, signal: syscall.SIGKILL}, vmm.ExitPanicked},
		"killed by us":                      {ending{asked: true, code: -1, signal: syscall.SIGKILL}, vmm.ExitKilled},
		"stopped by us":                     {ending{asked: true}, vmm.ExitKilled},
		"killed by somebody":                {ending{code: -1, signal: syscall.SIGKILL}, vmm.ExitKilled},
		"SIGTERM, which it takes":           {ending{}, vmm.ExitKilled},
		"a system call that is forbidden":   {ending{code: -1, signal: syscall.SIGSYS}, vmm.ExitFailed},
		"a crash":                           {ending{code: -1, signal: syscall.SIGSEGV}, vmm.ExitFailed},
		"an abort":                          {ending{code: -1, signal: syscall.SIGABRT}, vmm.ExitFailed},
		"an exit code":                      {ending{code: 1}, vmm.ExitFailed},
		"a thread that panicked, code 0":    {ending{stderr: "thread 'vcpu0' panicked at src/x.rs"}, vmm.ExitFailed},
		"events that are none":              {ending{broken: errNoEvents, signal: syscall.SIGKILL}, vmm.ExitFailed},
		"words of a guest that does a stop": {ending{asked: true, stderr: "panicked at"}, vmm.ExitKilled},
	} {
		got := c.e.exit()
		if got.Reason != c.want {
			t.Errorf("%s: %s; want %s", name, got, c.want)
		}
		if c.e.stderr != "" && got.Reason == vmm.ExitFailed && !strings.Contains(got.Detail, c.e.stderr) {
			t.Errorf("%s: %q does not have what it said", name, got.Detail)
		}
	}
}

func TestReadEvents(t *testing.T) {
	life := loadRecording(t, "reboot")
	stream := life.Before
	for _, x := range life.Exchanges {
		stream += x.Events
	}
	read := func(s string) (all []string, err error) {
		err = readEvents(strings.NewReader(s), func(e event) { all = append(all, e.String()) })
		return all, err
	}
	whole, err := read(stream)
	if err != nil || len(whole) < 6 || whole[0] != "vmm/starting" {
		t.Fatalf("got %v, %v", whole, err)
	}
	t.Run("torn anywhere, only the torn one is lost", func(t *testing.T) {
		for cut := range len(life.Before) - 2 { // its last two bytes are the empty line
			for _, between := range []string{"", "\n"} {
				got, err := read(life.Before[:cut] + between + stream)
				if err != nil || fmt.Sprint(got) != fmt.Sprint(whole) {
					t.Fatalf("cut at %d: %v, %v", cut, got, err)
				}
			}
		}
	})
	t.Run("a torn end", func(t *testing.T) {
		if got, err := read(stream + "{\n  \"timestamp\""); err != nil || len(got) != len(whole) {
			t.Errorf("got %v, %v", got, err)
		}
	})
	t.Run("byte by byte", func(t *testing.T) {
		var got []string
		err := readEvents(iotest.OneByteReader(strings.NewReader(stream)), func(e event) { got = append(got, e.String()) })
		if err != nil || fmt.Sprint(got) != fmt.Sprint(whole) {
			t.Errorf("got %v, %v", got, err)
		}
	})
	t.Run("what is no event", func(t *testing.T) {
		for name, s := range map[string]string{
			"one without end": `{"source": "` + strings.Repeat("x", maxEvent), "no object": strings.Repeat("[", maxEvent+1),
			"other objects": strings.Repeat(`{"a": "b"}`, maxEvent/10+1),
		} {
			if _, err := read(s); !errors.Is(err, errNoEvents) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if got, err := read("[1]\n7 \"x\" {\"source\": 7} {}}}\n" + stream); err != nil || len(got) != len(whole) {
			t.Errorf("got %v, %v", got, err)
		}
	})
}

func TestRequestsAreWhatTheServerReads(t *testing.T) {
	// Each call that is made without a body must be recorded without one.
	for _, x := range loadRecording(t, "stop").Exchanges {
		if x.Method == http.MethodPut && x.Call != "vm.create" && x.Body != nil {
			t.Errorf("%s was recorded with a body", x.Call)
		}
	}
}
