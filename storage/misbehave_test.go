package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The vhost-user protocol (docs/interop/vhost-user.rst of QEMU), as far as a VMM
// needs it for a virtiofs device.
const (
	vhostSetFeatures   = 2
	vhostGetFeatures   = 1
	vhostSetOwner      = 3
	vhostSetMemTable   = 5
	vhostSetVringNum   = 8
	vhostSetVringAddr  = 9
	vhostSetVringBase  = 10
	vhostSetVringKick  = 12
	vhostSetVringCall  = 13
	vhostGetProtocol   = 15
	vhostSetProtocol   = 16
	vhostSetEnable     = 18
	vhostVersion       = 1
	vhostReply         = 1 << 2
	featureVersion1    = 1 << 32
	featureProtocol    = 1 << 30
	descriptorNext     = 1
	descriptorWrite    = 2
	descriptorIndirect = 4
)

// The layout of the memory that a client shares: rings first, then a buffer for
// what it asks and one for what it is answered.
const (
	clientMemory = 4 << 20
	guestBase    = 0 // where the memory lies for the guest
	userBase     = 1 << 40
	ringSize     = 64
	descAt       = 0x0000
	availAt      = 0x1000
	usedAt       = 0x2000
	queueBytes   = 0x4000
	askAt        = 0x100000
	answerAt     = 0x200000
	answerBytes  = 1 << 20
)

// fsClient is a virtiofs client without a VM: what a guest's kernel and its VMM
// are together, with a will of its own.
type fsClient struct {
	conn *net.UnixConn
	mem  []byte
	kick [2]int
	call [2]int
	next uint16 // of the request queue's available ring
	id   uint64
	gone <-chan struct{} // closed when virtiofsd has ended
}

// newFSClient connects to a virtiofsd and sets up its two queues. An error is what
// virtiofsd refused.
func newFSClient(t *testing.T, socket string) (*fsClient, error) {
	t.Helper()
	raw, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	c := &fsClient{conn: raw.(*net.UnixConn)}
	t.Cleanup(func() { c.conn.Close() })
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, clientMemory); err != nil {
		t.Fatal(err)
	}
	if c.mem, err = unix.Mmap(fd, 0, clientMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(c.mem); err != nil {
			t.Error(err)
		}
	})
	words := func(v ...uint64) (b []byte) {
		for _, w := range v {
			b = binary.LittleEndian.AppendUint64(b, w)
		}
		return b
	}
	pair := func(a, b uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, a), b)
	}
	features, err := c.get(vhostGetFeatures)
	if err != nil {
		return nil, err
	}
	err = errors.Join(c.send(vhostSetOwner, nil), c.send(vhostSetFeatures, words(features&(featureVersion1|featureProtocol))))
	if err == nil && features&featureProtocol != 0 {
		if _, err = c.get(vhostGetProtocol); err == nil {
			err = c.send(vhostSetProtocol, words(0))
		}
	}
	if err != nil {
		return nil, err
	}
	table := append(pair(1, 0), words(guestBase, clientMemory, userBase, 0)...)
	if err := c.send(vhostSetMemTable, table, fd); err != nil {
		return nil, err
	}
	for q := range uint32(2) {
		at := uint64(q) * queueBytes
		for _, f := range []*int{&c.kick[q], &c.call[q]} {
			if *f, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Close(*f) })
		}
		err := errors.Join(
			c.send(vhostSetVringNum, pair(q, ringSize)),
			c.send(vhostSetVringBase, pair(q, 0)),
			c.send(vhostSetVringAddr, append(pair(q, 0), words(userBase+at+descAt, userBase+at+usedAt, userBase+at+availAt, 0)...)),
			c.send(vhostSetVringCall, words(uint64(q)), c.call[q]),
			c.send(vhostSetVringKick, words(uint64(q)), c.kick[q]))
		if features&featureProtocol != 0 {
			err = errors.Join(err, c.send(vhostSetEnable, pair(q, 1)))
		}
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *fsClient) send(request uint32, payload []byte, fds ...int) error {
	b := binary.LittleEndian.AppendUint32(nil, request)
	b = binary.LittleEndian.AppendUint32(b, vhostVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err := c.conn.WriteMsgUnix(append(b, payload...), rights, nil)
	return err
}

// get asks for a number.
func (c *fsClient) get(request uint32) (uint64, error) {
	if err := c.send(request, nil); err != nil {
		return 0, err
	}
	if err := c.conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return 0, err
	}
	b := make([]byte, 20)
	if _, err := io.ReadFull(c.conn, b); err != nil {
		return 0, err
	}
	if got := binary.LittleEndian.Uint32(b); got != request || binary.LittleEndian.Uint32(b[4:])&vhostReply == 0 {
		return 0, fmt.Errorf("the answer to request %d is %x", request, b)
	}
	return binary.LittleEndian.Uint64(b[12:]), nil
}

// describe writes descriptor i of the request queue.
func (c *fsClient) describe(i int, address uint64, length uint32, flags, next uint16) {
	d := c.mem[queueBytes+descAt+16*i:]
	binary.LittleEndian.PutUint64(d, address)
	binary.LittleEndian.PutUint32(d[8:], length)
	binary.LittleEndian.PutUint16(d[12:], flags)
	binary.LittleEndian.PutUint16(d[14:], next)
}

// offer makes the chain that begins at descriptor head available.
func (c *fsClient) offer(head uint16) error {
	avail := c.mem[queueBytes+availAt:]
	binary.LittleEndian.PutUint16(avail[4+2*(c.next%ringSize):], head)
	c.next++
	binary.LittleEndian.PutUint16(avail[2:], c.next)
	_, err := unix.Write(c.kick[1], []byte{1, 0, 0, 0, 0, 0, 0, 0})
	return err
}

// ask sends a request as an honest client would lay it out, and returns the
// answer; nil when none comes within the limit.
func (c *fsClient) ask(opcode uint32, node uint64, body []byte, limit time.Duration) ([]byte, error) {
	c.id++
	h := binary.LittleEndian.AppendUint32(nil, uint32(40+len(body)))
	h = binary.LittleEndian.AppendUint32(h, opcode)
	h = binary.LittleEndian.AppendUint64(h, c.id)
	h = binary.LittleEndian.AppendUint64(h, node)
	h = append(h, make([]byte, 16)...) // root's uid and gid, no process
	return c.askRaw(append(h, body...), limit)
}

func (c *fsClient) askRaw(request []byte, limit time.Duration) ([]byte, error) {
	copy(c.mem[askAt:], request)
	clear(c.mem[answerAt : answerAt+answerBytes])
	c.describe(0, guestBase+askAt, uint32(len(request)), descriptorNext, 1)
	c.describe(1, guestBase+answerAt, answerBytes, descriptorWrite, 0)
	used := c.mem[queueBytes+usedAt:]
	before := binary.LittleEndian.Uint16(used[2:])
	if err := c.offer(0); err != nil {
		return nil, err
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); {
		select {
		case <-c.gone:
			return nil, errGone
		case <-tick.C:
		}
		if binary.LittleEndian.Uint16(used[2:]) != before {
			n := binary.LittleEndian.Uint32(c.mem[answerAt:])
			return append([]byte(nil), c.mem[answerAt:answerAt+min(n, answerBytes)]...), nil
		}
	}
	return nil, nil
}

// errGone says that virtiofsd has ended.
var errGone = errors.New("virtiofsd has ended")

// FUSE's operations that the tests use (linux/fuse.h).
const (
	fuseLookup     = 1
	fuseSymlink    = 6
	fuseMknod      = 8
	fuseMkdir      = 9
	fuseUnlink     = 10
	fuseLink       = 13
	fuseOpen       = 14
	fuseRead       = 15
	fuseWrite      = 16
	fuseInit       = 26
	fuseCreate     = 35
	fuseRoot       = 1
	fuseOperations = 52
)

// hello begins a FUSE session.
func (c *fsClient) hello() error {
	body := make([]byte, 64)
	binary.LittleEndian.PutUint32(body, 7)
	binary.LittleEndian.PutUint32(body[4:], 31)
	binary.LittleEndian.PutUint32(body[8:], 128<<10)
	answer, err := c.ask(fuseInit, 0, body[:16], 10*time.Second)
	if err != nil {
		return err
	}
	if len(answer) < 24 || binary.LittleEndian.Uint32(answer[4:]) != 0 {
		return fmt.Errorf("FUSE_INIT is answered by %x", answer)
	}
	return nil
}

// fuseError is an answer's error number, 0 for none; ok says that there is an answer.
func fuseError(answer []byte) (errno unix.Errno, ok bool) {
	if len(answer) < 16 {
		return 0, false
	}
	return unix.Errno(-int32(binary.LittleEndian.Uint32(answer[4:]))), true
}

// misbehaviourMemory is what a virtiofsd may hold, whatever its client does, in bytes
// of its own memory.
const misbehaviourMemory = 64 << 20

// TestServeToOneThatMisbehaves serves a share to clients that break FUSE and virtio
// in many ways, each of which a guest's root can: nothing outside of the share is
// read or changed, the daemon answers or ends, in bounded memory, and the daemon of
// another share doesn't notice.
func TestServeToOneThatMisbehaves(t *testing.T) {
	eachVirtiofsd(t, func(t *testing.T, v *Virtiofsd) {
		beside := shareFor(t, true)
		other, err := v.Serve(t.Context(), beside)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := other.Stop(); err != nil {
				t.Error(err)
			}
		})
		honest, err := newFSClient(t, beside.Socket)
		if err != nil {
			t.Fatal(err)
		}
		if err := honest.hello(); err != nil {
			t.Fatal(err)
		}
		for name, misbehave := range misbehaviours {
			t.Run(name, func(t *testing.T) {
				s := shareFor(t, true)
				secret := filepath.Join(filepath.Dir(s.Source), "secret")
				if err := os.WriteFile(secret, []byte("the host's"), 0o644); err != nil {
					t.Fatal(err)
				}
				d, err := v.Serve(t.Context(), s)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := d.Stop(); err != nil {
						t.Error(err)
					}
				})
				c, err := newFSClient(t, s.Socket)
				if err != nil {
					t.Fatal(err)
				}
				c.gone = d.Done()
				if err := c.hello(); err != nil {
					t.Fatal(err)
				}
				misbehave(t, c)
				for _, pid := range family(d.PID()) {
					if size := anonymous(pid); size > misbehaviourMemory {
						t.Errorf("virtiofsd holds %d MiB", size>>20)
					}
				}
				select {
				case <-d.Done():
					t.Logf("it ended: %v", d.Err())
				default:
				}
				if text, err := os.ReadFile(secret); err != nil || string(text) != "the host's" {
					t.Errorf("the file beside the share holds %q, %v", text, err)
				}
				if entries, err := os.ReadDir(s.Source); err != nil || len(entries) != 1 {
					t.Errorf("the read-only share holds %v, %v", entries, err)
				}
				if errno, ok := fuseError(must(honest.ask(fuseLookup, fuseRoot, []byte("file\x00"), 10*time.Second))(t)); !ok || errno != 0 {
					t.Errorf("the daemon of another share answers %v, %t", errno, ok)
				}
			})
		}
	})
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// anonymous is a process's own memory in bytes; 0 when it is gone.
func anonymous(pid int) (size int64) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if n, _ := fmt.Sscanf(line, "RssAnon: %d kB", &size); n == 1 {
			return size << 10
		}
	}
	return 0
}

// misbehaviours break the protocols, each in a way of its own.
var misbehaviours = map[string]func(*testing.T, *fsClient){
	"names that lead out": func(t *testing.T, c *fsClient) {
		for _, name := range []string{"..\x00", "../secret\x00", "/etc/passwd\x00", "a/../../secret\x00", "./../secret\x00", "\x00", ".\x00"} {
			answer, err := c.ask(fuseLookup, fuseRoot, []byte(name), 5*time.Second)
			if err != nil {
				return // it has ended
			}
			// ".." of the share's root is the root itself, and "." too.
			if errno, ok := fuseError(answer); ok && errno == 0 && name != "..\x00" && name != ".\x00" && name != "\x00" {
				t.Errorf("a lookup of %q is answered", name)
			}
		}
	},
	"names without an end": func(t *testing.T, c *fsClient) {
		for _, n := range []int{0, 1, 255, 256, 4096, 64 << 10, 500 << 10} {
			if _, err := c.ask(fuseLookup, fuseRoot, []byte(strings.Repeat("x", n)), 300*time.Millisecond); err != nil {
				return
			}
		}
	},
	"changes of what is read-only": func(t *testing.T, c *fsClient) {
		for _, op := range []uint32{fuseSymlink, fuseMknod, fuseMkdir, fuseUnlink, fuseLink, fuseCreate} {
			body := append(make([]byte, 16), "new\x00"...)
			switch op {
			case fuseUnlink:
				body = []byte("file\x00")
			case fuseSymlink:
				body = []byte("new\x00../secret\x00")
			case fuseLink, fuseMkdir:
				body = append(make([]byte, 8), "new\x00"...)
			}
			answer, err := c.ask(op, fuseRoot, body, 300*time.Millisecond)
			if err != nil {
				return
			}
			if errno, ok := fuseError(answer); ok && errno == 0 {
				t.Errorf("operation %d is done", op)
			}
		}
	},
	"nodes and handles that are not": func(t *testing.T, c *fsClient) {
		for _, node := range []uint64{0, 2, 1 << 32, 1<<64 - 1, 0x4141414141414141} {
			for _, op := range []uint32{fuseOpen, fuseRead, fuseWrite, fuseLookup} {
				body := make([]byte, 40)
				for i := range 24 {
					body[i] = 0xff
				}
				answer, err := c.ask(op, node, body, 300*time.Millisecond)
				if err != nil {
					return
				}
				if errno, ok := fuseError(answer); ok && errno == 0 {
					t.Errorf("operation %d on node %#x is done", op, node)
				}
			}
		}
	},
	"lengths that lie": func(t *testing.T, c *fsClient) {
		for _, length := range []uint32{0, 1, 39, 40, 41, 1 << 20, 1<<31 - 1, 1<<32 - 1} {
			h := binary.LittleEndian.AppendUint32(nil, length)
			h = binary.LittleEndian.AppendUint32(h, fuseLookup)
			h = append(h, make([]byte, 32)...)
			if _, err := c.askRaw(append(h, "file\x00"...), 200*time.Millisecond); err != nil {
				return
			}
		}
		if _, err := c.askRaw(nil, 200*time.Millisecond); err != nil {
			return
		}
	},
	"memory that is not the guest's": func(t *testing.T, c *fsClient) {
		copy(c.mem[askAt:], []byte{45, 0, 0, 0, fuseLookup})
		for _, at := range []uint64{clientMemory - 1, clientMemory, 1 << 40, 1<<64 - 8} {
			c.describe(0, at, 45, descriptorNext, 1)
			c.describe(1, guestBase+answerAt, answerBytes, descriptorWrite, 0)
			if c.offer(0) != nil {
				return
			}
			c.describe(0, guestBase+askAt, 45, descriptorNext, 1)
			c.describe(1, at, 1<<32-1, descriptorWrite, 0)
			if c.offer(0) != nil {
				return
			}
		}
	},
	"a chain without an end": func(t *testing.T, c *fsClient) {
		c.describe(0, guestBase+askAt, 16, descriptorNext, 1)
		c.describe(1, guestBase+askAt, 16, descriptorNext, 0)
		if c.offer(0) != nil {
			return
		}
		c.describe(2, guestBase, 1<<31, descriptorIndirect, 0)
		if c.offer(2) != nil {
			return
		}
		_ = c.offer(60_000) // no such descriptor
	},
	"an index that runs ahead": func(t *testing.T, c *fsClient) {
		c.next += 30_000
		_ = c.offer(0)
	},
	"noise": func(t *testing.T, c *fsClient) {
		r := rand.New(rand.NewPCG(1, 2))
		for i, unanswered := 0, 0; i < 2000 && unanswered < 50; i++ { // it has given the queue up, or waits for more
			body := make([]byte, r.IntN(300))
			for i := range body {
				body[i] = byte(r.Uint32())
			}
			answer, err := c.ask(uint32(r.IntN(fuseOperations+10)), uint64(r.IntN(3)), body, 20*time.Millisecond)
			if err != nil {
				return
			}
			if answer == nil {
				unanswered++
			}
		}
	},
}
