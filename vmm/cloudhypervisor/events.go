package cloudhypervisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// maxEvent bounds one event, and what is no event between two. Real ones have some 200 bytes.
const maxEvent = 64 << 10

// event is one object of the event monitor's stream.
type event struct {
	Source     string            `json:"source"`
	Event      string            `json:"event"`
	Properties map[string]string `json:"properties"`
}

func (e event) String() string { return e.Source + "/" + e.Event }

// errNoEvents is a stream in which nothing like events is found any more.
var errNoEvents = errors.New("cannot understand cloud-hypervisor's events")

// readEvents reads the stream to its end and calls each for every event. The stream is a pipe that its writer
// drops into when it is full, so an event can be torn, and the next one begins in the middle of it: reading goes on with the
// next brace from which a whole object can be read. A stream that has no events any more is an error.
func readEvents(r io.Reader, each func(event)) error {
	var pending []byte
	skipped := 0
	chunk := make([]byte, 4096)
	for {
		n, err := r.Read(chunk)
		pending = append(pending, chunk[:n]...)
		for {
			e, rest, found := nextEvent(pending)
			if !found {
				skipped += len(pending) - len(rest)
				pending = append(pending[:0], rest...)
				break
			}
			pending, skipped = rest, 0
			each(e)
		}
		if skipped+len(pending) > maxEvent {
			return fmt.Errorf("%w: %d bytes without one", errNoEvents, maxEvent)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errNoEvents, err)
		}
	}
}

// nextEvent takes the first whole event out of b. Without one it gives back what may become one.
func nextEvent(b []byte) (e event, rest []byte, found bool) {
	for {
		at := bytes.IndexByte(b, '{')
		if at < 0 {
			return event{}, nil, false
		}
		b = b[at:]
		d := json.NewDecoder(bytes.NewReader(b))
		e = event{}
		err := d.Decode(&e)
		switch {
		case err == nil && e.Source != "" && e.Event != "":
			return e, b[d.InputOffset():], true
		case errors.Is(err, io.ErrUnexpectedEOF):
			return event{}, b, false
		}
		b = b[1:] // a torn event, or an object in one
	}
}
