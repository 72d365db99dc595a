//go:build !linux

package socks

import "net"

// watchSocket says that it cannot watch without reading.
func watchSocket(net.Conn, bool) (gone, ok bool) { return false, false }
