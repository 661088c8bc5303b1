package storage

import (
	"encoding/json"
	"os"
	"time"
)

// metadata stands beside an image. It is for `image ls`; nothing that matters
// depends on it.
type metadata struct {
	Created time.Time `json:"created"`
	Size    int64     `json:"size"`
	Files   int       `json:"files"`
	XAttrs  bool      `json:"xattrs"`
}

func readMetadata(path string) (metadata, error) {
	var m metadata
	data, err := os.ReadFile(path)
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(data, &m)
}

func (m metadata) write(path string) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return writeSynced(path, append(data, '\n'))
}

// writeSynced writes a new file and makes its content durable.
func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
