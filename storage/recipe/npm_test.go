package recipe

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRegistrySettings(t *testing.T) {
	t.Setenv("REGISTRY_LOGIN", "from-the-environment")
	kept, certificates := registrySettings(`; a comment
# registry=https://commented.example/
registry = https://registry.example/npm/
@ours:registry=https://ours.example/
//ours.example/:_authToken=${REGISTRY_LOGIN}
//other.example/:_authToken=${NOT_SET_ANYWHERE}
https-proxy=http://proxy.example:3128
cafile="/etc/ssl/ours.pem"
prefix=/home/someone/.npm
ignore-scripts=false
script-shell=/bin/evil
cache=/root/.npm
fund=false
no value
`)
	want := `registry=https://registry.example/npm/
@ours:registry=https://ours.example/
//ours.example/:_authToken=from-the-environment
//other.example/:_authToken=${NOT_SET_ANYWHERE}
https-proxy=http://proxy.example:3128
`
	if diff := cmp.Diff(want, kept); diff != "" {
		t.Errorf("kept (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"/etc/ssl/ours.pem"}, certificates); diff != "" {
		t.Errorf("certificates (-want +got):\n%s", diff)
	}
}

func TestCallersNPM(t *testing.T) {
	home := t.TempDir()
	certificate := filepath.Join(home, "ca.pem")
	for name, text := range map[string]string{
		filepath.Join(home, ".npmrc"): "registry=https://registry.example/\ncafile=" + certificate + "\n",
		certificate:                   "the certificate",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("HOME", home)
	t.Setenv("SUDO_USER", "")
	t.Setenv("NPM_CONFIG_USERCONFIG", "")
	t.Setenv("NPM_CONFIG_REGISTRY", "https://override.example/")
	t.Setenv("NODE_EXTRA_CA_CERTS", certificate)
	s, err := callersNPM()
	if err != nil {
		t.Fatal(err)
	}
	registries := registryKeyLines(s.config)
	registries = registries[max(0, len(registries)-2):] // this machine may have one of its own, before these
	if diff := cmp.Diff([]string{"https://registry.example/", "https://override.example/"}, registries); diff != "" {
		t.Errorf("registries, the last one counts (-want +got):\n%s", diff)
	}
	if n := strings.Count(s.certificates, "the certificate"); n != 1 {
		t.Errorf("the certificate is there %d times, want once", n)
	}
}

func TestRemoveOthers(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a-1.tar.zst", "a-2.tar.zst", "b-1.tar.zst"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeOthers(dir, "a-*.tar.zst", filepath.Join(dir, "a-2.tar.zst")); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{filepath.Join(dir, "a-2.tar.zst"), filepath.Join(dir, "b-1.tar.zst")}
	if diff := cmp.Diff(want, left); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}

func registryKeyLines(config string) []string {
	var values []string
	for line := range strings.Lines(config) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "registry="); ok {
			values = append(values, value)
		}
	}
	return values
}
