//go:build !linux

package localnet

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
)

// maxPath is the shortest limit on a socket's path among these systems, that of
// darwin's sockaddr_un, without the final zero.
const maxPath = 103

type socketDir struct{ dir *Dir }

func openSocketDir(d *Dir) (socketDir, error) { return socketDir{dir: d}, nil }

func (s socketDir) close() error { return nil }

// path is the shorter of the absolute path and that from the working directory.
func (s socketDir) path(name string) (string, error) {
	path := filepath.Join(s.dir.path, name)
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, path); err == nil && len(rel) < len(path) {
			path = rel
		}
	}
	if len(path) > maxPath {
		return "", fmt.Errorf("the socket's path %s has %d bytes, this system allows %d; use a directory with a shorter path: %w",
			path, len(path), maxPath, fs.ErrInvalid)
	}
	return path, nil
}

func (s socketDir) listen(name string) (*net.UnixListener, error) {
	path, err := s.path(name)
	if err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		return nil, err
	}
	if err := s.dir.root.Chmod(name, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func (s socketDir) dial(ctx context.Context, name, _ string) (*net.UnixConn, error) {
	path, err := s.path(name)
	if err != nil {
		return nil, err
	}
	info, err := s.dir.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("the file is not a socket: %w", fs.ErrInvalid)
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}
