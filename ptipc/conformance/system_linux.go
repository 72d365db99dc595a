package conformance

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The states of a socket, as the kernel numbers them.
const (
	stateConnecting  = 2
	stateUnconnected = 7 // in which a socket for datagrams takes what comes from anybody
	stateListening   = 10
)

// listening returns the addresses on which the processes take what comes from anybody:
// connections over TCP, and datagrams over UDP.
func listening(pids []int) (tcp, udp []netip.AddrPort, err error) {
	own := map[string]bool{}
	for _, pid := range pids {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return nil, nil, err
		}
		for _, fd := range fds {
			if link, err := os.Readlink(fd); err == nil { // it may have been closed just now
				own[strings.TrimSuffix(strings.TrimPrefix(link, "socket:["), "]")] = true
			}
		}
	}
	find := func(protocol, state uint8) (found []netip.AddrPort) {
		sockets, serr := socketsIn(protocol, state)
		err = errors.Join(err, serr)
		for _, s := range sockets {
			if own[strconv.FormatUint(uint64(s.inode), 10)] {
				found = append(found, s.local)
			}
		}
		return found
	}
	return find(unix.IPPROTO_TCP, stateListening), find(unix.IPPROTO_UDP, stateUnconnected), err
}

// dialing reports whether somebody is about to connect to an address.
func dialing(to netip.AddrPort) (bool, error) {
	sockets, err := socketsIn(unix.IPPROTO_TCP, stateConnecting)
	for _, s := range sockets {
		if s.remote == to {
			return true, nil
		}
	}
	return false, err
}

type socket struct {
	local, remote netip.AddrPort
	unread        int // bytes in its queue, or connections
	inode         uint32
}

// socketsIn are all sockets of one state in this network namespace, which is the
// child's as well, since its sockets are on the loopback of both. /proc/net/tcp has
// them too, but takes long to read when many connections have ended lately.
func socketsIn(protocol, state uint8) ([]socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("ask the kernel for sockets: %w", err)
	}
	defer unix.Close(fd)
	var sockets []socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := askSockets(fd, socketsAsked(family, protocol, 1<<state, unix.NLM_F_DUMP)); err != nil {
			return nil, err
		}
		found, err := readSockets(fd)
		if err != nil {
			return nil, err
		}
		sockets = append(sockets, found...)
	}
	return sockets, nil
}

// socketsAsked is struct nlmsghdr and struct inet_diag_req_v2 of <linux/inet_diag.h>.
func socketsAsked(family, protocol uint8, states uint32, flags uint16) []byte {
	ask := make([]byte, 72)
	binary.NativeEndian.PutUint32(ask, uint32(len(ask)))
	binary.NativeEndian.PutUint16(ask[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(ask[6:], unix.NLM_F_REQUEST|flags)
	ask[16], ask[17] = family, protocol
	binary.NativeEndian.PutUint32(ask[20:], states)
	return ask
}

func askSockets(fd int, ask []byte) error {
	if err := unix.Sendto(fd, ask, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask the kernel for sockets: %w", err)
	}
	return nil
}

// unread returns how many bytes of a connection's the process at its other end, on this
// machine, has not read. For a unix socket it is a measure of their memory.
func unread(conn net.Conn) (n int, err error) {
	if local, ok := conn.(*net.UnixConn); ok {
		raw, err := local.SyscallConn()
		if err != nil {
			return 0, err
		}
		if cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); cerr != nil {
			return 0, cerr
		}
		return n, err
	}
	own, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return 0, err
	}
	other, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return 0, err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return 0, fmt.Errorf("ask the kernel for sockets: %w", err)
	}
	defer unix.Close(fd)
	family := uint8(unix.AF_INET)
	if other.Addr().Is6() {
		family = unix.AF_INET6
	}
	ask := socketsAsked(family, unix.IPPROTO_TCP, ^uint32(0), 0)
	// struct inet_diag_sockid, as the other end has it, and any cookie.
	binary.BigEndian.PutUint16(ask[24:], other.Port())
	binary.BigEndian.PutUint16(ask[26:], own.Port())
	copy(ask[28:44], other.Addr().AsSlice())
	copy(ask[44:60], own.Addr().AsSlice())
	binary.NativeEndian.PutUint64(ask[64:], ^uint64(0))
	if err := askSockets(fd, ask); err != nil {
		return 0, err
	}
	found, err := readSockets(fd)
	if err != nil || len(found) == 0 {
		return 0, err
	}
	return found[0].unread, nil
}

// readSockets reads one answer of the kernel's.
func readSockets(fd int) ([]socket, error) {
	var sockets []socket
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, b)
		if err != nil {
			return nil, fmt.Errorf("ask the kernel for sockets: %w", err)
		}
		messages, err := syscall.ParseNetlinkMessage(b[:n])
		if err != nil {
			return nil, fmt.Errorf("ask the kernel for sockets: %w", err)
		}
		for _, m := range messages {
			switch {
			case m.Header.Type == unix.NLMSG_DONE:
				return sockets, nil
			case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
				return nil, fmt.Errorf("ask the kernel for sockets: %w", syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data))))
			case len(m.Data) >= 72: // struct inet_diag_msg
				sockets = append(sockets, socket{
					local:  kernelAddr(m.Data[0], m.Data[8:], m.Data[4:]),
					remote: kernelAddr(m.Data[0], m.Data[24:], m.Data[6:]),
					unread: int(binary.NativeEndian.Uint32(m.Data[56:])),
					inode:  binary.NativeEndian.Uint32(m.Data[68:]),
				})
				if m.Header.Flags&unix.NLM_F_MULTI == 0 {
					return sockets, nil // it was about one socket
				}
			}
		}
	}
}

// kernelAddr reads an address of struct inet_diag_sockid.
func kernelAddr(family uint8, ip, port []byte) netip.AddrPort {
	addr := netip.AddrFrom4([4]byte(ip))
	if family == unix.AF_INET6 {
		addr = netip.AddrFrom16([16]byte(ip)).Unmap()
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(port))
}

// descriptors counts those that a process has open.
func descriptors(pid int) int {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return 0
	}
	return len(fds)
}

// asUser runs f as another user of the machine. Users belong to threads here, so
// that the rest of this process keeps its own.
func asUser(uid int, f func() error) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("only root can connect as another user")
	}
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // without an Unlock: the thread ends with the goroutine
		keep := ^uintptr(0)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
			ended <- fmt.Errorf("become user %d: %w", uid, errno)
			return
		}
		ended <- f()
	}()
	return <-ended
}

// fill makes a listener's queue so short that one connection fills it, so that
// later ones have no answer until somebody accepts.
func fill(l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) }); cerr != nil {
		return cerr
	}
	return err
}

// sendSocket sends one byte with the descriptor of a socket.
func sendSocket(over net.Conn, socket *net.TCPConn) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	closed := raw.Control(func(fd uintptr) {
		_, _, err = over.(*net.UnixConn).WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(closed, err)
}

// disconnect resets a connection of which another process has the socket too.
func disconnect(socket *net.TCPConn) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	unspecified := unix.RawSockaddrAny{Addr: unix.RawSockaddr{Family: unix.AF_UNSPEC}}
	var errno unix.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&unspecified)), unix.SizeofSockaddrInet4)
	})
	if errno != 0 {
		err = errors.Join(err, errno)
	}
	return err
}

// hungUp reports whether the other end of a unix socket is closed.
func hungUp(conn net.Conn) bool {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return true
	}
	is := true
	_ = raw.Control(func(fd uintptr) {
		state := []unix.PollFd{{Fd: int32(fd)}}
		_, _ = unix.Poll(state, 0) // it says nothing else
		is = state[0].Revents&unix.POLLHUP != 0
	})
	return is
}
