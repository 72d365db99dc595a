//go:build !linux && !darwin

package localnet

import (
	"net"
	"net/netip"
)

// Supported reports whether [Peer] can tell the user behind connections of a
// network, "unix" or "tcp", on this system.
func Supported(string) bool { return false }

func unixPeer(*net.UnixConn) (Cred, error) { return Cred{}, ErrUnsupported }

func tcpPeer(*net.TCPConn, netip.AddrPort, netip.AddrPort) (Cred, error) {
	return Cred{}, ErrUnsupported
}

func tcpListenerOwnedBy(*net.TCPConn, netip.AddrPort, netip.AddrPort, []int) error {
	return ErrUnsupported
}

func udpPeer(netip.AddrPort, netip.AddrPort) (Cred, error) { return Cred{}, ErrUnsupported }

func udpOwnedBy(netip.AddrPort, []int) error { return ErrUnsupported }
