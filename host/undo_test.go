package host

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestUndoRunsInReverseAndGoesOnAfterAnError(t *testing.T) {
	var order []string
	var s undoStack
	for _, name := range []string{"first", "second", "third"} {
		s.push(name, func() error {
			order = append(order, name)
			if name == "second" {
				return errors.New("stuck")
			}
			return nil
		})
	}
	err := s.unwind()
	if want := []string{"third", "second", "first"}; !slices.Equal(order, want) {
		t.Errorf("undone in order %v, want %v", order, want)
	}
	if err == nil || !strings.Contains(err.Error(), "cannot take down second: stuck") {
		t.Errorf("error is %v, want it to name the second entry", err)
	}
	if err := s.unwind(); err != nil || len(order) != 3 {
		t.Errorf("a second unwinding did something: %v, %v", err, order)
	}
}
