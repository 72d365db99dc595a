package localnet

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Supported reports whether [Peer] can tell the user behind connections of a
// network, "unix" or "tcp", on this system, or [UDPPeer] that behind datagrams for "udp".
func Supported(network string) bool {
	return network == "unix" || network == "tcp" || network == "udp"
}

func unixPeer(conn *net.UnixConn) (Cred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Cred{}, err
	}
	var cred *unix.Ucred
	if closed := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); closed != nil {
		return Cred{}, closed
	}
	if err != nil {
		return Cred{}, os.NewSyscallError("getsockopt SO_PEERCRED", err)
	}
	if cred.Uid == ^uint32(0) { // what the kernel says of a socket without a peer
		return Cred{}, ErrPeerGone
	}
	return Cred{UID: cred.Uid, PID: int(cred.Pid)}, nil
}

func tcpPeer(conn *net.TCPConn, local, remote netip.AddrPort) (Cred, error) {
	sock, err := diag.lookup(remote, local)
	if errors.Is(err, unix.ENOENT) {
		return Cred{}, cmp.Or(undiagnosed(conn, local, remote), ErrPeerGone)
	}
	if err != nil {
		return Cred{}, err
	}
	// When no connection matches, the kernel answers with a listener on the
	// client's port. A new socket of somebody else can have the place of one that
	// is gone, but cannot get beyond SYN_SENT while our end lives, which is why
	// our end is looked at last.
	if sock.local != remote || sock.remote != local || !sock.connected() {
		return Cred{}, ErrPeerGone
	}
	// A socket that its process has closed, and one in TIME_WAIT, is shown with
	// uid 0, which would make its owner root. It has no inode.
	if sock.inode == 0 {
		return Cred{}, ErrPeerGone
	}
	if !tcpAlive(conn) {
		return Cred{}, ErrPeerGone
	}
	return Cred{UID: sock.uid}, nil
}

// undiagnosed is an error if the kernel cannot look up TCP sockets at all: it
// then answers ENOENT, as it does for a socket that is not there, even when
// asked for our own end of a connection that lives.
func undiagnosed(conn *net.TCPConn, local, remote netip.AddrPort) error {
	if _, err := diag.lookup(local, remote); errors.Is(err, unix.ENOENT) && tcpAlive(conn) {
		return fmt.Errorf("%w: the kernel lacks the module tcp_diag; load it", ErrUnsupported)
	}
	return nil
}

// tcpAlive reports whether the kernel still holds the connection's addresses for it.
func tcpAlive(conn *net.TCPConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	alive := false
	return raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		alive = err == nil && connectedState(info.State)
	}) == nil && alive
}

var errNoListener = fmt.Errorf("nobody listens there any more: %w", ErrForeignListener)

func tcpListenerOwnedBy(conn *net.TCPConn, local, remote netip.AddrPort, pids []int) error {
	// A foreign address of 0 matches no connection, so the kernel goes on to find
	// the listener that a new connection would reach.
	nobody := netip.AddrPortFrom(unspecified(remote.Addr()), 0)
	sock, err := diag.lookup(remote, nobody)
	if errors.Is(err, unix.ENOENT) {
		return cmp.Or(undiagnosed(conn, local, remote), errNoListener)
	}
	if err != nil {
		return err
	}
	if sock.state != tcpListen || sock.inode == 0 || sock.local.Port() != remote.Port() {
		return errNoListener
	}
	if sock.local.Addr().IsUnspecified() {
		return ErrWildcard
	}
	if sock.local != remote {
		return fmt.Errorf("it listens on %s: %w", sock.local, ErrForeignListener)
	}
	return heldBy(sock, pids)
}

// heldBy says whether one of the processes has the socket.
func heldBy(sock diagSocket, pids []int) error {
	var unreadable error
	for _, pid := range pids {
		held, err := holdsSocket(pid, sock.inode)
		if errors.Is(err, fs.ErrPermission) {
			held, err = runsAs(pid, sock.uid)
		}
		if held {
			return nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			unreadable = err
		}
	}
	if unreadable != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, unreadable)
	}
	return fmt.Errorf("%w: it is of uid %d, and none of the processes %v has it", ErrForeignListener, sock.uid, pids)
}

func unspecified(like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// holdsSocket reports whether a process has a descriptor of the socket.
func holdsSocket(pid int, inode uint32) (bool, error) {
	dir, err := os.Open("/proc/" + strconv.Itoa(pid) + "/fd")
	if err != nil {
		return false, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return false, err
	}
	want := "socket:[" + strconv.FormatUint(uint64(inode), 10) + "]"
	for _, name := range names {
		link, err := os.Readlink(dir.Name() + "/" + name)
		if err == nil && link == want {
			return true, nil
		}
		if errors.Is(err, fs.ErrPermission) {
			return false, err
		}
	}
	return false, nil
}

// runsAs reports whether a process has the effective uid.
func runsAs(pid int, uid uint32) (bool, error) {
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false, err
	}
	lines := bufio.NewScanner(bytes.NewReader(status))
	for lines.Scan() {
		// Uid: real effective saved filesystem
		if fields := bytes.Fields(lines.Bytes()); len(fields) == 5 && string(fields[0]) == "Uid:" {
			return string(fields[2]) == strconv.FormatUint(uint64(uid), 10), nil
		}
	}
	return false, fmt.Errorf("the status of process %d names no uid: %w", pid, fs.ErrPermission)
}

func udpPeer(local, from netip.AddrPort) (Cred, error) {
	sock, err := diag.lookupUDP(from, local)
	if errors.Is(err, unix.ENOENT) {
		return Cred{}, cmp.Or(undiagnosedUDP(local, from), ErrPeerGone)
	}
	if err != nil {
		return Cred{}, err
	}
	// A socket of all addresses sends from the one that the answer goes to.
	if sock.local.Port() != from.Port() || sock.local.Addr() != from.Addr() && !sock.local.Addr().IsUnspecified() || sock.inode == 0 {
		return Cred{}, ErrPeerGone
	}
	return Cred{UID: sock.uid}, nil
}

// undiagnosedUDP is undiagnosed for UDP: our own socket is there for certain.
func undiagnosedUDP(local, from netip.AddrPort) error {
	if _, err := diag.lookupUDP(local, from); errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: the kernel lacks the module udp_diag; load it", ErrUnsupported)
	}
	return nil
}

func udpOwnedBy(addr netip.AddrPort, pids []int) error {
	// Whoever sends from port 0, which nobody has, reaches what is not connected.
	sock, err := diag.lookupUDP(addr, netip.AddrPortFrom(addr.Addr(), 0))
	switch {
	case errors.Is(err, unix.ENOENT):
		return errNoListener
	case err != nil:
		return err
	case sock.inode == 0 || sock.local.Port() != addr.Port():
		return errNoListener
	case sock.local.Addr().IsUnspecified():
		return ErrWildcard
	case sock.local != addr:
		return fmt.Errorf("it is bound to %s: %w", sock.local, ErrForeignListener)
	}
	return heldBy(sock, pids)
}
