package world

import "testing"

// TestCarrier: a bridge whose last port has just gone looks as it does a second later.
func TestCarrier(t *testing.T) {
	for a, b := range map[string]string{
		"microbr          UP             02:63:c0:a8:53:01 <BROADCAST,MULTICAST,UP> ":          "microbr          DOWN           02:63:c0:a8:53:01 <NO-CARRIER,BROADCAST,MULTICAST,UP> ",
		"microbr          UP             192.168.83.1/24 ":                                     "microbr          DOWN           192.168.83.1/24 ",
		"uplink@if2       UP             02:63:c0:a8:53:02 <BROADCAST,MULTICAST,UP,LOWER_UP> ": "uplink@if2       LOWERLAYERDOWN 02:63:c0:a8:53:02 <NO-CARRIER,BROADCAST,MULTICAST,UP> ",
	} {
		x, y := withoutCarrier(a), withoutCarrier(b)
		if x != y {
			t.Errorf("%q is not %q", x, y)
		}
	}
	if withoutCarrier("a UP b <UP>") == withoutCarrier("a UP b <>") {
		t.Error("a link that is set down looks like one that is up")
	}
}
