// Package openclaw is the workload profile of the OpenClaw gateway: from the few things that a declaration says about it to the
// command, environment and configuration that the guest needs. It is pure.
//
// The spelling is that of openclaw 2026.9.6, the version that the bundled image pins; each setting was tried with it.
//
// # The compile cache
//
// Node keeps what it compiled in CompileCache, which the image's build fills by running the gateway once as UID with
// Environment. The launcher (openclaw.mjs) would rather have the cache in <dir>/openclaw/<version>/<mtime>-<size of its
// package.json>, and starts node a second time to get it there. That last component isn't known before the image is built,
// and it guards against an update in place, which an immutable image never has. So both sides use one fixed directory and tell the launcher,
// with OPENCLAW_PACKAGED_COMPILE_CACHE_RESPAWNED=1, that its second start has been. Node itself keys the entries by its
// version, architecture and uid, and checks each against its source, so that a stale one costs time and is never run.
package openclaw

import "maps"

// Where the image keeps things, and who runs them.
const (
	User         = "openclaw"
	UID          = 20001 // of User, and the gid of its group
	InstallDir   = "/opt/openclaw"
	Launcher     = InstallDir + "/node_modules/openclaw/openclaw.mjs"
	NodeBinary   = "/opt/node/bin/node"
	CompileCache = "/var/cache/openclaw/compile"
)

// Where the guest keeps things.
const (
	// StateDir is the user's home, and where a volume goes: it and what is under it must be UID's.
	StateDir   = "/var/lib/openclaw"
	ConfigPath = "/etc/openclaw/openclaw.json"
	SecretsDir = "/run/secrets"
)

// environment has each variable's reason beside it.
var environment = map[string]string{
	"HOME":    StateDir,
	"USER":    User,
	"LOGNAME": User,
	"SHELL":   "/bin/bash", // the agent's exec runs it; nologin would break every tool
	"PATH":    "/opt/node/bin:/usr/local/bin:/usr/bin:/bin",
	"LANG":    "C.UTF-8",

	"OPENCLAW_CONFIG_PATH":     ConfigPath,
	"OPENCLAW_STATE_DIR":       StateDir + "/state",
	"OPENCLAW_CONFIG_READONLY": "1",        // the configuration comes from the declaration alone
	"OPENCLAW_SUPERVISOR_MODE": "external", // no self-update, and no agent that "repairs" a failed start with model calls
	"OPENCLAW_NO_RESPAWN":      "1",        // the guest's init restarts it
	"OPENCLAW_NO_AUTO_UPDATE":  "1",
	"OPENCLAW_DISABLE_BONJOUR": "1",
	"OPENCLAW_OFFLINE":         "1",    // no download of helper programs
	"npm_config_offline":       "true", // no plugin is installed at start

	"NODE_COMPILE_CACHE":                        CompileCache,
	"OPENCLAW_PACKAGED_COMPILE_CACHE_RESPAWNED": "1", // see the package's comment
}

// Environment is what the gateway runs with, in the guest and when the image's build warms the compile cache. The caller owns the map.
func Environment() map[string]string { return maps.Clone(environment) }

// Command is what starts the gateway in the foreground. The caller owns the slice.
func Command() []string { return []string{NodeBinary, Launcher, "gateway", "run"} }
