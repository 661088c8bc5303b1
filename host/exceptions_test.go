package host

import (
	"fmt"
	"testing"
	"time"

	"github.com/clawvm/clawvm/config"
)

func entries(t *testing.T, texts ...string) []config.Allow {
	t.Helper()
	var all []config.Allow
	for _, text := range texts {
		some, err := config.ParseAllow(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, some...)
	}
	return all
}

func TestExceptions(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	declared := entries(t, "a.test", "b.test:80")
	var x exceptions
	is := func(want string) {
		t.Helper()
		if got := fmt.Sprint(x.list(declared, now)); got != want {
			t.Errorf("the list is %s, want %s", got, want)
		}
	}
	is("[a.test b.test:80]")
	x.allow(entries(t, "c.test", "a.test"), declared, now.Add(time.Minute))
	is("[a.test b.test:80 c.test]")
	// For longer, and for a shorter time: the last word counts.
	x.allow(entries(t, "c.test"), declared, time.Time{})
	x.allow(entries(t, "d.test"), declared, now.Add(time.Hour))
	x.allow(entries(t, "d.test"), declared, now.Add(time.Minute))
	back := x.snapshot()
	x.deny(entries(t, "a.test", "c.test"))
	is("[b.test:80 d.test]")
	back()
	is("[a.test b.test:80 c.test d.test]")
	x.deny(entries(t, "a.test"))
	x.allow(entries(t, "a.test:80"), declared, time.Time{})
	is("[b.test:80 c.test d.test a.test:80]")
	// Allowed again, it is the declaration's.
	x.allow(entries(t, "a.test"), declared, now.Add(time.Second))
	is("[a.test b.test:80 c.test d.test a.test:80]")
	now = now.Add(time.Minute)
	is("[a.test b.test:80 c.test a.test:80]")
	if got := fmt.Sprint(x.list(nil, now)); got != "[c.test a.test:80]" {
		t.Errorf("without a declaration the list is %s", got)
	}
	if len(declared) != 2 || declared[0].Name != "a.test" {
		t.Error("the declaration was changed")
	}
}
