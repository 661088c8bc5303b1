package cloudhypervisor

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"github.com/clawvm/clawvm/vmm"
)

// recording is what a real cloud-hypervisor said and did once: testdata/v53 has them as JSON.
type recording struct {
	About     string
	Version   string // the program's
	Before    string // events before the first request
	Exchanges []exchange
	Stderr    string `json:",omitempty"`
	// Ended says that the process ended by itself after the last exchange, and how.
	Ended    bool
	ExitCode int
}

// exchange is one request with its reply as it came, and the events that came until the next one.
type exchange struct {
	Method string
	Call   string          // "vm.boot"
	Body   json.RawMessage `json:",omitempty"` // none: the request had no body
	Pad    int             `json:",omitempty"` // this many spaces before the body
	Reply  string          // status line, headers and body; "" when the process ended without one
	Events string          `json:",omitempty"`
}

const recordingsDir = "testdata/v53"

func loadRecording(t *testing.T, name string) *recording {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(recordingsDir, name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	r := &recording{}
	if err := json.Unmarshal(b, r); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return r
}

// recordedMachine is the machine of all recordings: no disk, no network, no share, but an agent.
func recordedMachine(dir, files string) *vmm.Machine {
	return &vmm.Machine{
		Name: "recorded", VCPUs: 1, Memory: 256 << 20, Dir: dir,
		Kernel: filepath.Join(files, "vmlinux"), Initramfs: filepath.Join(files, "initramfs"), Cmdline: "console=hvc0 panic=-1 quiet",
	}
}

// scenario is something to record: requests, and for a machine that boots what its guest is told then.
type scenario struct {
	name, about string
	spoil       func(*vmm.Machine)
	calls       []call
	tell        string   // to the guest, after the last call
	until       []string // events that the scenario waits for after the last call
	after       []call   // what is asked then
	landlock    bool
}

// call is a request; config stands for the machine's.
type call struct {
	method, name string
	body         any
	pad          int
}

type config struct{}

var (
	ping   = call{method: http.MethodGet, name: "vmm.ping"}
	info   = call{method: http.MethodGet, name: "vm.info"}
	create = call{method: http.MethodPut, name: "vm.create", body: config{}}
	boot   = call{method: http.MethodPut, name: "vm.boot"}
	up     = []call{ping, create, boot}
)

func put(name string, body any) call { return call{method: http.MethodPut, name: name, body: body} }

// full is a configuration with everything that configure can write.
func full(m *vmm.Machine) {
	m.Disks = []vmm.Disk{{ID: "root", Path: "/run/root.raw"}, {ID: "data", Path: "/run/data.raw", ReadOnly: true}}
	m.Shares = []vmm.Share{{Tag: "store", Socket: "/run/store.sock"}}
	m.TAP, m.MAC = "lo", []byte{2, 0, 0, 0, 0, 1}
	m.Console = os.Stdout
}

func scenarios() []scenario {
	return []scenario{
		{name: "poweroff", about: "a guest that turns itself off", calls: up, tell: "poweroff", until: []string{"vm/shutdown"}, after: []call{info}},
		{name: "reboot", about: "a guest that reboots", calls: up, tell: "reboot", until: []string{"vm/rebooting", "vm/rebooted"}},
		{name: "panic", about: "a guest whose kernel panics and resets", calls: up, tell: "panic", until: []string{"guest/panic", "vm/rebooting"}},
		{name: "stop", about: "vmm.shutdown of a running machine", calls: append(up[:3:3], info, put("vm.power-button", nil), put("vmm.shutdown", nil)), until: []string{"vmm/shutdown"}},
		{name: "pause", about: "a machine that is paused, resumed, and ended while it is paused", calls: append(up[:3:3], info,
			put("vm.pause", nil), info, put("vm.pause", nil), put("vm.resume", nil), info, put("vm.resume", nil), put("vm.pause", nil), put("vmm.shutdown", nil)),
			until: []string{"vmm/shutdown"}},
		{name: "no-kernel", about: "a kernel that isn't there", spoil: func(m *vmm.Machine) { m.Kernel = "/no/kernel" }, calls: up},
		{name: "no-disk", about: "a disk that isn't there", spoil: func(m *vmm.Machine) { m.Disks = []vmm.Disk{{ID: "root", Path: "/no/disk"}} }, calls: up},
		{name: "bad-tap", about: "a link that is no TAP", spoil: func(m *vmm.Machine) { m.TAP, m.MAC = "lo", []byte{2, 0, 0, 0, 0, 1} }, calls: up},
		{name: "too-much-memory", about: "memory that cannot be had: the process ends without a reply", spoil: func(m *vmm.Machine) { m.Memory = 1 << 50 }, calls: up},
		{name: "full", about: "what is understood of a full configuration", spoil: full, landlock: true, calls: []call{ping, create, info}},
		{name: "bad-type", about: "JSON of the wrong type", calls: []call{put("vm.create", map[string]any{"cpus": "two"})}},
		{name: "no-json", about: "a body that is no configuration", calls: []call{put("vm.create", []int{1})}},
		{name: "no-body", about: "vm.create without a body", calls: []call{put("vm.create", nil)}},
		{name: "body-on-boot", about: "a body where none is expected", calls: []call{create, put("vm.boot", struct{}{})}},
		{name: "boot-twice", about: "vm.boot of a machine that runs", calls: append(up[:3:3], boot)},
		{name: "create-twice", about: "vm.create of a machine that is there", calls: []call{create, create}},
		{name: "unknown-route", about: "a call that there isn't", calls: []call{put("vm.reticulate", nil)}},
		{name: "wrong-method", about: "GET where PUT is expected", calls: []call{{method: http.MethodGet, name: "vm.boot"}}},
		{name: "before-create", about: "calls before there is a machine", calls: []call{boot, info, put("vm.power-button", nil)}},
		{name: "too-long", about: "a body over the limit", calls: []call{{method: http.MethodPut, name: "vm.create", body: config{}, pad: maxRequest}}},
		{name: "longest", about: "a body at the limit", calls: []call{{method: http.MethodPut, name: "vm.create", body: map[string]any{"cpus": 1}, pad: maxRequest - len(`{"cpus":1}`)}}},
	}
}

// keys are the paths of all values in a JSON document, sorted: "cpus.boot_vcpus", "disks[].id".
func keys(v any) []string {
	var all []string
	var walk func(string, any)
	walk = func(at string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				walk(at+"."+k, e)
			}
		case []any:
			for _, e := range v {
				walk(at+"[]", e)
			}
		default:
			all = append(all, at)
		}
	}
	walk("", v)
	sort.Strings(all)
	return all
}
