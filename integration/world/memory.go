package world

import (
	"fmt"
	"os"
	"strings"
)

// RssAnon is a process's own memory in bytes; 0 when it is gone.
func RssAnon(pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		var kib int64
		if n, err := fmt.Sscanf(line, "RssAnon: %d kB", &kib); err == nil && n == 1 {
			return kib << 10
		}
	}
	return 0
}
