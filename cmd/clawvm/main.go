// Command clawvm runs programs that nobody should trust, each in a microVM of its
// own, on one Linux server.
package main

import (
	"fmt"
	"os"

	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/storage/recipe"
)

func main() {
	if err := host.ForbidCores(); err != nil {
		fmt.Fprintln(os.Stderr, "clawvm:", err)
		os.Exit(host.ExitFailed)
	}
	// The program also is its own helper processes: the gate, and the builder
	// inside an image's user namespace.
	if len(os.Args) == 2 && os.Args[1] == host.GateArgument {
		os.Exit(gate.Main())
	}
	recipe.RunChild()
	os.Exit(run(os.Args))
}
