package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// moduleCompressed is MODULE_INIT_COMPRESSED_FILE: the kernel unpacks the module itself.
const moduleCompressed = 4

// loadModules loads the listed modules in order and removes their files, which are memory. A module that the kernel refuses is told
// about and skipped: whether it was needed shows in the step that needs it.
func loadModules(list string) error {
	data, err := os.ReadFile(list)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel with everything built in
	}
	if err != nil {
		return fmt.Errorf("cannot read the list of modules: %w", err)
	}
	for _, path := range strings.Fields(string(data)) {
		if err := loadModule(path); err != nil && !errors.Is(err, unix.EEXIST) {
			warn("cannot load %s: %v", path, err)
		}
		if err := os.Remove(path); err != nil {
			warn("%v", err)
		}
	}
	return os.Remove(list)
}

func loadModule(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = moduleCompressed
	}
	return unix.FinitModule(int(f.Fd()), "", flags)
}
