package main

import (
	"testing"
	"time"
)

func TestGrace(t *testing.T) {
	for text, want := range map[string]time.Duration{"10": 10 * time.Second, "0": 0, "90s": 90 * time.Second, "1m30s": 90 * time.Second, "250ms": 250 * time.Millisecond} {
		g := grace{defaultDown}
		if err := g.Set(text); err != nil || g.Duration != want {
			t.Errorf("%q is %s, %v; want %s", text, g.Duration, err, want)
		}
	}
	for _, text := range []string{"", "ten", "-1", "-5s", "10 s"} {
		g := grace{defaultDown}
		if err := g.Set(text); err == nil {
			t.Errorf("%q is %s, and should be refused", text, g.Duration)
		}
	}
}
