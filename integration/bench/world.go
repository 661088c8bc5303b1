package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/vmm"
)

// world is where the measurements are made: a root of its own with one image,
// one kernel and nothing else.
type world struct {
	bin, root, trivial string
	facts              vmm.Facts
	kernel             *kernel.Kernel
}

// commandLimit bounds one command: a start under emulation on a busy machine.
const commandLimit = 5 * time.Minute

func newWorld(ctx context.Context, o options) (*world, error) {
	w := &world{bin: o.bin, trivial: o.trivial, root: "/run/b"}
	// What is built or measured lies on a RAM file system: the disk is not in question.
	for _, m := range []struct{ what, where, options string }{{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"tmpfs", "/run", "mode=755"}} {
		if err := unix.Mount(m.what, m.where, m.what, unix.MS_NOSUID|unix.MS_NODEV, m.options); err != nil {
			return nil, fmt.Errorf("cannot mount %s: %w", m.where, err)
		}
	}
	if err := uplink(); err != nil {
		return nil, fmt.Errorf("cannot make the uplink: %w", err)
	}
	w.facts = vmm.LookHost()
	if w.bin == "" {
		w.bin = "/run/bin"
		if err := build(ctx, w.bin+"/", "./cmd/..."); err != nil {
			return nil, err
		}
	}
	if w.trivial == "" {
		w.trivial = "/run/trivial"
		if err := build(ctx, w.trivial, "./integration/bench/trivial"); err != nil {
			return nil, err
		}
	}
	var err error
	if w.kernel, err = kernel.Find("", o.kernels); err != nil {
		return nil, err
	}
	image, err := smallImage()
	if err != nil {
		return nil, err
	}
	if _, err := w.clawvm(ctx, "image", "import", image, "small"); err != nil {
		return nil, err
	}
	return w, os.Symlink(filepath.Join(o.kernels, "kernels"), filepath.Join(w.root, "var/lib/clawvm/store/kernels"))
}

// build builds as the Makefile does.
func build(ctx context.Context, to, what string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", to, what)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot build %s: %w\n%s", what, err, out)
	}
	return nil
}

// uplink gives the namespace a default route, which leads nowhere. The address
// is documentation's (RFC 5737).
func uplink() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "uplink"}, PeerName: "nowhere"}
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkAdd(link)); err != nil {
		return err
	}
	address, err := netlink.ParseAddr("203.0.113.2/24")
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.AddrAdd(link, address), netlink.LinkSetUp(link)); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IPv4(203, 0, 113, 1)})
}

// smallImage makes a root file system with nothing but busybox in it.
func smallImage() (string, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return "", fmt.Errorf("the guest is made of busybox-static: %w", err)
	}
	const dir = "/run/image"
	for _, d := range []string{"bin", "etc", "usr", "proc", "sys", "dev", "run", "tmp", "var"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return "", err
		}
	}
	raw, err := os.ReadFile(busybox)
	if err != nil {
		return "", err
	}
	for name, text := range map[string]string{"etc/passwd": "nobody:x:65534:65534:nobody:/:/bin/sh\n", "etc/group": "nogroup:x:65534:\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	return dir, errors.Join(os.WriteFile(filepath.Join(dir, "bin/busybox"), raw, 0o755), os.Symlink("busybox", filepath.Join(dir, "bin/sleep")))
}

// clawvm runs the program on the world's root and returns what it printed.
func (w *world) clawvm(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(w.bin, "clawvm"), append([]string{"--root", w.root}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("clawvm %q: %w\n%s", args, err, stderr.String())
	}
	return stdout.String(), nil
}

// declare writes the declaration of a VM that is ready when its workload runs.
func (w *world) declare(name, vmm string) error {
	dir := filepath.Join(w.root, "etc/clawvm/vms")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("image: small\nvmm: %s\nvcpus: 1\nmemory: 256MiB\noverlay: {tmpfs: 32MiB}\nrun:\n  argv: [sleep, \"1000000\"]\n", vmm)
	return os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(text), 0o644)
}
