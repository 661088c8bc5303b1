package main

import (
	"testing"
	"time"
)

// FuzzParseWhen reads times as people type them: one in the past is not in the
// future, and what is understood is of a year that is.
func FuzzParseWhen(f *testing.F) {
	for _, seed := range []string{"10m", "3d", "99999d", "-1h", "@1", "@-9223372036854775808", "15:04", "25:00", "2026-11-22", "2026-11-22 15:04:05", "2026-11-22T15:04:05+02:00", "1e9h", "d", ""} {
		f.Add(seed)
	}
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, text string) {
		at, err := parseWhen(text, now)
		if err != nil {
			return
		}
		if again, err := parseWhen(text, now); err != nil || !again.Equal(at) {
			t.Errorf("%q is %v, and then %v (%v)", text, at, again, err)
		}
		if _, err := time.ParseDuration(text); err == nil && at.After(now) {
			t.Errorf("%q ago is %v", text, at)
		}
	})
}
