package openclaw

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// shortest is what `openclaw security audit` wants of a token.
const shortest = 24

// placeholders are what examples have where a secret should be. The gateway refuses some of them, and takes others.
var placeholders = []string{"changeme", "change-me", "replace", "your-", "your_", "example", "placeholder", "secret", "password", "token", "undefined", "null", "xxx", "todo", "<"}

// Lint names what is weak in a profile that works: what its Config opens or gives away. It never repeats a secret.
func Lint(p Profile) []string {
	var all []string
	warn := func(path, what string) { all = append(all, "openclaw.config."+path+" "+what) }
	for _, key := range []string{"token", "password"} {
		if literal, ok := text(p.Config, "gateway", "auth", key); ok {
			warn("gateway.auth."+key, literalSecret(literal))
		}
	}
	if mode, ok := text(p.Config, "gateway", "auth", "mode"); ok && mode != p.Auth.Mode {
		warn("gateway.auth.mode", fmt.Sprintf("is %q, beside auth.mode, which is %q", mode, p.Auth.Mode))
	}
	if bind, ok := text(p.Config, "gateway", "bind"); ok && bind == "loopback" {
		warn("gateway.bind", "is loopback, which neither a published port nor readiness reaches")
	}
	if on, ok := lookup(p.Config, "gateway", "nodes", "pairing", "autoApproveLocal"); ok && on == true {
		warn("gateway.nodes.pairing.autoApproveLocal", "is true: whoever connects from within the VM is paired without being asked for")
	}
	if literal, ok := text(p.Config, "channels", "telegram", "botToken"); ok {
		warn("channels.telegram.botToken", literalSecret(literal))
	}
	if policy, ok := text(p.Config, "channels", "telegram", "dmPolicy"); ok && policy == "open" {
		warn("channels.telegram.dmPolicy", "is open: everybody on Telegram may give the agent orders")
	}
	if from, ok := lookup(p.Config, "channels", "telegram", "allowFrom"); ok && strings.Contains(fmt.Sprint(from), "*") {
		warn("channels.telegram.allowFrom", "has *: everybody on Telegram may give the agent orders")
	}
	if providers, ok := lookup(p.Config, "models", "providers"); ok {
		providers, _ := providers.(map[string]any)
		for _, id := range slices.Sorted(maps.Keys(providers)) {
			if literal, ok := text(providers, id, "apiKey"); ok {
				warn("models.providers."+id+".apiKey", literalSecret(literal))
			}
		}
	}
	dangerous(p.Config, "", warn)
	if provider, _, ok := strings.Cut(p.Model, "/"); ok && !hasProvider(p, provider) {
		all = append(all, fmt.Sprintf("openclaw.model is of %s, and openclaw.providers has no key for it: right only where it needs none", provider))
	}
	for _, id := range slices.Sorted(maps.Keys(p.Providers)) {
		if _, ok := lookup(p.Config, "models", "providers", id, "baseUrl"); bundled[id] == "" && !ok {
			all = append(all, fmt.Sprintf("openclaw.providers.%s isn't one that the gateway brings, and openclaw.config.models.providers.%s has no baseUrl and api for it", id, id))
		}
	}
	return all
}

// literalSecret says what is wrong with a secret that stands in the configuration.
func literalSecret(literal string) string {
	const cure = "; name a secret of the declaration instead"
	lower := strings.ToLower(strings.TrimSpace(literal))
	switch {
	case lower == "":
		return "is empty" + cure
	case strings.HasPrefix(lower, "/"):
		return "is a path, and the path itself would be the secret" + cure
	case strings.HasPrefix(lower, "${") && strings.HasSuffix(lower, "}"):
		return "is a variable of the environment, which the agent's commands can read" + cure
	case slices.ContainsFunc(placeholders, func(p string) bool { return strings.HasPrefix(lower, p) }):
		return "looks like a placeholder" + cure
	case len(lower) < shortest:
		return fmt.Sprintf("stands in the configuration, which is no secret, and has fewer than %d characters", shortest) + cure
	}
	return "stands in the configuration, which is no secret" + cure
}

// dangerous finds the switches that the gateway itself calls so.
func dangerous(m map[string]any, path string, warn func(path, what string)) {
	for _, key := range slices.Sorted(maps.Keys(m)) {
		switch value := m[key].(type) {
		case map[string]any:
			dangerous(value, path+key+".", warn)
		case bool:
			if value && (strings.HasPrefix(key, "dangerously") || strings.HasPrefix(key, "allowInsecure")) {
				warn(path+key, "is true, which switches a protection off")
			}
		}
	}
}

func hasProvider(p Profile, id string) bool {
	if _, ok := p.Providers[id]; ok {
		return true
	}
	_, ok := lookup(p.Config, "models", "providers", id)
	return ok
}

func text(m map[string]any, keys ...string) (string, bool) {
	value, ok := lookup(m, keys...)
	if !ok {
		return "", false
	}
	s, ok := value.(string)
	return s, ok
}
