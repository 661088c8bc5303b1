package boot

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/guest/agent"
	"github.com/clawvm/clawvm/guest/tree"
)

// copyName is the init's third life: a stage that has taken the workload's place and rights, or root's, becomes it, and carries files
// between the guest's file system and its standard streams. So a copy can do what the workload's own cp could, and nothing else,
// and the image needs no tar.
const copyName = "clawvm-copy"

// A file that could not be read doesn't end a copy, but many of them would flood the terminal at the other end.
const maxWarnings = 20

// copyStream is the size of the buffers before the streams: what a frame to the host holds.
const copyStream = 32 << 10

// runCopy carries what the request says. It returns an exit code.
func runCopy(request string) int {
	// The workload may have the same user; this program and the memory it has are not its to look at or change.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitStage
	}
	var req agent.CopyRequest
	if err := json.Unmarshal([]byte(request), &req); err != nil {
		fmt.Fprintln(os.Stderr, "cannot read what to copy:", err)
		return exitStage
	}
	if req.Into {
		err := tree.Unpack(bufio.NewReaderSize(os.Stdin, copyStream), req.Path, tree.UnpackOptions{Name: req.Name, Owners: req.Owners, Special: req.Owners})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	warnings := 0
	out := bufio.NewWriterSize(os.Stdout, copyStream)
	err := tree.Pack(out, req.Path, tree.PackOptions{Follow: req.Follow, Warn: func(err error) {
		if warnings++; warnings <= maxWarnings {
			fmt.Fprintln(os.Stderr, err)
		}
	}})
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if more := warnings - maxWarnings; more > 0 {
		fmt.Fprintf(os.Stderr, "cannot read %d more\n", more)
	}
	if warnings > 0 {
		return agent.CopyIncomplete
	}
	return 0
}
