package cloudhypervisor

import (
	"context"
	"fmt"
)

// Alive asks cloud-hypervisor whether it is there.
func (i *instance) Alive(ctx context.Context) error {
	i.pausing.Lock()
	defer i.pausing.Unlock()
	if i.paused {
		return nil
	}
	if _, err := i.api.ping(ctx); err != nil {
		return fmt.Errorf("cloud-hypervisor (process %d) does not answer: %w", i.PID(), err)
	}
	return nil
}
