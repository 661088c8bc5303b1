package host

import (
	"errors"
	"fmt"
)

// undoStack takes down what was put up, in reverse order. It is not safe for
// concurrent use.
type undoStack struct {
	entries []undoEntry
}

type undoEntry struct {
	what string
	undo func() error
}

// push adds the undo of a step. what completes "cannot take down …".
func (s *undoStack) push(what string, undo func() error) {
	s.entries = append(s.entries, undoEntry{what, undo})
}

// unwind runs each undo once, last first. An undo that fails does not stop the
// others; all errors are returned joined.
func (s *undoStack) unwind() error {
	var errs []error
	for len(s.entries) > 0 {
		e := s.entries[len(s.entries)-1]
		s.entries = s.entries[:len(s.entries)-1]
		if err := guarded("undo of "+e.what, e.undo); err != nil {
			errs = append(errs, fmt.Errorf("cannot take down %s: %w", e.what, err))
		}
	}
	return errors.Join(errs...)
}
