package emuhost

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
)

const (
	// cachePage is what a disk writes as a whole, or not at all, when its power fails: a physical sector of today's.
	cachePage = 4096
	// cachePages is how much a disk's write cache holds: 64 MiB, as that of a large disk.
	cachePages = 64 << 20 / cachePage
)

// writeCache is a disk with a volatile write cache, as real ones have: what was written since the last flush is in the
// cache and nowhere else. A killed QEMU alone loses nothing that the server had handed to its disk.
type writeCache struct {
	file *os.File
	size int64
	done chan struct{} // closed when serve has ended

	mu     sync.Mutex
	dirty  map[int64]*[cachePage]byte // by page number
	off    bool                       // the power is off
	served error                      // how serve ended; after done
}

// openWriteCache opens the disk at path. The caller calls serve, once, which closes it.
func openWriteCache(path string) (*writeCache, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.Size()%cachePage != 0 {
		err = fmt.Errorf("the disk %s isn't made of pages of %d bytes", path, cachePage)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &writeCache{file: f, size: info.Size(), done: make(chan struct{}), dirty: map[int64]*[cachePage]byte{}}, nil
}

var errPowerOff = errors.New("the power is off")

// pages calls each with the parts of p, which stands at off, that lie in one page: the page's number and where the part begins in it.
func pages(p []byte, off int64, each func(number, at int64, part []byte) error) error {
	for len(p) > 0 {
		at := off % cachePage
		part := p[:min(int64(len(p)), cachePage-at)]
		if err := each(off/cachePage, at, part); err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

func (c *writeCache) readAt(p []byte, off int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.file.ReadAt(p, off); err != nil {
		return err
	}
	return pages(p, off, func(number, at int64, part []byte) error {
		if page := c.dirty[number]; page != nil {
			copy(part, page[at:])
		}
		return nil
	})
}

func (c *writeCache) writeAt(p []byte, off int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.off {
		return errPowerOff
	}
	err := pages(p, off, func(number, at int64, part []byte) error {
		page := c.dirty[number]
		if page == nil {
			page = new([cachePage]byte)
			if len(part) < cachePage {
				if _, err := c.file.ReadAt(page[:], number*cachePage); err != nil {
					return err
				}
			}
			c.dirty[number] = page
		}
		copy(page[at:], part)
		return nil
	})
	if err == nil && len(c.dirty) > cachePages {
		err = c.write(c.dirty)
	}
	return err
}

func (c *writeCache) flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.off {
		return errPowerOff
	}
	return c.write(c.dirty)
}

// write writes pages to the disk itself. The lock is held.
func (c *writeCache) write(some map[int64]*[cachePage]byte) error {
	for _, number := range slices.Sorted(maps.Keys(some)) {
		if _, err := c.file.WriteAt(some[number][:], number*cachePage); err != nil {
			return err
		}
		delete(c.dirty, number)
	}
	return nil
}

// powerOff loses a part of what is in the cache, drawn by rnd: each page was on its way to the disk, or wasn't, whatever
// the order in which they were written.
func (c *writeCache) powerOff(rnd *rand.Rand) (cached, lost int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off = true
	cached = len(c.dirty)
	for _, number := range slices.Sorted(maps.Keys(c.dirty)) {
		if rnd.IntN(2) == 0 {
			delete(c.dirty, number)
			lost++
		}
	}
	return cached, lost, c.write(c.dirty)
}

// serve is QEMU's disk until QEMU ends. What is in the cache then was not flushed by anybody, and a server that was shut down in
// order does: it is written, since no power has failed.
func (c *writeCache) serve(conn net.Conn) {
	defer close(c.done)
	err := serveNBD(conn, c.size, c)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // QEMU has ended
	}
	if ferr := c.flush(); !errors.Is(ferr, errPowerOff) {
		err = errors.Join(err, ferr)
	} else if errors.Is(err, errPowerOff) {
		err = nil
	}
	c.served = errors.Join(err, conn.Close(), c.file.Close())
}
