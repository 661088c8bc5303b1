package soak

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Declaration is that of a VM with every layer, on the image small with [Image]
// in it. Its workload appends numbered records to the volume, nine bytes each, and
// says of each when it is synced; what a kill tore off is cut off at its next
// start, as any journal does. A reload can move the published port.
func Declaration(vmm string, port int) string { return fmt.Sprintf(declaration, vmm, port) }

const declaration = `
image: small
vmm: %s
vcpus: 1
memory: 128MiB
overlay: {size: 32MiB}
nameservers: [203.0.113.1]
volumes:
  - {name: state, mount: /var/lib/state, size: 32MiB}
secrets:
  made: {generate: 32}
ports: ["127.0.0.1:%d:8080"]
run:
  argv: [sh, /srv/writer]
  user: app
  ready: {tcp: 8080}
  stop: {timeout: 5s}
`

// Records is the file in the guest that the workload appends to.
const Records = "/var/lib/state/records"

// Image is what the image holds more than world.SmallImage gives it.
var Image = map[string]string{"srv/writer": writer}

// writer is the workload.
const writer = `
f=` + Records + `
touch $f
n=$(($(stat -c %s $f) / 9))
truncate -s $((n * 9)) $f
httpd -f -p 8080 -h /srv/www &
while :; do
	n=$((n + 1))
	printf '%08d\n' $n | dd of=$f oflag=append conv=notrunc,fsync 2>/dev/null || exit 1
	echo "synced $n"
	usleep 50000
done
`

// Synced is the highest record that the workload's log says is synced; 0: none.
func Synced(log string) (highest int) {
	for line := range strings.Lines(log) {
		// The line's time stands before it. A line without its end may be half of one.
		if whole, ok := strings.CutSuffix(line, "\n"); ok {
			_, said, found := strings.Cut(whole, "synced ")
			if n, err := strconv.Atoi(said); found && err == nil {
				highest = max(highest, n)
			}
		}
	}
	return highest
}

// Check looks at the file of records: without a gap, and with all that were
// reported as synced.
func Check(records string, reported int) error {
	if reported == 0 {
		return errors.New("no record was reported as synced: nothing is proved")
	}
	lines := strings.Split(records, "\n")
	lines = lines[:len(lines)-1] // the rest behind the last newline may be being written
	for i, line := range lines {
		if line != fmt.Sprintf("%08d", i+1) {
			return fmt.Errorf("record %d is %q", i+1, line)
		}
	}
	if len(lines) < reported {
		return fmt.Errorf("%d records, and %d were reported as synced", len(lines), reported)
	}
	return nil
}
