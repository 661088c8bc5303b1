package integration

import (
	"testing"

	shared "github.com/clawvm/clawvm/integration/world"
)

func TestMain(m *testing.M) { shared.Main(m) }
