package openclaw

import (
	"encoding/json"
	"flag"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name string, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got, -update rewrites it):\n%s", file, diff)
	}
}

func least() Profile {
	return Profile{Port: 18789, Auth: Auth{Mode: "token", TokenFile: "gateway-token"}}
}

func full() Profile {
	return Profile{
		Model: "openrouter/moonshotai/kimi-k2.5", Port: 18790,
		Auth:     Auth{Mode: "password", TokenFile: "Gateway.Password"},
		Telegram: &Telegram{TokenFile: "telegram-bot-token", AllowFrom: []string{"429170020", "7"}},
		Providers: map[string]Provider{
			"openrouter": {KeyFile: "openrouter-api-key"}, "anthropic": {KeyFile: "anthropic-api-key"}, "google-vertex": {KeyFile: "vertex"},
		},
		Config: map[string]any{
			"gateway": map[string]any{"controlUi": map[string]any{"enabled": true}, "nodes": nil},
			"agents":  map[string]any{"defaults": map[string]any{"skipBootstrap": nil, "timeoutSeconds": int64(600)}},
			"plugins": map[string]any{"deny": []any{"codex"}},
			"new":     map[string]any{"a": nil, "b": "<&>"},
		},
	}
}

func TestRender(t *testing.T) {
	for name, p := range map[string]Profile{"least": least(), "full": full()} {
		w, err := p.Render()
		if err != nil {
			t.Fatal(err)
		}
		if len(w.Files) != 1 {
			t.Fatalf("%d files", len(w.Files))
		}
		golden(t, name+".json", string(w.Files[0].Content))
		w.Files[0].Content = nil
		rest, err := json.MarshalIndent(w, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name+".workload", string(rest)+"\n")
	}
}

func TestRenderLeavesTheProfileAlone(t *testing.T) {
	p := full()
	if _, err := p.Render(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(full(), p); diff != "" {
		t.Errorf("Render changed the profile:\n%s", diff)
	}
	Environment()["HOME"] = "/elsewhere"
	if Environment()["HOME"] != StateDir {
		t.Error("who changes the environment changes it for all")
	}
}

// A path where a token belongs is itself the token, and everybody knows it.
func TestNoPathIsASecret(t *testing.T) {
	for _, p := range []Profile{least(), full()} {
		w, err := p.Render()
		if err != nil {
			t.Fatal(err)
		}
		var config struct {
			Gateway struct {
				Auth map[string]any
			}
		}
		if err := json.Unmarshal(w.Files[0].Content, &config); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"token", "password"} {
			if s, ok := config.Gateway.Auth[key].(string); ok {
				t.Errorf("gateway.auth.%s is the text %q, want a reference", key, s)
			}
		}
		for name, value := range w.Env {
			if strings.Contains(value, SecretsDir) {
				t.Errorf("%s names a secret", name)
			}
		}
	}
}

func TestRenderErrors(t *testing.T) {
	for want, change := range map[string]func(*Profile){
		"the port is 0: one from 1 to 65535":                   func(p *Profile) { p.Port = 0 },
		`auth.mode is "none": token or password`:               func(p *Profile) { p.Auth.Mode = "none" },
		"gateway-auth has no name of a secret":                 func(p *Profile) { p.Auth.TokenFile = "/run/secrets/gateway-token" },
		"telegram.tokenFile has no name of a secret":           func(p *Profile) { p.Telegram = &Telegram{AllowFrom: []string{"1"}} },
		"telegram.allowFrom is empty: nobody could talk to it": func(p *Profile) { p.Telegram = &Telegram{TokenFile: "a"} },
		`"provider-A" is too long or odd for the gateway: lower-case letters, digits and -`: func(p *Profile) {
			p.Providers = map[string]Provider{"A": {KeyFile: "a"}}
		},
		"config.gateway.port isn't the port that readiness is asked at, 18789: declare openclaw.port instead": func(p *Profile) {
			p.Config = map[string]any{"gateway": map[string]any{"port": int64(1)}}
		},
		"it can't be written as JSON: json: unsupported value: NaN": func(p *Profile) { p.Config = map[string]any{"x": math.NaN()} },
	} {
		p := least()
		change(&p)
		_, err := p.Render()
		if err == nil {
			t.Errorf("is rendered, want: %s", want)
			continue
		}
		if got := strings.TrimPrefix(err.Error(), "cannot make the gateway's configuration: "); got != want {
			t.Errorf("the error is\n%s\nwant\n%s", got, want)
		}
	}
}

func TestSamePortInConfig(t *testing.T) {
	p := least()
	p.Config = map[string]any{"gateway": map[string]any{"port": int64(18789)}}
	if _, err := p.Render(); err != nil {
		t.Error(err)
	}
}

func TestLint(t *testing.T) {
	if warnings := Lint(least()); len(warnings) > 0 {
		t.Errorf("the least profile is weak: %v", warnings)
	}
	if warnings := Lint(full()); len(warnings) > 0 {
		t.Errorf("the full profile is weak: %v", warnings)
	}
	weak := least()
	weak.Model = "openrouter/x"
	weak.Providers = map[string]Provider{"own": {KeyFile: "own"}, "elsewhere": {KeyFile: "elsewhere"}}
	const literal = "0123456789abcdef0123456789abcdef"
	weak.Config = map[string]any{
		"gateway": map[string]any{
			"bind": "loopback", "auth": map[string]any{"mode": "none", "token": "/run/secrets/gateway-token", "password": "changeme"},
			"nodes":     map[string]any{"pairing": map[string]any{"autoApproveLocal": true}},
			"controlUi": map[string]any{"dangerouslyDisableDeviceAuth": true, "allowInsecureAuth": true, "dangerouslyNot": false},
		},
		"channels": map[string]any{"telegram": map[string]any{"botToken": "${TELEGRAM}", "dmPolicy": "open", "allowFrom": []any{"*"}}},
		"models":   map[string]any{"providers": map[string]any{"a": map[string]any{"apiKey": literal}, "b": map[string]any{"apiKey": "short"}, "c": map[string]any{"apiKey": " "}, "own": map[string]any{"baseUrl": "http://192.168.83.1:8080/v1"}}},
	}
	got := strings.Join(Lint(weak), "\n") + "\n"
	if strings.Contains(got, literal) || strings.Contains(got, "changeme") {
		t.Errorf("a secret is repeated: %s", got)
	}
	golden(t, "weak.lint", got)
}
