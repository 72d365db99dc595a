package localnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// Errors about the other end of a connection.
var (
	// ErrUnsupported says that this system, or this kind of connection, does not
	// tell who is at the other end.
	// It is an [errors.ErrUnsupported].
	ErrUnsupported = fmt.Errorf("the system cannot tell who is at the other end: %w", errors.ErrUnsupported)

	// ErrPeerGone says that the other end's socket is closed already, so that
	// nobody can tell whose it was.
	ErrPeerGone = errors.New("the other end is gone, and so is the record of whose it was")

	// ErrWildcard says that a listener takes connections on all addresses of the
	// machine, the network's included.
	ErrWildcard = errors.New("the socket listens on all addresses, not on the loopback alone")

	// ErrForeignListener says that a listening socket belongs to another process.
	ErrForeignListener = errors.New("the listening socket belongs to another process")

	// ErrNoListener says that nobody listens on an address.
	ErrNoListener = errors.New("nobody listens there")
)

// A Cred is who is at the other end of a connection.
type Cred struct {
	UID uint32
	PID int // 0 if it is not known, as always on TCP
}

// Peer says which user is at the other end of a connection, which is exactly a
// [*net.UnixConn] or a loopback [*net.TCPConn]. On a unix socket that is who
// connected, or for the client's end who began to listen. On TCP it answers the
// accepting end only, for as long as the client keeps its socket: afterwards the
// error is [ErrPeerGone], never a guess. A dialing end asks [ListenerOwnedBy].
// Where a system cannot tell, the error is [ErrUnsupported].
//
// On Linux the first call for TCP opens one descriptor, which is kept.
func Peer(conn net.Conn) (Cred, error) {
	switch conn := conn.(type) {
	case *net.UnixConn:
		cred, err := unixPeer(conn)
		if err != nil {
			return Cred{}, fmt.Errorf("localnet: peer of a unix socket: %w", err)
		}
		return cred, nil
	case *net.TCPConn:
		local, remote, err := loopbackEnds(conn)
		if err != nil {
			return Cred{}, fmt.Errorf("localnet: peer: %w", err)
		}
		cred, err := tcpPeer(conn, local, remote)
		if err != nil {
			return Cred{}, fmt.Errorf("localnet: peer of TCP connection from %s: %w", remote, err)
		}
		return cred, nil
	}
	// A type that wraps a connection may say anything about its addresses.
	return Cred{}, fmt.Errorf("localnet: peer of a %T: %w", conn, ErrUnsupported)
}

// ListenerOwnedBy says whether the socket that a client's connection leads to
// belongs to one of the processes pids: nil if so, else [ErrForeignListener],
// [ErrWildcard], or [ErrUnsupported] where the system cannot tell. conn is
// exactly a [*net.UnixConn] or a loopback [*net.TCPConn], and still open. For a
// process whose descriptors may not be read, the same user is enough (SOCKS-18).
func ListenerOwnedBy(conn net.Conn, pids []int) error {
	switch conn := conn.(type) {
	case *net.UnixConn:
		cred, err := unixPeer(conn)
		if err != nil {
			return fmt.Errorf("localnet: owner of a unix listener: %w", err)
		}
		// A process outside of our PID namespace has the number 0, and is none of pids.
		if cred.PID != 0 && slices.Contains(pids, cred.PID) {
			return nil
		}
		return fmt.Errorf("localnet: %w: process %d of uid %d listens, not one of %v", ErrForeignListener, cred.PID, cred.UID, pids)
	case *net.TCPConn:
		local, remote, err := loopbackEnds(conn)
		if err != nil {
			return fmt.Errorf("localnet: owner of a listener: %w", err)
		}
		if err := tcpListenerOwnedBy(conn, local, remote, pids); err != nil {
			return fmt.Errorf("localnet: owner of the listener on %s: %w", remote, err)
		}
		return nil
	}
	return fmt.Errorf("localnet: owner of the listener behind a %T: %w", conn, ErrUnsupported)
}

// ListenerAt says who listens on an address of the network "tcp", or has it on "udp",
// without connecting to it, which would be the beginning of something for who listens: nil if it is one of the processes pids,
// else [ErrNoListener], [ErrForeignListener], [ErrWildcard] where the socket takes
// connections on all addresses and addr is a single one, or [ErrUnsupported] where the
// system cannot tell. As with [ListenerOwnedBy], the same user is enough for a process whose
// descriptors may not be read.
func ListenerAt(network string, addr netip.AddrPort, pids []int) error {
	if err := listenerAt(network, unmap(addr), pids); err != nil {
		return fmt.Errorf("localnet: the listener on %s %s: %w", network, addr, err)
	}
	return nil
}

// RunsAs reports whether a process has this effective user. It is false where the system
// does not tell.
func RunsAs(pid int, uid uint32) bool {
	same, err := runsAs(pid, uid)
	return err == nil && same
}

// loopbackEnds are the addresses of both ends, which share this machine.
func loopbackEnds(conn *net.TCPConn) (local, remote netip.AddrPort, err error) {
	if l, ok := conn.LocalAddr().(*net.TCPAddr); ok {
		local = unmap(l.AddrPort())
	}
	if r, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		remote = unmap(r.AddrPort())
	}
	if !local.Addr().IsLoopback() || !remote.Addr().IsLoopback() {
		return local, remote, fmt.Errorf("%w: a connection from %s to %s is not on the loopback", ErrAddr, remote, local)
	}
	return local, remote, nil
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
