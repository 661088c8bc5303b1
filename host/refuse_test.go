package host

import (
	"errors"
	"fmt"
	"testing"

	"github.com/clawvm/clawvm/config"
)

func TestCannotStart(t *testing.T) {
	typo := config.Problems{{File: "/x.yaml", Line: 1, Column: 1, Field: "memroy", Wrong: "there is no such field", Want: "memory"}}
	missing := errors.New("cannot use secret token: there is no such file")
	for _, c := range []struct {
		failed []stepError
		want   string
		code   int
	}{
		{[]stepError{{"declaration", coded(ExitDeclaration, typo)}}, "cannot start VM x: /x.yaml:1:1: memroy: there is no such field; want memory", ExitDeclaration},
		{[]stepError{{"secrets", coded(ExitDeclaration, missing)}}, "cannot start VM x: cannot use secret token: there is no such file", ExitDeclaration},
		{[]stepError{{"disks", errors.New("no space left on device")}}, "cannot start VM x: disks: no space left on device", ExitFailed},
		{
			[]stepError{{"secrets", errors.Join(missing, missing)}, {"image", coded(ExitDeclaration, fmt.Errorf("gone"))}},
			"cannot start VM x:\ncannot use secret token: there is no such file\ncannot use secret token: there is no such file\nimage: gone", ExitDeclaration,
		},
	} {
		err := cannotStart("x", c.failed...)
		if err.Error() != c.want || ExitCode(err) != c.code {
			t.Errorf("exit code %d: %s\nwant %d: %s", ExitCode(err), err, c.code, c.want)
		}
	}
}
