package egress

import (
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// The bounds of a VM's cache: what a guest can make its gate hold.
const (
	cacheEntries  = 4096
	cacheBytes    = 1 << 20
	cacheOverhead = 320 // of an entry: map, list, structure
)

// A cache keeps answers for as long as their records live, the ones used last.
type cache struct {
	mu    sync.Mutex
	lru   *simplelru.LRU[question, *answer]
	bytes int
	limit int
}

func newCache(entries, bytes int) *cache {
	c := &cache{limit: bytes}
	c.lru = newLRU(entries, func(q question, a *answer) { c.bytes -= cost(q, a) })
	return c
}

func cost(q question, a *answer) int {
	n := cacheOverhead + 2*len(q.name) + cap(a.wire) + 8*cap(a.ttls) + 24*cap(a.addrs)
	for _, t := range a.texts {
		n += 16 + len(t)
	}
	return n
}

// get returns an answer that still holds, or nil.
func (c *cache) get(q question, now time.Time) *answer {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, ok := c.lru.Get(q)
	if !ok {
		return nil
	}
	if now.Sub(a.stored) >= a.ttl {
		c.lru.Remove(q)
		return nil
	}
	return a
}

// put keeps an answer that may be kept; it must not have been given to anyone yet.
func (c *cache) put(q question, a *answer, now time.Time) {
	if a.ttl <= 0 || cost(q, a) > c.limit/8 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	a.stored = now
	c.lru.Remove(q)
	c.lru.Add(q, a)
	c.bytes += cost(q, a)
	for c.bytes > c.limit {
		c.lru.RemoveOldest()
	}
}
