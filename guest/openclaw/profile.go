package openclaw

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Profile is what a declaration says about the gateway. What its fields call a file is the name of a secret, which is a file in SecretsDir.
type Profile struct {
	Model     string // provider/model; empty: none
	Port      int
	Auth      Auth
	Telegram  *Telegram
	Providers map[string]Provider // by their id
	Config    map[string]any      // merged over all else: mappings deeply, null deletes, the rest replaces
}

// Auth is how clients prove themselves.
type Auth struct {
	Mode      string // "token" or "password"
	TokenFile string // the secret that holds the token or the password
}

// Telegram is the gateway's Telegram channel.
type Telegram struct {
	TokenFile string   // the secret that holds the bot's token
	AllowFrom []string // the numbers of the users that may talk to it
}

// Provider is a provider of models.
type Provider struct {
	KeyFile string // the secret that holds its API key
}

// Workload is what the guest needs to run the gateway.
type Workload struct {
	Argv      []string
	Env       map[string]string
	User      string
	Cwd       string
	Files     []File
	Ready     Ready
	Health    Ready  // what is asked after that: channels that don't work count, too
	NoRestart []int  // exit codes after which another start would end the same way
	StateDir  string // must be the user's before the start; a volume is best mounted there
}

// File is a file that has to be there before the start.
type File struct {
	Path     string
	Mode     uint32
	UID, GID int
	Content  []byte
}

// Ready is the HTTP GET that answers with the status 200 once the gateway has started.
type Ready struct {
	Port   int
	Path   string
	Status int
}

// exitConfig is the gateway's exit code for a configuration that it can't run with (EX_CONFIG).
const exitConfig = 78

// alias is what the gateway lets a provider of secrets be called.
var alias = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,63}$`)

// Render makes the workload. The error says which part of the profile can't be rendered; it never holds a value of Config.
func (p Profile) Render() (Workload, error) {
	config, err := p.config()
	if err != nil {
		return Workload{}, fmt.Errorf("cannot make the gateway's configuration: %w", err)
	}
	var content bytes.Buffer
	e := json.NewEncoder(&content)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(config); err != nil {
		return Workload{}, fmt.Errorf("cannot make the gateway's configuration: it can't be written as JSON: %w", err)
	}
	return Workload{
		Argv:      Command(),
		Env:       Environment(),
		User:      User,
		Cwd:       StateDir,
		Files:     []File{{Path: ConfigPath, Mode: 0o444, Content: content.Bytes()}},
		Ready:     Ready{Port: p.Port, Path: "/startupz", Status: 200}, // /readyz waits for channels, too, which may never come
		Health:    Ready{Port: p.Port, Path: "/readyz", Status: 200},
		NoRestart: []int{exitConfig},
		StateDir:  StateDir,
	}, nil
}

func (p Profile) config() (map[string]any, error) {
	if p.Port < 1 || p.Port > 65535 {
		return nil, fmt.Errorf("the port is %d: one from 1 to 65535", p.Port)
	}
	if p.Auth.Mode != "token" && p.Auth.Mode != "password" {
		return nil, fmt.Errorf("auth.mode is %q: token or password", p.Auth.Mode)
	}
	s := secretFiles{providers: map[string]any{}}
	config := map[string]any{
		"gateway": map[string]any{
			"mode": "local", "port": p.Port,
			// With loopback and a forwarder inside, every client would be local, and trusted as such.
			"bind":      "lan",
			"auth":      map[string]any{"mode": p.Auth.Mode, p.Auth.Mode: s.reference("gateway-auth", p.Auth.TokenFile)},
			"controlUi": map[string]any{"enabled": false},
			"nodes":     map[string]any{"pairing": map[string]any{"autoApproveLocal": false}},
		},
		"secrets":   map[string]any{"providers": s.providers},
		"plugins":   map[string]any{"allow": p.plugins(), "deny": []any{"codex", "perplexity"}}, // these two are otherwise fetched at start
		"update":    map[string]any{"checkOnStart": false},
		"logging":   map[string]any{"file": StateDir + "/logs/gateway.log"}, // the default is a shared directory in /tmp
		"commands":  map[string]any{"restart": false},
		"discovery": map[string]any{"mdns": map[string]any{"mode": "off"}},
	}
	defaults := map[string]any{"workspace": StateDir + "/workspace", "skipBootstrap": true}
	if p.Model != "" {
		defaults["model"] = map[string]any{"primary": p.Model}
	}
	config["agents"] = map[string]any{"defaults": defaults}

	models := map[string]any{"catalogRefresh": map[string]any{"enabled": false}}
	if len(p.Providers) > 0 {
		providers := map[string]any{}
		for _, id := range slices.Sorted(maps.Keys(p.Providers)) {
			providers[id] = map[string]any{"apiKey": s.reference("provider-"+id, p.Providers[id].KeyFile)}
		}
		models["providers"] = providers
	}
	config["models"] = models

	if t := p.Telegram; t != nil {
		if len(t.AllowFrom) == 0 {
			return nil, fmt.Errorf("telegram.allowFrom is empty: nobody could talk to it")
		}
		config["channels"] = map[string]any{"telegram": map[string]any{
			"enabled": true, "tokenFile": s.path("telegram.tokenFile", t.TokenFile),
			"dmPolicy": "allowlist", "allowFrom": t.AllowFrom, "configWrites": false,
		}}
	}
	if s.err != nil {
		return nil, s.err
	}
	merged := merge(config, p.Config)
	if port, ok := lookup(merged, "gateway", "port"); !ok || fmt.Sprint(port) != fmt.Sprint(p.Port) {
		return nil, fmt.Errorf("config.gateway.port isn't the port that readiness is asked at, %d: declare openclaw.port instead", p.Port)
	}
	return merged, nil
}

// plugins are the only ones that are loaded: what is declared, and the memory.
func (p Profile) plugins() []string {
	used := map[string]bool{"memory-core": true}
	if p.Telegram != nil {
		used["telegram"] = true
	}
	providers := slices.Collect(maps.Keys(p.Providers))
	if provider, _, ok := strings.Cut(p.Model, "/"); ok {
		providers = append(providers, provider)
	}
	for _, id := range providers {
		if plugin, ok := bundled[id]; ok { // another one has its address and protocol in Config, and no plugin
			used[plugin] = true
		}
	}
	return slices.Sorted(maps.Keys(used))
}

// secretFiles gathers the files that references point to.
type secretFiles struct {
	providers map[string]any
	err       error
}

// reference makes a SecretRef, with the provider that it needs. The path alone would be taken for the secret.
func (s *secretFiles) reference(name, secret string) map[string]any {
	if !alias.MatchString(name) && s.err == nil {
		s.err = fmt.Errorf("%q is too long or odd for the gateway: lower-case letters, digits and -", name)
	}
	s.providers[name] = map[string]any{"source": "file", "path": s.path(name, secret), "mode": "singleValue"}
	return map[string]any{"source": "file", "provider": name, "id": "value"}
}

func (s *secretFiles) path(what, secret string) string {
	if (secret == "" || strings.HasPrefix(secret, ".") || strings.ContainsAny(secret, "/\x00")) && s.err == nil {
		s.err = fmt.Errorf("%s has no name of a secret", what)
	}
	return path.Join(SecretsDir, secret)
}

// merge lays over upon under: mappings deeply, null deletes, anything else replaces. Neither is changed.
func merge(under, over map[string]any) map[string]any {
	out := maps.Clone(under)
	for key, value := range over {
		inner, isMap := value.(map[string]any)
		before, wasMap := out[key].(map[string]any)
		switch {
		case value == nil:
			delete(out, key)
		case isMap && wasMap:
			out[key] = merge(before, inner)
		case isMap:
			out[key] = merge(map[string]any{}, inner) // drops the nulls in it
		default:
			out[key] = value
		}
	}
	return out
}

func lookup(m map[string]any, keys ...string) (any, bool) {
	var value any = m
	for _, key := range keys {
		inner, ok := value.(map[string]any)
		if !ok {
			return nil, false
		}
		if value, ok = inner[key]; !ok {
			return nil, false
		}
	}
	return value, true
}
