package egress

import (
	"net/netip"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// namesKept bounds what a guest can make its gate remember: about 150 bytes each.
const namesKept = 4096

// Names remembers which name an address was last given as the answer to, so that a connection can be logged with the
// name that led there. It keeps the 4,096 addresses that were answered last. The zero value is ready, a nil one remembers nothing.
type Names struct {
	mu     sync.Mutex
	byAddr *simplelru.LRU[netip.Addr, string]
}

func (n *Names) remember(name string, addrs []netip.Addr) {
	if n == nil || len(addrs) == 0 {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byAddr == nil {
		n.byAddr = newLRU[netip.Addr, string](namesKept, nil)
	}
	for _, a := range addrs {
		n.byAddr.Add(a, name)
	}
}

// Lookup returns the name that led to an address, without the final dot, or "".
func (n *Names) Lookup(a netip.Addr) string {
	if n == nil {
		return ""
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byAddr == nil {
		return ""
	}
	name, _ := n.byAddr.Peek(a)
	return name
}

// newLRU makes a list of a fixed, positive size; the library's only error is a size that isn't.
func newLRU[K comparable, V any](size int, evicted simplelru.EvictCallback[K, V]) *simplelru.LRU[K, V] {
	l, err := simplelru.NewLRU(size, evicted)
	if err != nil {
		return nil
	}
	return l
}
