package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/storage"
)

// Images is the root's image store.
func (l Layout) Images() *storage.Store { return &storage.Store{Dir: l.Store()} }

// ImageUsers returns a function that says which VMs use an image: those that run
// from it and those whose declaration names it.
func ImageUsers(ctx context.Context, l Layout) (func(digest string) []string, error) {
	entries, err := List(ctx, l)
	if err != nil {
		return nil, err
	}
	users := map[string][]string{}
	store := l.Images()
	hostConfig, err := config.LoadHost(l.HostConfig())
	if err != nil {
		return nil, coded(ExitDeclaration, err)
	}
	for _, e := range entries {
		if e.Image != "" {
			users[e.Image] = append(users[e.Image], e.Name)
		}
		if !e.Declared {
			continue
		}
		file, err := l.Declaration(e.Name)
		if err != nil {
			return nil, err
		}
		vm, err := config.Load(file, hostConfig)
		if err != nil {
			// Not "uses none": what a broken declaration needs is not known.
			return nil, fmt.Errorf("cannot tell which image VM %s uses: %w", e.Name, err)
		}
		image, err := store.Open(vm.Image)
		switch {
		case errors.Is(err, storage.ErrNoImage):
		case errors.Is(err, storage.ErrCorrupt): // no VM starts from it; it has to go before it is made again
		case err != nil:
			return nil, fmt.Errorf("cannot tell which image VM %s uses: %w", e.Name, err)
		case image.Digest != e.Image: // of one that runs, it may be another than it runs from
			users[image.Digest] = append(users[image.Digest], e.Name)
		}
	}
	return func(digest string) []string { return users[digest] }, nil
}
