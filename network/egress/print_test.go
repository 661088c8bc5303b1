package egress

import (
	"bytes"
	"testing"
	"time"
)

var at = time.Date(2026, 10, 1, 12, 0, 0, 123456789, time.UTC)

var printed = []Event{
	{Time: at, VM: "claw", Kind: KindQuery, Name: "api.telegram.org", Type: "A", Proto: "udp", Verdict: Allowed, RCode: "NOERROR", Answers: []string{"CNAME t.me.", "149.154.167.220"}, Upstream: "8.8.8.8:53", Millis: 12.34},
	{Time: at, VM: "claw", Kind: KindQuery, Name: "api.telegram.org", Type: "A", Proto: "tcp", Verdict: Allowed, RCode: "NOERROR", Answers: []string{"149.154.167.220"}, Cached: true, Millis: 0.02},
	{Time: at, VM: "claw", Kind: KindQuery, Name: "api.telegram.org", Type: "AAAA", Proto: "udp", Verdict: Allowed, RCode: "NOERROR", Millis: 0.02, Reason: "the VM has no IPv6"},
	{Time: at, VM: "claw", Kind: KindQuery, Name: "example.com", Type: "A", Proto: "udp", Verdict: Refused, RCode: "NXDOMAIN", Millis: 0.1, Reason: "egress mode is none"},
	{Time: at, VM: "claw", Kind: KindQuery, Name: "example.com", Type: "A", Proto: "udp", Verdict: Allowed, RCode: "SERVFAIL", Millis: 4000, Reason: "no name server of the VM answered"},
	{Time: at, VM: "claw", Kind: KindQuery, Proto: "udp", Verdict: Refused, RCode: "FORMERR", Reason: "malformed message"},
	{Time: at, VM: "claw", Kind: KindOpen, Name: "api.telegram.org", Proto: "tcp", Source: "192.168.83.10:40000", Destination: "149.154.167.220:443", Verdict: Allowed},
	{Time: at, VM: "claw", Kind: KindOpen, Proto: "tcp", Source: "192.168.83.10:40001", Destination: "192.168.83.11:22", Verdict: Refused, Reason: "another VM"},
	{Time: at, VM: "claw", Kind: KindOpen, Proto: "icmp", Type: "8/0", Source: "192.168.83.10", Destination: "9.9.9.9", Verdict: Allowed},
	{Time: at, VM: "claw", Kind: KindClose, Name: "api.telegram.org", Proto: "tcp", Source: "192.168.83.10:40000", Destination: "149.154.167.220:443", BytesOut: 999, BytesIn: 999_960, Seconds: 1.25},
	{Time: at, VM: "claw", Kind: KindClose, Proto: "udp", Source: "192.168.83.10:1", Destination: "9.9.9.9:2", BytesIn: 12_345_678_901},
	{Time: at, VM: "claw", Kind: KindLost, Count: 12, Reason: "connections that were begun are missing: the gate did not keep up"},
	{Time: at, VM: "claw", Kind: KindDropped, Count: 7, Reason: "the log could not keep up"},
	{Time: at, VM: "claw", Kind: KindQuery, Name: "x\x1b[2J\nallowed [1.2.3.4]\u202e\u009b\xff", Type: "TXT", Verdict: Allowed, RCode: "NOERROR", Answers: []string{"TXT \"\x1b]0;owned\a\"", string(bytes.Repeat([]byte("a"), 1000))}},
}

func TestPrint(t *testing.T) {
	for name, tty := range map[string]bool{"print.txt": false, "print-tty.txt": true} {
		var b bytes.Buffer
		for _, e := range printed {
			if err := Print(&b, e, tty); err != nil {
				t.Fatal(err)
			}
		}
		golden(t, name, b.Bytes())
	}
}
