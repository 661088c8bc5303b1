package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/internal/durable"
)

// Known is the directory of what was found out about the host's programs and
// kernels and holds until they change. It can be removed at any time.
func (l Layout) Known() string { return l.path("/var/lib/clawvm/known") }

// known is one answer, and the files that it depends on as they were then.
type known[T any] struct {
	On     []string `json:"on"`
	Answer T        `json:"answer"`
}

// remember answers find's question from file, for as long as the files on which
// the answer depends are the same and good finds nothing wrong with it. Asking a
// VMM for its version, or hashing a kernel, takes tens of milliseconds, and every
// start would do it twice. Errors are not remembered.
func remember[T any](file string, on []string, good func(T) bool, find func() (T, error)) (T, error) {
	now := make([]string, 0, len(on))
	for _, path := range on {
		id, err := identity(path)
		if err != nil {
			return find()
		}
		now = append(now, id)
	}
	var was known[T]
	if raw, err := os.ReadFile(file); err == nil && json.Unmarshal(raw, &was) == nil && slices.Equal(was.On, now) && good(was.Answer) {
		return was.Answer, nil
	}
	answer, err := find()
	if err != nil {
		return answer, err
	}
	raw, err := json.Marshal(known[T]{now, answer})
	if err != nil {
		return answer, err
	}
	err = durable.MkdirAll(filepath.Dir(file), 0o700)
	if err == nil {
		err = durable.WriteFile(file, append(raw, '\n'), 0o600)
	}
	if err != nil {
		return answer, fmt.Errorf("cannot keep what is known of %s: %w", filepath.Base(on[0]), err)
	}
	return answer, nil
}

// identity changes whenever the file at path is changed or replaced: its time of
// change (ctime) can't be set back.
func identity(path string) (string, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, fs.ErrNotExist) {
		return path + " isn't there", nil
	}
	if err != nil {
		return "", fmt.Errorf("cannot look at %s: %w", path, err)
	}
	return fmt.Sprintf("%s %x:%d %d %d.%09d %d.%09d", path, st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec), nil
}
