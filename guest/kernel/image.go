package kernel

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Offsets in a bzImage, from the kernel's Documentation/arch/x86/boot.rst.
const (
	setupSectsAt    = 0x1f1
	headerMagicAt   = 0x202 // "HdrS"
	protocolAt      = 0x206
	versionAt       = 0x20e // where the release is, less 0x200
	payloadOffsetAt = 0x248
	payloadLengthAt = 0x24c
	headerEnd       = 0x250

	payloadProtocol = 0x0208 // the first protocol that says where the payload is
)

// maxImage bounds an image and what comes out of it: the biggest distribution kernels are around 100 MB unpacked.
const maxImage = 512 << 20

// errPacked means that an image's payload is packed in a way that is not understood here. The image itself boots
// nonetheless, since it unpacks itself.
var errPacked = errors.New("its payload cannot be unpacked")

// pvhNote is the type of the Xen ELF note that holds the PVH entry (XEN_ELFNOTE_PHYS32_ENTRY).
const pvhNote = 18

// readImage reads a kernel image, whole.
func readImage(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	image, err := io.ReadAll(io.LimitReader(f, maxImage+1))
	if err != nil {
		return nil, err
	}
	if len(image) > maxImage {
		return nil, fmt.Errorf("larger than %d MiB", maxImage>>20)
	}
	return image, nil
}

// vmlinux extracts the ELF kernel from an image and makes sure that a VMM can enter it. An image that is one
// already is returned as it is.
func vmlinux(image []byte) ([]byte, error) {
	kernel := image
	if !isELF(image) {
		payload, err := payloadOf(image)
		if err != nil {
			return nil, err
		}
		if kernel, err = unpackPayload(payload); err != nil {
			return nil, err
		}
	}
	if err := checkPVH(kernel); err != nil {
		return nil, err
	}
	return kernel, nil
}

func isELF(b []byte) bool { return bytes.HasPrefix(b, []byte(elf.ELFMAG)) }

// setupOf checks that an image is a bzImage and returns the length of its real-mode part.
func setupOf(image []byte) (int64, error) {
	if len(image) < headerEnd || string(image[headerMagicAt:headerMagicAt+4]) != "HdrS" {
		return 0, errors.New("neither a bzImage nor an ELF kernel")
	}
	sects := int64(image[setupSectsAt])
	if sects == 0 {
		sects = 4 // the boot protocol's default
	}
	return (sects + 1) * 512, nil
}

// payloadOf is the compressed kernel in a bzImage.
func payloadOf(image []byte) ([]byte, error) {
	setup, err := setupOf(image)
	if err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint16(image[protocolAt:]) < payloadProtocol {
		return nil, fmt.Errorf("%w: the boot protocol is older than 2.08", errPacked)
	}
	offset := setup + int64(binary.LittleEndian.Uint32(image[payloadOffsetAt:]))
	length := int64(binary.LittleEndian.Uint32(image[payloadLengthAt:]))
	if length < 8 || offset+length > int64(len(image)) {
		return nil, fmt.Errorf("damaged: its payload of %d bytes at %d is not in its %d bytes", length, offset, len(image))
	}
	return image[offset : offset+length], nil
}

// unpackPayload decompresses a payload. Its last four bytes are the size of what comes out, which for all but gzip
// were put behind the compressed data.
func unpackPayload(payload []byte) ([]byte, error) {
	body, trailer := payload[:len(payload)-4], payload[len(payload)-4:]
	size := int64(binary.LittleEndian.Uint32(trailer))
	if size > maxImage {
		return nil, fmt.Errorf("damaged: its payload would be %d bytes", size)
	}
	var r io.Reader
	switch {
	case bytes.HasPrefix(body, []byte{0x02, 0x21, 0x4c, 0x18}): // the old frame format that lz4 -l makes
		r = lz4.NewReader(bytes.NewReader(body))
	case bytes.HasPrefix(body, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		// The kernel is packed with a window as large as itself.
		d, err := zstd.NewReader(bytes.NewReader(body), zstd.WithDecoderMaxWindow(maxImage), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, fmt.Errorf("damaged: %w", err)
		}
		defer d.Close()
		r = d
	case bytes.HasPrefix(body, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, fmt.Errorf("damaged: %w", err)
		}
		r = z
	case bytes.HasPrefix(body, []byte("\xfd7zXZ\x00")):
		// Packed with a filter for x86 code, which no Go library undoes.
		unpacked, err := xzProgram(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(unpacked)
	default:
		return nil, fmt.Errorf("%w: it starts with % x", errPacked, body[:4])
	}
	kernel := make([]byte, size)
	if _, err := io.ReadFull(r, kernel); err != nil {
		return nil, fmt.Errorf("damaged: its payload ends early: %w", err)
	}
	return kernel, nil
}

// xzProgram decompresses with the xz program.
func xzProgram(body []byte) ([]byte, error) {
	path, err := exec.LookPath("xz")
	if err != nil {
		return nil, fmt.Errorf("%w: it is packed by xz, and the program xz isn't there", errPacked)
	}
	cmd := exec.Command(path, "--decompress", "--stdout", "--single-stream")
	cmd.Stdin = bytes.NewReader(body)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: xz: %w", errPacked, err)
	}
	// A few kilobytes can become a terabyte. What isn't read, xz can't write: it ends by SIGPIPE.
	out, err := io.ReadAll(io.LimitReader(stdout, maxImage+1))
	err = errors.Join(err, stdout.Close())
	waited := cmd.Wait()
	if len(out) > maxImage {
		return nil, fmt.Errorf("damaged: its payload is larger than %d MiB", maxImage>>20)
	}
	if err := errors.Join(err, waited); err != nil {
		return nil, fmt.Errorf("%w: xz: %w", errPacked, err)
	}
	return out, nil
}

// checkPVH makes sure that an ELF kernel has the entry that VMMs start an uncompressed kernel at.
func checkPVH(kernel []byte) error {
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return fmt.Errorf("damaged: what comes out of it is no ELF file: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > maxImage {
			continue
		}
		notes := make([]byte, p.Filesz)
		if _, err := p.ReadAt(notes, 0); err != nil {
			return fmt.Errorf("damaged: cannot read its notes: %w", err)
		}
		if hasNote(notes, f.ByteOrder, "Xen\x00", pvhNote) {
			return nil
		}
	}
	return fmt.Errorf("%w to something a VMM can start: it has no PVH entry (CONFIG_PVH)", errPacked)
}

// hasNote walks a PT_NOTE segment. Each note is the lengths of name and description, the type, then both, each
// padded to four bytes.
func hasNote(notes []byte, order binary.ByteOrder, name string, kind uint32) bool {
	round := func(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
	for len(notes) >= 12 {
		nameLen, descLen := order.Uint32(notes), order.Uint32(notes[4:])
		noteKind := order.Uint32(notes[8:])
		notes = notes[12:]
		if round(nameLen)+round(descLen) > uint64(len(notes)) {
			return false
		}
		if noteKind == kind && string(notes[:nameLen]) == name {
			return true
		}
		notes = notes[round(nameLen)+round(descLen):]
	}
	return false
}

// releaseInELF is how an uncompressed kernel says its release.
var releaseInELF = regexp.MustCompile(`Linux version ([0-9][!-~]{2,63}) \(`)

// imageRelease reads the release out of a bzImage or a vmlinux.
func imageRelease(path string) (string, error) {
	image, err := readImage(path)
	if err != nil {
		return "", err
	}
	if isELF(image) {
		m := releaseInELF.FindSubmatch(image)
		if m == nil {
			return "", errors.New("an ELF file that says no Linux version")
		}
		return string(m[1]), nil
	}
	setup, err := setupOf(image)
	if err != nil {
		return "", err
	}
	at := int64(binary.LittleEndian.Uint16(image[versionAt:])) + 0x200
	if at >= setup || setup > int64(len(image)) {
		return "", errors.New("damaged: its header says no release")
	}
	text, _, _ := bytes.Cut(image[at:setup], []byte{0})
	release, _, _ := strings.Cut(string(text), " ")
	if release == "" || len(release) > 64 || strings.Contains(release, "/") {
		return "", errors.New("damaged: its header says no release")
	}
	return release, nil
}
