package config

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Show writes the effective declaration as YAML that reads back as the same VM. With origins, each value has a comment that says
// where it came from: `default`, or file and line.
func (vm *VM) Show(w io.Writer, origins bool) error {
	s := shower{vm: vm, origins: origins}
	fmt.Fprintf(&s.out, "# %s, from %s\n", vm.Name, inComment(vm.File))
	s.mapping(vm.show(), "", 0)
	if _, err := io.WriteString(w, s.out.String()); err != nil {
		return fmt.Errorf("cannot print the declaration of %s: %w", vm.Name, err)
	}
	return nil
}

// pair is a key and what Show prints for it: a scalar, []any, []pair, or nil for nothing.
type pair struct {
	key   string
	value any
}

func (vm *VM) show() []pair {
	all := []pair{
		{"image", vm.Image}, {"vcpus", vm.VCPUs}, {"memory", vm.Memory.String()}, {"limits", vm.Limits.show()}, {"vmm", vm.VMM}, {"kernel", optional(vm.Kernel)},
		{"address", nil}, {"mac", optional(vm.MAC)}, {"tap", optional(vm.TAP)}, {"hostname", vm.Hostname}, {"gateway", nil},
		{"nameservers", listOf(vm.Nameservers)}, {"overlay", nil}, {"volumes", nil}, {"shares", nil}, {"secrets", nil},
		{"ports", nil}, {"egress", vm.Egress.show()}, {"restart", vm.Restart}, {"health", nil}, {"run", nil}, {"openclaw", nil},
	}
	set := func(key string, value any) {
		all[slices.IndexFunc(all, func(p pair) bool { return p.key == key })].value = value
	}
	if vm.Address.IsValid() {
		set("address", vm.Address.String())
	}
	if vm.NoGateway {
		set("gateway", "none")
	}
	if vm.Overlay.Tmpfs > 0 {
		set("overlay", []pair{{"tmpfs", vm.Overlay.Tmpfs.String()}})
	} else {
		set("overlay", []pair{{"size", vm.Overlay.Size.String()}})
	}
	if len(vm.Volumes) > 0 {
		set("volumes", apply(vm.Volumes, func(v Volume) any {
			return []pair{{"name", v.Name}, {"mount", v.Mount}, {"size", v.Size.String()}}
		}))
	}
	if len(vm.Shares) > 0 {
		set("shares", apply(vm.Shares, func(s Share) any {
			return []pair{{"source", s.Source}, {"mount", s.Mount}, {"readonly", s.ReadOnly}}
		}))
	}
	if len(vm.Secrets) > 0 {
		var secrets []pair
		for _, s := range vm.Secrets {
			secrets = append(secrets, pair{s.Name, s.show()})
		}
		set("secrets", secrets)
	}
	if len(vm.Ports) > 0 {
		set("ports", listOf(vm.Ports))
	}
	if vm.Health != nil {
		set("health", vm.Health.show())
	} else if vm.OpenClaw != nil {
		set("health", false)
	}
	if vm.Run != nil {
		set("run", vm.Run.show())
	}
	if vm.OpenClaw != nil {
		set("openclaw", vm.OpenClaw.show())
	}
	return all
}

func (s Secret) show() []pair {
	all := []pair{{"file", optional(s.File)}, {"credential", optional(s.Credential)}, {"generate", nil}, {"stdin", nil}, {"owner", optional(s.Owner)}, {"mode", fmt.Sprintf("%04o", s.Mode)}}
	if s.Generate > 0 {
		all[2].value = s.Generate
	}
	if s.Stdin {
		all[3].value = true
	}
	return all
}

func (r *Run) show() []pair {
	all := []pair{{"argv", apply(r.Argv, func(s string) any { return s })}}
	if len(r.Env) > 0 {
		var env []pair
		for _, name := range slices.Sorted(maps.Keys(r.Env)) {
			env = append(env, pair{name, r.Env[name]})
		}
		all = append(all, pair{"env", env})
	}
	all = append(all, pair{"user", r.User}, pair{"cwd", r.Cwd})
	ready := showCheck(r.Ready.TCP, r.Ready.HTTP, r.Ready.Exec)
	if r.Ready.Timeout > 0 {
		ready = append(ready, pair{"timeout", r.Ready.Timeout.String()})
	}
	if len(ready) > 0 {
		all = append(all, pair{"ready", ready})
	}
	all = append(all, pair{"stop", []pair{{"signal", r.Stop.Signal}, {"timeout", r.Stop.Timeout.String()}}})
	if len(r.NoRestart) > 0 {
		all = append(all, pair{"noRestart", apply(r.NoRestart, func(i int) any { return i })})
	}
	return all
}

func showCheck(tcp int, http *HTTPReady, exec []string) []pair {
	switch {
	case tcp > 0:
		return []pair{{"tcp", tcp}}
	case http != nil:
		return []pair{{"http", []pair{{"port", http.Port}, {"path", http.Path}, {"status", http.Status}}}}
	case len(exec) > 0:
		return []pair{{"exec", apply(exec, func(s string) any { return s })}}
	}
	return nil
}

func (o *OpenClaw) show() []pair {
	all := []pair{
		{"model", optional(o.Model)}, {"port", o.Port},
		{"auth", []pair{{"mode", o.Auth.Mode}, {"tokenFile", o.Auth.TokenFile}}},
	}
	if t := o.Telegram; t != nil {
		all = append(all, pair{"telegram", []pair{{"tokenFile", t.TokenFile}, {"allowFrom", apply(t.AllowFrom, func(s string) any { return s })}}})
	}
	if len(o.Providers) > 0 {
		var providers []pair
		for _, id := range slices.Sorted(maps.Keys(o.Providers)) {
			providers = append(providers, pair{id, []pair{{"keyFile", o.Providers[id].KeyFile}}})
		}
		all = append(all, pair{"providers", providers})
	}
	if len(o.Config) > 0 {
		all = append(all, pair{"config", free(o.Config)})
	}
	return all
}

// free brings what the declaration gives without a schema into what Show prints.
func free(value any) any {
	switch value := value.(type) {
	case map[string]any:
		pairs := []pair{}
		for _, key := range slices.Sorted(maps.Keys(value)) {
			pairs = append(pairs, pair{key, free(value[key])})
		}
		return pairs
	case []any:
		return apply(value, free)
	case nil:
		return empty{}
	default:
		return value
	}
}

// empty is a null that is shown.
type empty struct{}

func optional(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func listOf[T fmt.Stringer](in []T) []any {
	return apply(in, func(t T) any { return t.String() })
}

func apply[T any](in []T, f func(T) any) []any {
	out := make([]any, len(in))
	for i, v := range in {
		out[i] = f(v)
	}
	return out
}

type shower struct {
	vm      *VM
	origins bool
	out     strings.Builder
}

func (s *shower) mapping(pairs []pair, path string, indent int) {
	for _, p := range pairs {
		if p.value != nil {
			s.out.WriteString(strings.Repeat("  ", indent))
			s.pair(p, path, indent)
		}
	}
}

func (s *shower) pair(p pair, path string, indent int) {
	s.out.WriteString(scalar(p.key) + ":")
	s.value(p.value, join(path, p.key), indent+1)
}

// value prints what follows a key's colon or an item's dash.
func (s *shower) value(value any, path string, indent int) {
	switch value := value.(type) {
	case []pair:
		if len(value) == 0 {
			s.line(" {}", path)
			return
		}
		s.out.WriteByte('\n')
		s.mapping(value, path, indent)
	case []any:
		if flat, ok := flow(value); ok {
			s.line(" "+flat, path)
			return
		}
		s.out.WriteByte('\n')
		for i, item := range value {
			s.out.WriteString(strings.Repeat("  ", indent) + "-")
			where := fmt.Sprintf("%s[%d]", path, i)
			if pairs, ok := item.([]pair); ok && len(pairs) > 0 { // its first key stands beside the dash
				s.out.WriteByte(' ')
				s.pair(pairs[0], where, indent+1)
				s.mapping(pairs[1:], where, indent+1)
				continue
			}
			s.value(item, where, indent+1)
		}
	default:
		s.line(" "+scalar(value), path)
	}
}

func (s *shower) line(text, path string) {
	s.out.WriteString(text)
	if s.origins {
		if at, ok := s.vm.places[path]; ok {
			fmt.Fprintf(&s.out, " # %s:%d", inComment(at.file), at.line)
		} else {
			s.out.WriteString(" # default")
		}
	}
	s.out.WriteByte('\n')
}

// inComment keeps a file's name from ending the comment that it stands in.
func inComment(file string) string {
	if unprintable(file) {
		return strconv.QuoteToASCII(file)
	}
	return file
}

// flow prints a list of scalars in one line.
func flow(items []any) (string, bool) {
	texts := make([]string, len(items))
	for i, item := range items {
		switch item.(type) {
		case []pair, []any:
			return "", false
		}
		texts[i] = scalar(item)
	}
	return "[" + strings.Join(texts, ", ") + "]", true
}

// plain are texts that YAML takes for text without quotes, wherever they stand: names and paths, sizes, durations, addresses.
var plain = regexp.MustCompile(`^([A-Za-z_/][A-Za-z0-9_./@-]*|[0-9]+[KMGT]i?B|([0-9]+[hms])+|[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+)$`)

// words are what some reader of YAML takes for something else.
var words = []string{"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf"}

func scalar(value any) string {
	switch value := value.(type) {
	case string:
		if plain.MatchString(value) && !slices.Contains(words, strings.ToLower(value)) {
			return value
		}
		var b strings.Builder
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		if err := e.Encode(value); err != nil {
			return strconv.QuoteToASCII(value)
		}
		return strings.ReplaceAll(strings.TrimSuffix(b.String(), "\n"), "\u007f", `\u007f`)
	case float64:
		text := strconv.FormatFloat(value, 'g', -1, 64)
		if value == math.Trunc(value) && !strings.ContainsAny(text, ".e") {
			text += ".0"
		}
		return text
	case empty:
		return "null"
	default:
		return fmt.Sprint(value)
	}
}
