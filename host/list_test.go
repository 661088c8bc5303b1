package host

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkList lists a thousand VMs that are down, each with a lease.
func BenchmarkList(b *testing.B) {
	const number = 1000
	l := Layout{Root: b.TempDir(), ID: "00000000"}
	write := func(path, text string) {
		b.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	write(l.HostConfig(), "bridge: wide\naddress: 10.20.0.1/16\nuidBase: 3000000000\n")
	if err := os.MkdirAll(l.Leases(), 0o755); err != nil {
		b.Fatal(err)
	}
	for i := range number {
		name := fmt.Sprintf("vm-%d", i)
		write(filepath.Join(l.Declarations(), name+".yaml"), `
image: small
vmm: qemu
vcpus: 1
memory: 128MiB
nameservers: [203.0.113.1]
overlay: {tmpfs: 16MiB}
run: {argv: [httpd, -f, -p, "8080", -h, /srv/www], user: app, ready: {tcp: 8080}, stop: {timeout: 5s}}
`)
		if err := os.Symlink(name, filepath.Join(l.Leases(), fmt.Sprintf("10.20.%d.%d", i/250+1, i%250+1))); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		entries, err := List(b.Context(), l)
		if err != nil || len(entries) != number || entries[0].Address != "10.20.1.1" || entries[0].Problem != "" {
			b.Fatalf("%d entries, %+v, %v", len(entries), entries[0], err)
		}
	}
}
