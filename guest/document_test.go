package guest

import (
	"bytes"
	"flag"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func full() *Document {
	return &Document{
		Version: DocumentVersion, Name: "openclaw", Hostname: "openclaw", Transport: TransportVsock, InstructionClock: true,
		Network: &Network{
			MAC: "02:63:c0:a8:53:0a", Address: netip.MustParseAddr("192.168.83.10"), Gateway: netip.MustParseAddr("192.168.83.1"),
			Nameservers: []netip.Addr{netip.MustParseAddr("192.168.83.1")}, MTU: 1500,
		},
		Root: Root{Lower: Lower{Share: "store"}, Upper: Upper{Disk: "overlay"}},
		Mounts: []Mount{
			{Kind: MountVolume, Source: "state", Target: "/var/lib/openclaw", NoSUID: true, NoDev: true, Owner: &Owner{20001, 20001}, Mode: 0o700},
			{Kind: MountShare, Source: "share0", Target: "/inbox", ReadOnly: true, NoSUID: true, NoDev: true, NoExec: true},
			{Kind: MountSecrets, Source: "secrets", Target: SecretsTarget},
		},
		Files: []File{{Path: "/etc/openclaw/openclaw.json", Mode: 0o444, Content: []byte("{}\n")}},
		Workload: &Workload{
			Argv: []string{"node", "/opt/openclaw/openclaw.mjs", "gateway"}, Env: map[string]string{"NODE_ENV": "production", "A": ""}, User: "openclaw", Cwd: "/",
			Ready: Ready{HTTP: &HTTPReady{Port: 18789, Path: "/startupz"}, Timeout: 600}, Stop: Stop{Signal: "TERM", Timeout: 30},
			Restart: RestartOnFailure, NoRestart: []int{78},
		},
	}
}

func TestEncodeIsTheGoldenDocumentAndDecodesToItself(t *testing.T) {
	data, err := full().Encode()
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/document.json"
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(data, want) {
		t.Errorf("the document differs from %s:\n%s", golden, data)
	}
	d, err := Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(d, full()) {
		t.Errorf("decoded to %+v", d)
	}
}

func TestTheSmallestDocument(t *testing.T) {
	d := &Document{Version: 1, Name: "a", Hostname: "a", Transport: TransportSerial, Root: Root{Lower: Lower{Disk: "image", Type: "erofs"}, Upper: Upper{Tmpfs: 1 << 20}}}
	data, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(data)
	if err != nil || !reflect.DeepEqual(got, d) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestWrongDocumentsAreRefused(t *testing.T) {
	for want, change := range map[string]func(*Document){
		"version 2":                      func(d *Document) { d.Version = 2 },
		"isn't a VM's name":              func(d *Document) { d.Name = "../x" },
		"isn't a host name":              func(d *Document) { d.Hostname = "a b" },
		"is neither":                     func(d *Document) { d.Transport = "tcp" },
		"isn't an Ethernet address":      func(d *Document) { d.Network.MAC = "02:63" },
		`address "invalid IP"`:           func(d *Document) { d.Network.Address = netip.Addr{} },
		"isn't another IPv4":             func(d *Document) { d.Network.Gateway = d.Network.Address },
		"mtu 10":                         func(d *Document) { d.Network.MTU = 10 },
		"search domain":                  func(d *Document) { d.Network.Search = []string{"a\nnameserver 1.2.3.4"} },
		"lower needs":                    func(d *Document) { d.Root.Lower = Lower{} },
		"lower type \"ntfs\"":            func(d *Document) { d.Root.Lower = Lower{Disk: "d", Type: "ntfs"} },
		"upper needs":                    func(d *Document) { d.Root.Upper = Upper{Tmpfs: 1, Disk: "d"} },
		"with at most 20 bytes":          func(d *Document) { d.Root.Upper = Upper{Disk: strings.Repeat("d", 21)} },
		"kind \"nfs\"":                   func(d *Document) { d.Mounts[0].Kind = "nfs" },
		"mounts[1]: owner and mode":      func(d *Document) { d.Mounts[1].Owner = &Owner{} },
		"nothing can be mounted at or":   func(d *Document) { d.Mounts[1].Target = "/tmp/x" },
		"target /run:":                   func(d *Document) { d.Mounts[1].Target = "/run" },
		"isn't an absolute path":         func(d *Document) { d.Mounts[1].Target = "/a/../b" },
		"files[0]: path":                 func(d *Document) { d.Files[0].Path = "etc/x" },
		"more than permission bits":      func(d *Document) { d.Files[0].Mode = 0o100644 },
		"uid -1":                         func(d *Document) { d.Files[0].UID = -1 },
		"argv is empty":                  func(d *Document) { d.Workload.Argv = nil },
		"argv[0] has a zero byte":        func(d *Document) { d.Workload.Argv[0] = "a\x00" },
		"isn't a variable's name":        func(d *Document) { d.Workload.Env["A=B"] = "" },
		"user \"a b\"":                   func(d *Document) { d.Workload.User = "a b" },
		"more than one of":               func(d *Document) { d.Workload.Ready.TCP = 1 },
		"port 70000":                     func(d *Document) { d.Workload.Ready.HTTP.Port = 70000 },
		"doesn't start with a slash":     func(d *Document) { d.Workload.Ready.HTTP.Path = "x" },
		"status 100":                     func(d *Document) { d.Workload.Ready.HTTP.Status = 100 },
		"signal \"SEGV\"":                func(d *Document) { d.Workload.Stop.Signal = "SEGV" },
		"restart \"maybe\"":              func(d *Document) { d.Workload.Restart = "maybe" },
		"noRestart: 256":                 func(d *Document) { d.Workload.NoRestart = []int{256} },
		"at most 16777216 fit":           func(d *Document) { d.Files[0].Content = make([]byte, MaxDocument) },
		"timeout -1 isn't between 0 and": func(d *Document) { d.Workload.Ready.Timeout = -1 },
	} {
		d := full()
		change(d)
		if _, err := d.Encode(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

func TestDecodeIsStrict(t *testing.T) {
	data, err := full().Encode()
	if err != nil {
		t.Fatal(err)
	}
	good := string(data)
	for want, text := range map[string]string{
		"unknown field":             strings.Replace(good, `"hostname"`, `"extra": 1, "hostname"`, 1),
		"after top-level value":     good + "{}",
		"version 7":                 `{"version": 7, "new": true}`,
		"version 0":                 `{}`,
		"cannot unmarshal":          strings.Replace(good, `"mtu": 1500`, `"mtu": "1500"`, 1),
		"unexpected end of JSON":    `{"version": 1`,
		"at most 16777216 are read": strings.Repeat(" ", MaxDocument+1),
	} {
		if _, err := Decode([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	data, err := full().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"version":1,"name":"a","hostname":"a","root":{"lower":{"share":"s"},"upper":{"tmpfs":1}},"transport":"vsock"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := Decode(data)
		if err != nil {
			return
		}
		again, err := d.Encode()
		if err != nil {
			t.Fatalf("what was read can't be written: %v", err)
		}
		back, err := Decode(again)
		if err != nil {
			t.Fatalf("what was written can't be read: %v", err)
		}
		third, err := back.Encode()
		if err != nil || !bytes.Equal(third, again) {
			t.Fatalf("not the same again: %v", err)
		}
	})
}
