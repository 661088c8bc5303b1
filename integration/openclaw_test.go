package integration

import (
	"maps"
	"slices"
	"testing"

	"github.com/clawvm/clawvm/guest/openclaw"
	"github.com/clawvm/clawvm/storage/recipe"
)

// TestImageIsWarmedAsTheGatewayRuns holds the two sides together that know nothing
// of each other: the recipe that warms node's compile cache, and the profile that
// the gateway runs with. Another environment would be another cache.
func TestImageIsWarmedAsTheGatewayRuns(t *testing.T) {
	r, err := recipe.Builtin("openclaw")
	if err != nil {
		t.Fatal(err)
	}
	profile := openclaw.Environment()
	for _, name := range sortedKeys(profile) {
		if got, ok := r.Environment[name]; !ok || got != profile[name] {
			t.Errorf("%s is %q when the image is built, and %q in the guest", name, got, profile[name])
		}
	}
	for _, u := range r.Users {
		if u.Name == openclaw.User && u.UID == openclaw.UID && u.Home == openclaw.StateDir {
			return
		}
	}
	t.Errorf("the image has no user %s (%d) with the home %s: %+v", openclaw.User, openclaw.UID, openclaw.StateDir, r.Users)
}

func sortedKeys(m map[string]string) []string {
	return slices.Sorted(maps.Keys(m))
}
