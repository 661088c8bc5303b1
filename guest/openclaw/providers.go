package openclaw

// bundled are the model providers that the pinned openclaw brings a plugin for, with the plugin's name. (Read from the
// openclaw.plugin.json files below dist/extensions of its package.) What else is named in plugins.allow or needs a plugin, the
// gateway tries to install at its start, which takes half a minute and fails.
var bundled = map[string]string{
	"anthropic": "anthropic", "apple-fm": "apple-fm", "clawrouter": "clawrouter",
	"copilot-proxy": "copilot-proxy", "fal": "fal", "github-copilot": "github-copilot", "google": "google",
	"google-gemini-cli": "google", "google-vertex": "google", "huggingface": "huggingface", "litellm": "litellm",
	"lmstudio": "lmstudio", "microsoft-foundry": "microsoft-foundry", "minimax": "minimax",
	"minimax-portal": "minimax", "nvidia": "nvidia", "ollama": "ollama", "ollama-cloud": "ollama",
	"openai": "openai", "opencode-go": "opencode-go", "openrouter": "openrouter", "sglang": "sglang",
	"together": "together", "vllm": "vllm", "xai": "xai",
}
