package config

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

func (d *decoder) overlay(n *node, path string) Overlay {
	var o Overlay
	read := d.fields(n, path,
		field{"size", func(n *node, p string) { o.Size = d.size(n, p, minDisk, maxDisk, diskBlock, "no file system fits") }},
		field{"tmpfs", func(n *node, p string) { o.Tmpfs = d.size(n, p, mebibyte, maxMemory, 1, "nothing fits") }},
	)
	if read && (n.get("size") == nil) == (n.get("tmpfs") == nil) {
		d.fail(n.place, path, howMany(n, "size", "tmpfs"), "one of the two: {size: 4GiB} is a disk that is kept, {tmpfs: 512MiB} forgets")
	}
	return o
}

// howMany says that none, or which, of some fields that exclude each other are there.
func howMany(n *node, names ...string) string {
	var there []string
	for _, name := range names {
		if n.get(name) != nil {
			there = append(there, name)
		}
	}
	if len(there) == 0 {
		return "has neither " + strings.Join(names, " nor ")
	}
	return "has " + strings.Join(there, " and ")
}

func (d *decoder) require(n *node, path string, names ...string) {
	for _, name := range names {
		if n.kind == mapping && n.get(name) == nil {
			d.fail(n.place, path, "has no "+name, name+": …")
		}
	}
}

func (d *decoder) mount(n *node, path string) string {
	s, ok := d.text(n, path, "an absolute path in the guest")
	if !ok {
		return ""
	}
	wrong, want := checkMount(s)
	d.check(n, path, wrong, want)
	return s
}

func (d *decoder) volume(n *node, path string) Volume {
	var v Volume
	d.fields(n, path,
		field{"name", func(n *node, p string) {
			want := fmt.Sprintf("a lower-case letter, then lower-case letters, digits and -, %d at most", maxVolumeName)
			s, ok := d.text(n, p, want)
			if ok && !volumePattern.MatchString(s) {
				d.fail(n.place, p, quoted(s)+" is no name for a volume", want)
			}
			v.Name = s
		}},
		field{"mount", func(n *node, p string) { v.Mount = d.mount(n, p) }},
		field{"size", func(n *node, p string) { v.Size = d.size(n, p, minDisk, maxDisk, diskBlock, "no file system fits") }},
	)
	d.require(n, path, "name", "mount", "size")
	return v
}

func (d *decoder) share(n *node, path string) Share {
	var s Share
	d.fields(n, path,
		field{"source", func(n *node, p string) {
			s.Source = d.hostPath(n, p)
			for _, root := range []string{"/proc", "/sys", "/dev"} {
				if s.Source == "/" || s.Source == root || strings.HasPrefix(s.Source, root+"/") {
					d.fail(n.place, p, quoted(s.Source)+" is the host itself", "a directory made for the VM")
					break
				}
			}
		}},
		field{"mount", func(n *node, p string) { s.Mount = d.mount(n, p) }},
		field{"readonly", func(n *node, p string) { s.ReadOnly = d.boolean(n, p) }},
	)
	d.require(n, path, "source", "mount")
	return s
}

func (d *decoder) secrets(n *node, path string) []Secret {
	var all []Secret
	const want = "a mapping of names to sources, such as {gateway-token: {generate: 32}}"
	d.each(n, path, want, func(name string, at place, n *node, p string) {
		if !secretPattern.MatchString(name) || len(name) > maxSecretName {
			d.fail(at, p, quoted(name)+" is no name for a secret", fmt.Sprintf("a letter or digit, then letters, digits, ., _ and -, %d at most", maxSecretName))
			return
		}
		all = append(all, d.secret(name, n, p))
	})
	if len(all) > maxSecrets {
		d.fail(n.place, path, fmt.Sprintf("are %d", len(all)), fmt.Sprintf("%d at most", maxSecrets))
	}
	slices.SortFunc(all, func(a, b Secret) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// credentialPattern is what people call credentials; systemd takes any printable text without a slash.
var credentialPattern = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9@._-]*$`)

func (d *decoder) secret(name string, n *node, path string) Secret {
	s := Secret{Name: name, Mode: DefaultSecretMode}
	sources := []string{"file", "credential", "generate", "stdin"}
	read := d.fields(n, path,
		field{"file", func(n *node, p string) { s.File = d.hostPath(n, p) }},
		field{"credential", func(n *node, p string) {
			want := fmt.Sprintf("the ID that the unit's LoadCredential= has: a letter, digit or _, then letters, digits, @, ., _ and -, %d at most", maxCredential)
			id, ok := d.name(n, p, want)
			if ok && (!credentialPattern.MatchString(id) || len(id) > maxCredential) {
				d.fail(n.place, p, quoted(id)+" is no ID of a credential", want)
			}
			s.Credential = id
		}},
		field{"generate", func(n *node, p string) {
			if i, ok := d.integer(n, p, minGenerate, maxGenerate); ok {
				s.Generate = int(i)
			}
		}},
		field{"stdin", func(n *node, p string) {
			if s.Stdin = d.boolean(n, p); !s.Stdin && n.kind == boolean {
				d.fail(n.place, p, "is false, which is no source", "true, or another source")
			}
		}},
		field{"owner", func(n *node, p string) {
			u, ok := d.name(n, p, "the name of a user of the image, or a uid")
			if wrong, want := checkUser(u); ok && d.check(n, p, wrong, want) {
				s.Owner = u
			}
		}},
		field{"mode", func(n *node, p string) {
			if m, ok := d.secretMode(n, p); ok {
				s.Mode = m
			}
		}},
	)
	there := 0
	for _, source := range sources {
		if n.get(source) != nil {
			there++
		}
	}
	if read && there != 1 {
		d.fail(n.place, path, howMany(n, sources...), "one source: {file: PATH}, {credential: ID}, {generate: 32} or {stdin: true}")
	}
	return s
}

// secretMode reads octal digits. Without a leading 0 they may be what another language made of them: 0400 is 256 there.
func (d *decoder) secretMode(n *node, path string) (uint32, bool) {
	const want = `octal digits with a leading 0: "0400", or "0440" or "0444" for more readers`
	if n.kind != text && n.kind != integer {
		d.fail(n.place, path, n.describe(), want)
		return 0, false
	}
	digits := strings.Replace(n.text, "0o", "0", 1)
	m, err := strconv.ParseUint(digits, 8, 32)
	switch {
	case err != nil || !strings.HasPrefix(digits, "0"):
		d.fail(n.place, path, quoted(n.text)+" is no mode", want)
	case m&0o400 == 0:
		d.fail(n.place, path, n.text+" keeps the secret from its owner", want)
	case m&^0o666 != 0:
		d.fail(n.place, path, n.text+" has more than reading and writing", want)
	default:
		return uint32(m), true
	}
	return 0, false
}
