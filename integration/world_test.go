package integration

import (
	"io"
	"net/netip"
	"testing"
	"time"

	shared "github.com/clawvm/clawvm/integration/world"
)

// world is package world's, in the words of these tests.
type world struct {
	*shared.World
	bin  string // directory of clawvm
	root string
}

// uplink is the host's address on the fake internet.
var uplink = shared.Uplink

// commandLimit bounds one command: a start under emulation on a busy machine.
const commandLimit = shared.CommandLimit

// newWorld makes the namespaces' network and builds the program, once a process.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := shared.New(t)
	return &world{World: w, bin: w.Bin, root: w.Root}
}

// result is what a command came to.
type result struct {
	stdout, stderr string
	code           int
}

// clawvm runs the program on the world's root.
func (w *world) clawvm(t *testing.T, args ...string) result {
	t.Helper()
	return w.clawvmIn(t, nil, args...)
}

func (w *world) clawvmIn(t *testing.T, stdin io.Reader, args ...string) result {
	t.Helper()
	r := w.ClawvmIn(t, stdin, args...)
	return result{r.Stdout, r.Stderr, r.Code}
}

// must is clawvm for a command that works; it returns what it printed.
func (w *world) must(t *testing.T, args ...string) string {
	t.Helper()
	return w.Must(t, args...)
}

func (w *world) asked() []string { return w.Asked() }

// prepareStore gives the world's root an image and a kernel.
func (w *world) prepareStore(t *testing.T) {
	t.Helper()
	w.PrepareStore(t)
}

// declare writes the declaration of a VM.
func (w *world) declare(t *testing.T, name, text string) {
	t.Helper()
	w.Declare(t, name, text)
}

// status is the JSON of `clawvm status`.
type status = shared.Status

func (w *world) status(t *testing.T, name string) status {
	t.Helper()
	return w.Status(t, name)
}

func (w *world) processes(t *testing.T, vm string) map[string][]int {
	t.Helper()
	return w.Processes(t, vm)
}

func (w *world) snapshot(t *testing.T) map[string][]string {
	t.Helper()
	return w.Snapshot(t)
}

func (w *world) compare(t *testing.T, want, got map[string][]string) {
	t.Helper()
	w.Compare(t, want, got)
}

// eventually waits for something to become true.
func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	shared.Eventually(t, what, limit, ok)
}

// vmmName is the VMM that this process's tests run under.
func vmmName() string { return shared.VMM() }

// addAddress gives a link an address and sets it up.
func addAddress(name string, p netip.Prefix) error { return shared.AddAddress(name, p) }

// kill ends a process that the world's VMs run, by pid.
func kill(t *testing.T, pid int) {
	t.Helper()
	shared.Kill(t, pid)
}
