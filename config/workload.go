package config

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// signals that a workload may be asked to end by.
var signals = []string{"TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "WINCH", "KILL"}

func (d *decoder) run(n *node, path string) *Run {
	r := &Run{User: DefaultUser, Cwd: "/", Stop: Stop{Signal: DefaultStopSignal, Timeout: DefaultStopTimeout}}
	d.fields(n, path,
		field{"argv", func(n *node, p string) { r.Argv = d.argv(n, p) }},
		field{"env", func(n *node, p string) { r.Env = d.env(n, p) }},
		field{"user", func(n *node, p string) {
			u, ok := d.name(n, p, "the name of a user of the image, or a uid")
			if wrong, want := checkUser(u); ok && d.check(n, p, wrong, want) {
				r.User = u
			}
		}},
		field{"cwd", func(n *node, p string) {
			const want = "an absolute path in the guest"
			s, ok := d.text(n, p, want)
			if ok && (!strings.HasPrefix(s, "/") || unprintable(s)) {
				d.fail(n.place, p, quoted(s)+" isn't an absolute path", want)
			}
			r.Cwd = s
		}},
		field{"ready", func(n *node, p string) { r.Ready = d.ready(n, p) }},
		field{"stop", func(n *node, p string) {
			d.fields(n, p,
				field{"signal", func(n *node, p string) {
					bare := *n
					bare.text = strings.TrimPrefix(n.text, "SIG")
					if s, ok := d.oneOf(&bare, p, signals...); ok {
						r.Stop.Signal = s
					}
				}},
				field{"timeout", func(n *node, p string) { r.Stop.Timeout = d.duration(n, p) }},
			)
		}},
		field{"noRestart", func(n *node, p string) {
			d.items(n, p, "a list of exit codes", func(n *node, p string) {
				i, ok := d.integer(n, p, 0, 255)
				if ok && slices.Contains(r.NoRestart, int(i)) {
					d.fail(n.place, p, fmt.Sprintf("%d is there twice", i), "it once")
				}
				r.NoRestart = append(r.NoRestart, int(i))
			})
		}},
	)
	d.require(n, path, "argv")
	return r
}

func (d *decoder) argv(n *node, path string) []string {
	const want = "a list of texts: the program, then its arguments"
	all := d.strings(n, path, want, func(s string) (string, string) {
		if strings.ContainsRune(s, 0) {
			return "has a zero byte, which no argument can hold", "text"
		}
		return "", ""
	})
	if n.kind == list && (len(n.items) == 0 || n.items[0].kind == text && n.items[0].text == "") {
		d.fail(n.place, path, "names no program", want)
	}
	return all
}

func (d *decoder) env(n *node, path string) map[string]string {
	env := map[string]string{}
	d.each(n, path, "a mapping of variables to texts", func(name string, at place, n *node, p string) {
		if !variablePattern.MatchString(name) {
			d.fail(at, p, quoted(name)+" is no name for a variable", "letters, digits and _, a digit not first")
			return
		}
		switch n.kind {
		case text, integer, float: // as written: 1.10 stays 1.10
			if strings.ContainsRune(n.text, 0) {
				d.fail(n.place, p, "has a zero byte, which no variable can hold", "text")
			}
			env[name] = n.text
		case boolean:
			d.fail(n.place, p, n.describe(), "text: "+quoted(n.text))
		default:
			d.fail(n.place, p, n.describe(), "text")
		}
	})
	if len(env) == 0 {
		return nil
	}
	return env
}

func (d *decoder) ready(n *node, path string) Ready {
	var limit time.Duration
	r := d.look(n, path, "; with none it is ready once started", field{"timeout", func(n *node, p string) { limit = d.duration(n, p) }})
	r.Timeout = limit
	return r
}

// look reads a mapping with one of tcp, http and exec, and more fields; with says
// what it is with none of the three.
func (d *decoder) look(n *node, path, with string, more ...field) Ready {
	var r Ready
	kinds := []string{"tcp", "http", "exec"}
	read := d.fields(n, path, append([]field{
		{"tcp", func(n *node, p string) { r.TCP = d.port(n, p) }},
		{"http", func(n *node, p string) {
			h := &HTTPReady{Path: "/", Status: 200}
			d.fields(n, p,
				field{"port", func(n *node, p string) { h.Port = d.port(n, p) }},
				field{"path", func(n *node, p string) {
					const want = "a path such as /healthz"
					s, ok := d.text(n, p, want)
					if ok && (!strings.HasPrefix(s, "/") || len(s) > 1024 || unprintable(s) || strings.ContainsAny(s, " #")) {
						d.fail(n.place, p, quoted(s)+" is no path of a URL", want)
					}
					h.Path = s
				}},
				field{"status", func(n *node, p string) {
					if i, ok := d.integer(n, p, 100, 599); ok {
						h.Status = int(i)
					}
				}},
			)
			d.require(n, p, "port")
			r.HTTP = h
		}},
		{"exec", func(n *node, p string) { r.Exec = d.argv(n, p) }},
	}, more...)...)
	there := 0
	for _, k := range kinds {
		if n.get(k) != nil {
			there++
		}
	}
	if read && there > 1 {
		d.fail(n.place, path, howMany(n, kinds...), "one of "+strings.Join(kinds, ", ")+with)
	}
	return r
}

func (d *decoder) port(n *node, path string) int {
	i, _ := d.integer(n, path, 1, 65535)
	return int(i)
}

func (d *decoder) openClaw(n *node, path string) *OpenClaw {
	o := &OpenClaw{Port: DefaultPort, Auth: OpenClawAuth{Mode: AuthToken, TokenFile: DefaultTokenSecret}}
	d.fields(n, path,
		field{"model", func(n *node, p string) {
			const want = "provider/model, such as openrouter/moonshotai/kimi-k2.5"
			s, ok := d.text(n, p, want)
			if ok && !modelPattern.MatchString(s) {
				d.fail(n.place, p, quoted(s)+" is no model", want)
			}
			o.Model = s
		}},
		field{"port", func(n *node, p string) {
			if i, ok := d.integer(n, p, 1024, 65535); ok { // the gateway has no capability for those below
				o.Port = int(i)
			}
		}},
		field{"auth", func(n *node, p string) {
			d.fields(n, p,
				field{"mode", func(n *node, p string) {
					if s, ok := d.oneOf(n, p, AuthToken, AuthPassword); ok {
						o.Auth.Mode = s
					}
				}},
				field{"tokenFile", func(n *node, p string) { o.Auth.TokenFile = d.secretName(n, p) }},
			)
		}},
		field{"telegram", func(n *node, p string) {
			t := &OpenClawTelegram{}
			d.fields(n, p,
				field{"tokenFile", func(n *node, p string) { t.TokenFile = d.secretName(n, p) }},
				field{"allowFrom", func(n *node, p string) { t.AllowFrom = d.telegramUsers(n, p) }},
			)
			d.require(n, p, "tokenFile", "allowFrom")
			o.Telegram = t
		}},
		field{"providers", func(n *node, p string) {
			if len(n.entries) > 0 {
				o.Providers = map[string]OpenClawProvider{}
			}
			d.each(n, p, "a mapping of providers, such as {openrouter: {keyFile: openrouter-api-key}}", func(id string, at place, n *node, p string) {
				if !providerPattern.MatchString(id) {
					d.fail(at, p, quoted(id)+" is no provider", "its id, such as openrouter")
				}
				var one OpenClawProvider
				d.fields(n, p, field{"keyFile", func(n *node, p string) { one.KeyFile = d.secretName(n, p) }})
				d.require(n, p, "keyFile")
				o.Providers[id] = one
			})
		}},
		field{"config", func(n *node, p string) {
			if n.kind != mapping {
				d.fail(n.place, p, n.describe(), "a mapping: what is merged over the gateway's configuration")
				return
			}
			if len(n.entries) > 0 {
				o.Config, _ = d.any(n, p).(map[string]any)
			}
		}},
	)
	return o
}

// secretName reads the name of a secret, and refuses the path of one: written into the gateway's configuration, a path would
// itself be the token, and a known one.
func (d *decoder) secretName(n *node, path string) string {
	const want = "the name of a secret of this declaration"
	s, ok := d.name(n, path, want)
	switch {
	case !ok:
		return ""
	case strings.Contains(s, "/"):
		if base := s[strings.LastIndexByte(s, '/')+1:]; secretPattern.MatchString(base) {
			d.fail(n.place, path, quoted(s)+" is a path", "the name of the secret alone, such as "+base)
			return ""
		}
		d.fail(n.place, path, quoted(s)+" is a path", want)
		return ""
	case !secretPattern.MatchString(s) || len(s) > maxSecretName:
		d.fail(n.place, path, "isn't the name of a secret", want) // it may be the secret itself
		return ""
	}
	return s
}

func (d *decoder) telegramUsers(n *node, path string) []string {
	const want = `a list of the numbers of the users that may talk to it, such as ["429170020"]`
	var all []string
	d.items(n, path, want, func(n *node, p string) {
		s, ok := d.name(n, p, "the number of a user")
		switch {
		case !ok:
		case !telegramPattern.MatchString(s):
			d.fail(n.place, p, quoted(s)+" is no number of a Telegram user", "digits, such as 429170020")
		case slices.Contains(all, s):
			d.fail(n.place, p, s+" is there twice", "it once")
		default:
			all = append(all, s)
		}
	})
	if n.kind == list && len(n.items) == 0 {
		d.fail(n.place, path, "is empty, so nobody could talk to it", want)
	}
	return all
}

// any is a node as encoding/json has it, but for whole numbers, which stay whole.
func (d *decoder) any(n *node, path string) any {
	d.places[path] = n.place
	switch n.kind {
	case boolean, integer, float:
		return n.value
	case text:
		return n.text
	case list:
		all := make([]any, len(n.items))
		for i, item := range n.items {
			all[i] = d.any(item, fmt.Sprintf("%s[%d]", path, i))
		}
		return all
	case mapping:
		all := map[string]any{}
		for _, e := range n.entries {
			all[e.key] = d.any(e.value, join(path, e.key))
		}
		return all
	default:
		return nil
	}
}
