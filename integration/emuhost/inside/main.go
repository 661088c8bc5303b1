// Command inside is the part of the harness that runs in the emulated host. In its initramfs it is /init: it
// mounts the root, puts itself and its unit under /run and starts systemd. There the unit runs it again, with
// the argument "serve", and it runs what tests ask for over the virtio-serial port.
package main

import (
	"fmt"
	"os"
)

func main() {
	run := boot
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		run = serve
	}
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "emuhost: %v\n", err)
		os.Exit(1)
	}
}
