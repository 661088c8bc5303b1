package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/clawvm/clawvm/guest"
)

// ownFiles are the files that every guest gets.
func ownFiles(d *guest.Document) []guest.File {
	return []guest.File{
		{Path: "/etc/hostname", Content: []byte(d.Hostname + "\n")},
		{Path: "/etc/hosts", Content: hostsFile(d)},
		{Path: "/etc/resolv.conf", Content: resolvFile(d.Network)},
	}
}

// writeFiles writes files below root, which is empty in a guest.
func writeFiles(root string, files []guest.File) error {
	for _, f := range files {
		if err := writeFile(root, f); err != nil {
			return fmt.Errorf("cannot write %s: %w", f.Path, err)
		}
	}
	return nil
}

// writeFile writes beside the file and renames, so that a symbolic link is replaced and not followed: an image's /etc/resolv.conf
// often is one.
func writeFile(root string, f guest.File) (err error) {
	path := root + f.Path
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	mode := os.FileMode(f.Mode & 0o777)
	if f.Mode == 0 {
		mode = 0o644
	}
	for bit, m := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if f.Mode&bit != 0 {
			mode |= m
		}
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".clawvm-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	_, err = tmp.Write(f.Content)
	if err == nil {
		err = tmp.Chown(f.UID, f.GID)
	}
	if err == nil {
		err = tmp.Chmod(mode) // after chown, which takes setuid away
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
