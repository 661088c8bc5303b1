package soak

import "testing"

func TestCheckFindsWhatIsLost(t *testing.T) {
	const log = "2026-11-22T20:00:00Z synced 1\n2026-11-22T20:00:01Z synced 3\nx synced 12"
	if n := Synced(log); n != 3 {
		t.Errorf("%d is the highest record that is reported, want 3: a line without its end says nothing", n)
	}
	for records, well := range map[string]bool{
		"00000001\n00000002\n00000003\n":                         true,
		"00000001\n00000002\n00000003\n00000004\n00":             true,
		"00000001\n00000002\n":                                   false, // one was lost
		"00000001\n00000003\n00000003\n":                         false,
		"00000001\n\x00\x00\x00\x00\x00\x00\x00\x00\n00000003\n": false,
	} {
		if err := Check(records, 3); (err == nil) != well {
			t.Errorf("%q: %v", records, err)
		}
	}
	if Check("", 0) == nil {
		t.Error("nothing was reported, and all is well")
	}
}
