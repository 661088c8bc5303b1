package config

import (
	"fmt"
	"slices"
	"strings"
)

// crossCheck looks at what concerns more than one field.
func (d *decoder) crossCheck(vm *VM, root place) {
	if _, ok := d.places["image"]; !ok {
		d.fail(root, "image", "is missing", "the name of an image in the store, or sha256: and its 64 hex digits (clawvm image ls)")
	}
	if vm.Overlay.Tmpfs > vm.Memory {
		d.failAt("overlay.tmpfs", fmt.Sprintf("%s is more than the VM's memory, %s", vm.Overlay.Tmpfs, vm.Memory), "less, or {size: …} for a disk")
	}
	if vm.Run != nil && vm.OpenClaw != nil {
		d.failAt("openclaw", "is there beside run", "one of the two")
	}
	d.fillHealth(vm)
	if vm.NoGateway && len(vm.Ports) > 0 {
		d.failAt("ports", "are published, and with gateway: none the guest has no way to answer", "no ports, or a gateway and egress: {mode: none}")
	}
	d.checkMounts(vm)
	if vm.OpenClaw != nil {
		d.checkOpenClaw(vm)
	}
}

func (d *decoder) failAt(path, wrong, want string) {
	d.fail(d.places[path], path, wrong, want)
}

func (d *decoder) checkMounts(vm *VM) {
	names, mounts := map[string]string{}, map[string]string{}
	once := func(seen map[string]string, value, path, what string) {
		if value == "" {
			return // reported already
		}
		if before, ok := seen[value]; ok {
			d.failAt(path, fmt.Sprintf("%s is %s of %s already", quoted(value), what, before), "another")
			return
		}
		seen[value] = path[:strings.IndexByte(path, ']')+1]
	}
	for i, v := range vm.Volumes {
		once(names, v.Name, fmt.Sprintf("volumes[%d].name", i), "the name")
		once(mounts, v.Mount, fmt.Sprintf("volumes[%d].mount", i), "the mount")
	}
	for i, s := range vm.Shares {
		once(mounts, s.Mount, fmt.Sprintf("shares[%d].mount", i), "the mount")
	}
	if n := len(vm.Volumes) + len(vm.Shares); n > maxMounts {
		path := "volumes"
		if len(vm.Shares) > len(vm.Volumes) {
			path = "shares"
		}
		d.failAt(path, fmt.Sprintf("volumes and shares are %d", n), fmt.Sprintf("%d at most, as each takes a PCI slot of the VM", maxMounts))
	}
}

func (d *decoder) checkOpenClaw(vm *VM) {
	o := vm.OpenClaw
	if vm.Memory < minMemoryOpenClaw {
		d.failAt("memory", fmt.Sprintf("%s is too small: the gateway is killed at its first message", vm.Memory), "at least "+Size(minMemoryOpenClaw).String()+" with openclaw")
	}
	d.checkReference(vm, "openclaw.auth.tokenFile", o.Auth.TokenFile, "{generate: 32}")
	if o.Telegram != nil {
		d.checkReference(vm, "openclaw.telegram.tokenFile", o.Telegram.TokenFile, "{file: PATH}")
	}
	for id, p := range o.Providers {
		d.checkReference(vm, "openclaw.providers."+id+".keyFile", p.KeyFile, "{file: PATH}")
	}
	for _, key := range []string{"token", "password"} {
		value, _ := lookup(o.Config, "gateway", "auth", key).(string)
		if strings.HasPrefix(value, "/") {
			d.failAt("openclaw.config.gateway.auth."+key, "is the path of a file, which would itself be the "+key, "openclaw.auth.tokenFile with the name of a secret")
		}
	}
}

// checkReference looks that a secret that the gateway reads is declared, and is one that it accepts: it refuses files that are
// another user's or that others may read.
func (d *decoder) checkReference(vm *VM, path, name, source string) {
	if name == "" {
		return // reported already
	}
	at, ok := d.places[path]
	if !ok { // a default of openclaw
		at = d.places["openclaw"]
	}
	i := slices.IndexFunc(vm.Secrets, func(s Secret) bool { return s.Name == name })
	if i < 0 {
		names := make([]string, len(vm.Secrets))
		for i, s := range vm.Secrets {
			names[i] = s.Name
		}
		want := "it declared: secrets: {" + name + ": " + source + "}"
		if meant := nearest(name, names); meant != "" {
			want = meant + ", most likely"
		}
		d.fail(at, path, "there is no secret "+name, want)
		return
	}
	s := vm.Secrets[i]
	if s.Owner != "" && s.Owner != openClawUser && s.Owner != openClawUID {
		d.fail(at, path, fmt.Sprintf("the secret %s belongs to %s, and the gateway refuses what isn't its own", name, s.Owner), "no owner for it, which means the gateway's user")
	}
	if s.Mode&0o077 != 0 {
		d.fail(at, path, fmt.Sprintf("the secret %s has the mode %04o, and the gateway refuses what others may read", name, s.Mode), "no mode for it, which means 0400")
	}
}

// The user that the gateway's image runs it as.
const (
	openClawUser = "openclaw"
	openClawUID  = "20001"
)

func lookup(m map[string]any, keys ...string) any {
	var value any = m
	for _, key := range keys {
		inner, ok := value.(map[string]any)
		if !ok {
			return nil
		}
		value = inner[key]
	}
	return value
}
