package qemu

import (
	"context"
	"fmt"
)

// Alive asks QEMU for its machine's status.
func (i *instance) Alive(ctx context.Context) error {
	i.pausing.Lock()
	defer i.pausing.Unlock()
	if i.paused {
		return nil
	}
	if _, err := i.qmp.do(ctx, "query-status"); err != nil {
		return fmt.Errorf("qemu (process %d) does not answer: %w", i.PID(), err)
	}
	return nil
}
