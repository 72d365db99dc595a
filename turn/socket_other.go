//go:build !linux

package turn

import (
	"net"
	"net/netip"
)

type rawAddr struct{}

func (*rawAddr) set(netip.AddrPort) {}

type batchSystem struct{}

func (*batchSystem) init(*batch) {}

// newUDPSocket has no faster way here.
func newUDPSocket(*net.UDPConn, bool) socket { return nil }
