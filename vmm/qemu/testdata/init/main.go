// The guest of the tests: PID 1 of the initramfs. It says what it finds and does what it is told over the agent's
// port, a line each way.
package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("init:", err)
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("init:", err)
	}
}

func run() error {
	for _, m := range []struct{ what, where string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := unix.Mount(m.what, m.where, m.what, 0, ""); err != nil {
			return err
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	port, err := openPort("agent")
	if err != nil {
		return err
	}
	if err := openConsole(); err != nil {
		return err
	}
	fmt.Println("console says hello")
	if _, err := fmt.Fprintln(port, "ready"); err != nil {
		return err
	}
	for lines := bufio.NewReader(port); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return fmt.Errorf("port: %w", err)
		}
		command, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
		answer, err := obey(command, arg, lines, port)
		if err != nil {
			answer = "error: " + err.Error()
		}
		if _, err := fmt.Fprintln(port, answer); err != nil {
			return err
		}
	}
}

func loadModules() error {
	list, err := os.ReadFile("/clawvm/modules.list")
	if err != nil {
		return err
	}
	for path := range strings.FieldsSeq(string(list)) {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

// openConsole makes the console standard output; when init started, its driver wasn't loaded.
func openConsole() error {
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		var f *os.File
		if f, err = os.OpenFile("/dev/console", os.O_RDWR, 0); err == nil {
			return errors.Join(unix.Dup2(int(f.Fd()), 1), unix.Dup2(int(f.Fd()), 2))
		}
	}
	return err
}

// openPort waits for the virtio-serial port of that name: the driver finds it some time after it was loaded.
func openPort(name string) (*os.File, error) {
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if b, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(b)) == name {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("no port %q", name)
}

func obey(command, arg string, in io.Reader, out io.Writer) (string, error) {
	switch command {
	case "report":
		return report()
	case "print":
		_, err := fmt.Println(arg)
		return "printed", err
	case "swallow": // that many bytes, and say their sum
		var n int64
		if _, err := fmt.Sscan(arg, &n); err != nil {
			return "", err
		}
		sum := uint64(0)
		buf := make([]byte, n)
		if _, err := io.ReadFull(in, buf); err != nil {
			return "", err
		}
		for _, b := range buf {
			sum += uint64(b)
		}
		if _, err := out.Write(buf); err != nil { // and back
			return "", err
		}
		return fmt.Sprint("sum ", sum), nil
	case "udp":
		return "sent", sendUDP(arg)
	case "mount":
		return mount(arg)
	case "write-disk":
		return "written", os.WriteFile("/dev/"+arg, []byte("written by the guest"), 0)
	case "button":
		return awaitButton(out)
	case "tick": // without an end
		for n := 0; ; n++ {
			if _, err := fmt.Fprintln(out, n); err != nil {
				return "", err
			}
			time.Sleep(100 * time.Millisecond)
		}
	case "poweroff":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		return "", os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	return "", fmt.Errorf("unknown command %q", command)
}

func report() (string, error) {
	r := map[string]any{}
	disks := map[string]string{}
	serials, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		return "", err
	}
	for _, s := range serials {
		dir := filepath.Dir(s)
		serial, err := os.ReadFile(s)
		if err != nil {
			return "", err
		}
		ro, err := os.ReadFile(filepath.Join(dir, "ro"))
		if err != nil {
			return "", err
		}
		head := make([]byte, 16)
		f, err := os.Open("/dev/" + filepath.Base(dir))
		if err != nil {
			return "", err
		}
		if _, err := io.ReadFull(f, head); err != nil {
			return "", err
		}
		if err := f.Close(); err != nil {
			return "", err
		}
		disks[strings.TrimSpace(string(serial))] = fmt.Sprintf("%s ro=%s %s", filepath.Base(dir), strings.TrimSpace(string(ro)), strings.TrimRight(string(head), "\x00"))
	}
	r["disks"] = disks
	if eth0, err := net.InterfaceByName("eth0"); err == nil {
		r["mac"] = eth0.HardwareAddr.String()
	}
	for name, path := range map[string]string{"document": "/clawvm/boot.json", "cmdline": "/proc/cmdline", "modules": "/proc/modules", "online": "/sys/devices/system/cpu/online"} {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		r[name] = strings.TrimSpace(string(b))
	}
	b, err := json.Marshal(r)
	return string(b), err
}

func sendUDP(to string) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("10.99.0.2/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	c, err := net.Dial("udp", to)
	if err != nil {
		return err
	}
	_, err = c.Write([]byte("hello from the guest"))
	return err
}

func mount(tag string) (string, error) {
	if err := os.MkdirAll("/share", 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount(tag, "/share", "virtiofs", unix.MS_RDONLY, ""); err != nil {
		return "", err
	}
	b, err := os.ReadFile("/share/file")
	return strings.TrimSpace(string(b)), err
}

// awaitButton says "listening", waits for the power button, and says so.
func awaitButton(out io.Writer) (string, error) {
	devices, err := filepath.Glob("/dev/input/event*")
	if err != nil {
		return "", err
	}
	pressed := make(chan error, len(devices))
	for _, d := range devices {
		f, err := os.Open(d)
		if err != nil {
			return "", err
		}
		go func() {
			event := make([]byte, 24) // struct input_event
			for {
				if _, err := io.ReadFull(f, event); err != nil {
					pressed <- err
					return
				}
				const evKey, keyPower = 1, 116
				if binary.LittleEndian.Uint16(event[16:]) == evKey && binary.LittleEndian.Uint16(event[18:]) == keyPower && event[20] == 1 {
					pressed <- nil
					return
				}
			}
		}()
	}
	if _, err := fmt.Fprintln(out, "listening"); err != nil {
		return "", err
	}
	return "pressed", <-pressed
}
