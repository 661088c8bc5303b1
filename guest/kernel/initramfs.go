package kernel

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
)

// Paths in the initramfs that the guest's init reads.
const (
	// ModulesList is the list of modules: a path a line, in the order in which they are loaded.
	ModulesList = "/clawvm/modules.list"
	// BootDocument is the boot document.
	BootDocument = "/clawvm/boot.json"

	modulesDir = "clawvm/modules"
	initPath   = "init"
)

// MaxDocument bounds the boot document: it describes one VM, and a few files of configuration at most.
const MaxDocument = 4 << 20

// archiveAlign is where a further cpio archive may start; elsewhere the kernel gives up with "Initramfs unpacking
// failed" and what follows is missing.
const archiveAlign = 4

// baseInitramfs makes the archive that all guests of a kernel share. It isn't compressed: unpacking it costs the
// guest a third of what gzip or zstd do, and it is made once. Equal input makes equal bytes.
func baseInitramfs(init []byte, modules []module) ([]byte, error) {
	records := []cpio.Record{
		cpio.Directory("clawvm", 0o755),
		cpio.Directory(modulesDir, 0o755),
	}
	var list strings.Builder
	for _, m := range modules {
		path := modulesDir + "/" + m.Name + ".ko"
		records = append(records, cpio.StaticFile(path, string(m.Content), 0o644))
		fmt.Fprintf(&list, "/%s\n", path)
	}
	records = append(records,
		cpio.StaticFile(strings.TrimPrefix(ModulesList, "/"), list.String(), 0o644),
		cpio.Directory("dev", 0o755),
		// The kernel opens it for init before anything is mounted. Where virtio_console is a module that fails, since hvc0 is
		// not there yet: init has to open it again when it has loaded the modules.
		cpio.CharDev("dev/console", 0o600, 5, 1),
		// A Go program that is started without its three standard files opens this in their place, and exits with 2 if it can't.
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.Directory("proc", 0o755),
		cpio.Directory("sys", 0o755),
		cpio.Directory("run", 0o755),
		cpio.StaticFile(initPath, string(init), 0o755),
	)
	return archive(records)
}

// archive writes records as one newc archive, with nothing in it that varies.
func archive(records []cpio.Record) ([]byte, error) {
	out := &bytes.Buffer{}
	w := cpio.Newc.Writer(out)
	for i, r := range records {
		r.MTime = 0
		r.Ino = uint64(i + 1)
		if err := w.WriteRecord(r); err != nil {
			return nil, fmt.Errorf("cannot make the initramfs: %s: %w", r.Name, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, fmt.Errorf("cannot make the initramfs: %w", err)
	}
	return out.Bytes(), nil
}

// WriteInitramfs writes a VM's initramfs to dst: the base that Prepare made, and behind it an archive with the boot
// document. dst is the caller's, to close and to remove: the VMM needs it until the guest runs.
func WriteInitramfs(dst *os.File, base string, document []byte) error {
	if len(document) > MaxDocument {
		return fmt.Errorf("cannot write the initramfs: the boot document is %d bytes, more than %d", len(document), MaxDocument)
	}
	// The base has the directory.
	second, err := archive([]cpio.Record{cpio.StaticFile(strings.TrimPrefix(BootDocument, "/"), string(document), 0o600)})
	if err != nil {
		return err
	}
	f, err := os.Open(base)
	if err != nil {
		return fmt.Errorf("cannot write the initramfs: %w", err)
	}
	defer f.Close()
	n, err := io.Copy(dst, f)
	if err != nil {
		return fmt.Errorf("cannot write the initramfs: %w", err)
	}
	pad := make([]byte, (archiveAlign-n%archiveAlign)%archiveAlign)
	if _, err := dst.Write(append(pad, second...)); err != nil {
		return fmt.Errorf("cannot write the initramfs: %w", err)
	}
	return nil
}
