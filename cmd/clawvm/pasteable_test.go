package main

import (
	"os"
	"testing"

	"github.com/clawvm/clawvm/host"
)

// Commands in a text become the user's own; prose about the program stays.
func TestPasteable(t *testing.T) {
	was := os.Args[0]
	defer func() { os.Args[0] = was }()
	t.Setenv("CLAWVM_ROOT", "")
	app := newApp()
	for _, c := range []struct{ program, root, text, want string }{
		{"clawvm", "/", "`clawvm image ls` shows it", "`clawvm image ls` shows it"},
		{"clawvm", "/tmp/x", "`clawvm image ls` shows it", "`clawvm --root /tmp/x image ls` shows it"},
		{"clawvm", "/tmp/a $1", "clawvm down web first", "clawvm --root '/tmp/a $1' down web first"},
		{"bin/clawvm", "/", "it runs; clawvm down web first (clawvm gc)", "it runs; bin/clawvm down web first (bin/clawvm gc)"},
		{"bin/clawvm", "/tmp/x", "a bridge that clawvm did not make, of another root of clawvm (id 1); see /etc/clawvm/vms/up",
			"a bridge that clawvm did not make, of another root of clawvm (id 1); see /etc/clawvm/vms/up"},
		{"bin/clawvm", "/", "clawvm-init, clawvm upside", "clawvm-init, clawvm upside"},
	} {
		os.Args[0] = c.program
		if got := pasteable(app, host.Layout{Root: c.root}, c.text); got != c.want {
			t.Errorf("%q as %s in %s: %q, want %q", c.text, c.program, c.root, got, c.want)
		}
	}
}
