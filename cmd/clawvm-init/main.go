// Command clawvm-init is the first process of a clawvm guest.
package main

import (
	"os"

	"github.com/clawvm/clawvm/guest/boot"
)

func main() { os.Exit(boot.Main()) }
