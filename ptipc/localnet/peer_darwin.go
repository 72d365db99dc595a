package localnet

import (
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Supported reports whether [Peer] can tell the user behind connections of a
// network, "unix" or "tcp", on this system.
func Supported(network string) bool { return network == "unix" }

func unixPeer(conn *net.UnixConn) (Cred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Cred{}, err
	}
	var cred *unix.Xucred
	var pid int
	if closed := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptXucred(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
		if err == nil {
			pid, err = unix.GetsockoptInt(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERPID)
		}
	}); closed != nil {
		return Cred{}, closed
	}
	if err != nil {
		return Cred{}, os.NewSyscallError("getsockopt LOCAL_PEERCRED", err)
	}
	return Cred{UID: cred.Uid, PID: pid}, nil
}

func tcpPeer(*net.TCPConn, netip.AddrPort, netip.AddrPort) (Cred, error) {
	return Cred{}, ErrUnsupported
}

func tcpListenerOwnedBy(*net.TCPConn, netip.AddrPort, netip.AddrPort, []int) error {
	return ErrUnsupported
}

func udpPeer(netip.AddrPort, netip.AddrPort) (Cred, error) { return Cred{}, ErrUnsupported }

func udpOwnedBy(netip.AddrPort, []int) error { return ErrUnsupported }
