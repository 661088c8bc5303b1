package recipe

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMmdebstrapArguments(t *testing.T) {
	for _, name := range []string{"tiny", "openclaw"} {
		r, err := Builtin(name)
		if err != nil {
			t.Fatal(err)
		}
		sources := mirrors("bookworm|main|Debian||https://mirror.example/debian/\n", "bookworm", r.Debian.Suite)
		golden(t, "mmdebstrap-"+name+".txt", strings.Join(mmdebstrapArgs(r.Debian, sources), "\n")+"\n")
	}
}

func TestMirrors(t *testing.T) {
	const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	cases := []struct {
		name    string
		targets []string
		suite   string
		want    []source
	}{
		{"nothing known", nil, "trixie", nil},
		{"the host's own, before its first update", []string{
			"bookworm|main|$(ORIGIN)|" + keyring + "|http://mirror.example/debian/",
			"bookworm-updates|main|$(ORIGIN)|" + keyring + "|http://mirror.example/debian/",
			"bookworm-security|main|$(ORIGIN)|" + keyring + "|http://security.example/debian-security/",
		}, "trixie", []source{
			{"http://mirror.example/debian", "trixie", "main"},
			{"http://mirror.example/debian", "trixie-updates", "main"},
			{"http://security.example/debian-security", "trixie-security", "main"},
		}},
		{"others that use the codename", []string{
			"bookworm|stable|Docker|$(SIGNED_BY)|https://docker.example/linux/debian/",
			"bookworm|main|Somebody|$(SIGNED_BY)|https://somebody.example/debian/",
			"bookworm|main|Debian|/etc/apt/keyrings/other.gpg|https://other.example/debian/",
			"bookworm-pgdg|main|PGDG|$(SIGNED_BY)|https://pg.example/debian/",
		}, "trixie", nil},
		{"a password in the address stays on the host", []string{
			"bookworm|main|Debian|$(SIGNED_BY)|https://user:secret@mirror.example/debian/",
		}, "trixie", nil},
		{"local and special methods", []string{
			"bookworm|main|Debian|$(SIGNED_BY)|mirror+file:/etc/apt/mirrors.list",
			"bookworm|main|Debian|$(SIGNED_BY)|cdrom://debian/",
		}, "trixie", nil},
		{"a suite without updates", []string{
			"bookworm|main|Debian|$(SIGNED_BY)|http://mirror.example/debian/",
		}, "sid", []source{{"http://mirror.example/debian", "sid", "main"}}},
	}
	for _, c := range cases {
		got := mirrors(strings.Join(c.targets, "\n"), "bookworm", c.suite)
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

func TestDebianCodename(t *testing.T) {
	for _, c := range []struct{ release, want string }{
		{"PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nVERSION_CODENAME=trixie\nID=debian\n", "trixie"},
		{"ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n", ""},
		{"ID=nixos\n", ""},
		{"", ""},
	} {
		if got := debianCodename(c.release); got != c.want {
			t.Errorf("codename in %q is %q, want %q", c.release, got, c.want)
		}
	}
}
