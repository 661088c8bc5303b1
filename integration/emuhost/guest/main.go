// Command guest is the init of the small guests that the VMMs' tests boot: it looks what machine it is in, tells
// the host over vsock, one line a fact, and does what the host answers: poweroff, reboot, panic, tick or wait. It powers off
// when the power button is pressed.
package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mdlayher/vsock"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	modulesList = "/clawvm/modules.list"
	agentPort   = 1024
	// The address on the test's TAP, and the host's with a port that greets.
	address = "10.99.0.2/24"
	greeter = "10.99.0.1:7777"
	// keyPower is EV_KEY's code for the power button in linux/input-event-codes.h.
	keyPower = 116
	evKey    = 1
	limit    = 20 * time.Second
)

func main() {
	fmt.Println("guest: begins")
	err := run()
	fmt.Println("guest: failed:", err)
	end(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for _, m := range []string{"proc", "sysfs:sys", "devtmpfs:dev"} {
		kind, dir, found := strings.Cut(m, ":")
		if !found {
			dir = kind
		}
		if err := unix.Mount(kind, "/"+dir, kind, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("cannot mount /%s: %w", dir, err)
		}
	}
	list, err := os.ReadFile(modulesList)
	if err != nil {
		return err
	}
	for _, path := range strings.Fields(string(list)) {
		if err := load(path); err != nil {
			fmt.Printf("guest: cannot load %s: %v\n", path, err)
		}
	}
	go watchButton()
	host, err := dial()
	if err != nil {
		return err
	}
	for _, fact := range facts() {
		fmt.Println("guest:", fact)
		if _, err := fmt.Fprintln(host, fact); err != nil {
			return err
		}
	}
	if _, err := fmt.Fprintln(host, "what now"); err != nil {
		return err
	}
	answer, err := bufio.NewReader(host).ReadString('\n')
	if err != nil {
		return fmt.Errorf("the host hung up: %w", err)
	}
	fmt.Println("guest: told to", strings.TrimSpace(answer))
	switch strings.TrimSpace(answer) {
	case "poweroff":
		end(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		end(unix.LINUX_REBOOT_CMD_RESTART)
	case "tick":
		for n := 0; ; n++ {
			if _, err := fmt.Fprintln(host, n); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
	case "panic":
		return os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	select {}
}

func end(how int) {
	unix.Sync()
	if err := unix.Reboot(how); err != nil {
		fmt.Println("guest: cannot end:", err)
	}
	select {}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

func dial() (net.Conn, error) {
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		c, err := vsock.Dial(vsock.Host, agentPort, nil)
		if err == nil || time.Since(began) > limit {
			return c, err
		}
	}
}

// facts are what the tests ask about the machine.
func facts() []string {
	all := []string{}
	say := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	serials, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		say("cannot list disks: %v", err)
	}
	for _, path := range serials {
		serial, err := os.ReadFile(path)
		name := filepath.Base(filepath.Dir(path))
		head, herr := readHead("/dev/" + name)
		say("disk %s begins with %q, writable %v %v%v", strings.TrimSpace(string(serial)), head, writable("/dev/"+name), noError(err), noError(herr))
	}
	if greeting, err := greet(); err != nil {
		say("network: %v", err)
	} else {
		say("network: %s", greeting)
	}
	if err := os.MkdirAll("/share", 0o755); err != nil {
		say("share: %v", err)
	} else if err := unix.Mount("share", "/share", "virtiofs", unix.MS_RDONLY, ""); err != nil {
		say("share: %v", err)
	} else {
		b, err := os.ReadFile("/share/file")
		say("share: %s%v", b, noError(err))
	}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	say("nested: %v%v", strings.Contains(string(cpu), " svm") || strings.Contains(string(cpu), " vmx"), noError(err))
	return all
}

func noError(err error) string {
	if err != nil {
		return " (" + err.Error() + ")"
	}
	return ""
}

func readHead(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, 8)
	_, err = io.ReadFull(f, b)
	return strings.TrimRight(string(b), "\x00"), err
}

// writable tries it, at the first sector.
func writable(path string) bool {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_SYNC, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	_, err = f.WriteAt([]byte("written\x00"), 0)
	return err == nil
}

func greet() (string, error) {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return "", err
	}
	a, err := netlink.ParseAddr(address)
	if err != nil {
		return "", err
	}
	if err := netlink.AddrAdd(link, a); err != nil {
		return "", err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return "", err
	}
	c, err := net.DialTimeout("tcp", greeter, limit)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := io.ReadAll(io.LimitReader(c, 64))
	return link.Attrs().HardwareAddr.String() + " " + string(b), err
}

func watchButton() {
	inputs, err := filepath.Glob("/dev/input/event*")
	if err != nil || len(inputs) == 0 {
		fmt.Println("guest: no power button:", err)
		return
	}
	for _, path := range inputs {
		go func() {
			f, err := os.Open(path)
			if err != nil {
				fmt.Println("guest:", err)
				return
			}
			// struct input_event: a timeval of two longs, then type, code and value.
			var e struct {
				Seconds, Micros int64
				Type, Code      uint16
				Value           int32
			}
			for binary.Read(f, binary.NativeEndian, &e) == nil {
				if e.Type == evKey && e.Code == keyPower && e.Value == 1 {
					fmt.Println("guest: power button")
					end(unix.LINUX_REBOOT_CMD_POWER_OFF)
				}
			}
		}()
	}
}
