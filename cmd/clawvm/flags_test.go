package main

import (
	"slices"
	"strings"
	"testing"
)

func TestFlagsMayFollowArguments(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"clawvm logs openclaw -f", "clawvm logs -f openclaw"},
		{"clawvm down a b --timeout 5s", "clawvm down --timeout 5s a b"},
		{"clawvm down a --timeout=5s b", "clawvm down --timeout=5s a b"},
		{"clawvm --root /x net openclaw --json -f", "clawvm --root /x net --json -f openclaw"},
		{"clawvm exec openclaw ls -l", "clawvm exec openclaw ls -l"},
		{"clawvm exec -it openclaw -- sh -c x", "clawvm exec -it openclaw -- sh -c x"},
		{"clawvm exec --user app openclaw id -u", "clawvm exec --user app openclaw id -u"},
		{"clawvm image build openclaw --force", "clawvm image build --force openclaw"},
		{"clawvm config show x --origin", "clawvm config show --origin x"},
		{"clawvm rm -- -f", "clawvm rm -- -f"},
		{"clawvm up up", "clawvm up up"},
		{"clawvm", "clawvm"},
	} {
		got := flagsFirst(newApp(), strings.Fields(c.in))
		if want := strings.Fields(c.want); !slices.Equal(got, want) {
			t.Errorf("%s\n gives %s\n want  %s", c.in, strings.Join(got, " "), c.want)
		}
	}
}
