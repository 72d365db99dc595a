package localnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// The kernel's structures of linux/netlink.h, sock_diag.h and inet_diag.h: a
// request is a header and an inet_diag_req_v2, a reply a header and an
// inet_diag_msg with attributes after it. Both hold an inet_diag_sockid.
const (
	headerLen  = 16
	sockidLen  = 48
	requestLen = headerLen + 8 + sockidLen
	messageLen = 4 + sockidLen + 20
)

// States of linux/tcp_states.h.
const (
	tcpEstablished = 1
	tcpFinWait1    = 4
	tcpFinWait2    = 5
	tcpCloseWait   = 8
	tcpLastAck     = 9
	tcpListen      = 10
	tcpClosing     = 11
)

// connectedState reports whether a socket has got a connection and still has it.
func connectedState(state uint8) bool {
	switch state {
	case tcpEstablished, tcpFinWait1, tcpFinWait2, tcpCloseWait, tcpLastAck, tcpClosing:
		return true
	}
	return false
}

// A diagSocket is what the kernel says of one socket.
type diagSocket struct {
	local, remote netip.AddrPort // IPv4-mapped addresses as IPv4
	state         uint8
	uid           uint32
	inode         uint32 // 0: no process holds it
}

func (s diagSocket) connected() bool { return connectedState(s.state) }

// diag serves the whole process: a look-up is 2 µs, so its users can queue.
var diag = diagClient{fd: -1}

// A diagClient asks the kernel about single sockets over NETLINK_SOCK_DIAG.
type diagClient struct {
	mu     sync.Mutex
	fd     int // -1: not open
	port   uint32
	seq    uint32
	buffer [4096]byte
}

// lookup finds the socket with these addresses, or without a connection between
// them the listener that a connection to local would reach. The error wraps
// unix.ENOENT if there is neither.
func (c *diagClient) lookup(local, remote netip.AddrPort) (diagSocket, error) {
	return c.find(unix.IPPROTO_TCP, local, remote)
}

// lookupUDP finds the socket that a datagram from remote to local would reach.
func (c *diagClient) lookupUDP(local, remote netip.AddrPort) (diagSocket, error) {
	// The kernel takes source and destination of a look-up as those of the datagram,
	// which for TCP it takes as those of the socket.
	return c.find(unix.IPPROTO_UDP, remote, local)
}

func (c *diagClient) find(protocol uint8, local, remote netip.AddrPort) (diagSocket, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		if err := c.open(); temporary(err) {
			return diagSocket{}, err
		} else if err != nil {
			return diagSocket{}, fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
	}
	sock, err := c.exchange(protocol, local, remote)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		// Whatever is left in the socket must not answer the next question.
		unix.Close(c.fd)
		c.fd = -1
	}
	return sock, err
}

func (c *diagClient) open() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return os.NewSyscallError("socket NETLINK_SOCK_DIAG", err)
	}
	// The kernel answers within the send; the limit is for the case that it does not.
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
	if err == nil {
		// Connected to the kernel, the socket takes messages of no other process.
		err = unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	var name unix.Sockaddr
	if err == nil {
		name, err = unix.Getsockname(fd)
	}
	if err != nil {
		unix.Close(fd)
		return os.NewSyscallError("NETLINK_SOCK_DIAG", err)
	}
	c.fd, c.port = fd, name.(*unix.SockaddrNetlink).Pid
	return nil
}

func (c *diagClient) exchange(protocol uint8, local, remote netip.AddrPort) (diagSocket, error) {
	c.seq++
	request := diagRequest(protocol, c.seq, local, remote)
	if _, err := retry(func() (int, error) { return unix.Write(c.fd, request[:]) }); err != nil {
		return diagSocket{}, os.NewSyscallError("write to NETLINK_SOCK_DIAG", err)
	}
	n, err := retry(func() (int, error) { return unix.Read(c.fd, c.buffer[:]) })
	if err != nil {
		return diagSocket{}, os.NewSyscallError("read from NETLINK_SOCK_DIAG", err)
	}
	return parseDiag(c.buffer[:n], c.seq, c.port)
}

func retry(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); err != unix.EINTR { //nolint:errorlint // a bare errno
			return n, err
		}
	}
}

func diagRequest(protocol uint8, seq uint32, local, remote netip.AddrPort) (b [requestLen]byte) {
	native := binary.NativeEndian
	native.PutUint32(b[0:], requestLen)
	native.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	native.PutUint16(b[6:], unix.NLM_F_REQUEST)
	native.PutUint32(b[8:], seq)
	b[16] = unix.AF_INET6
	if local.Addr().Is4() {
		b[16] = unix.AF_INET
	}
	b[17] = protocol
	native.PutUint32(b[20:], ^uint32(0)) // any state
	id := b[24:]
	binary.BigEndian.PutUint16(id[0:], local.Port())
	binary.BigEndian.PutUint16(id[2:], remote.Port())
	copy(id[4:], local.Addr().AsSlice())
	copy(id[20:], remote.Addr().AsSlice())
	native.PutUint64(id[40:], ^uint64(0)) // INET_DIAG_NOCOOKIE
	return b
}

// parseDiag reads the one message of a reply.
func parseDiag(b []byte, seq, port uint32) (diagSocket, error) {
	native := binary.NativeEndian
	if len(b) < headerLen {
		return diagSocket{}, fmt.Errorf("a netlink reply of %d bytes is too short", len(b))
	}
	size, kind := native.Uint32(b), native.Uint16(b[4:])
	if size < headerLen || uint64(size) > uint64(len(b)) {
		return diagSocket{}, fmt.Errorf("a netlink reply of %d bytes says that it has %d", len(b), size)
	}
	if s, p := native.Uint32(b[8:]), native.Uint32(b[12:]); s != seq || p != port {
		return diagSocket{}, fmt.Errorf("a netlink reply to request %d of port %d, not to %d of %d", s, p, seq, port)
	}
	body := b[headerLen:size]
	switch kind {
	case unix.NLMSG_ERROR:
		if len(body) < 4 {
			return diagSocket{}, errors.New("a netlink error is too short")
		}
		code := int32(native.Uint32(body))
		if code >= 0 || code < -4095 {
			return diagSocket{}, fmt.Errorf("a netlink error has code %d", code)
		}
		return diagSocket{}, os.NewSyscallError("NETLINK_SOCK_DIAG", unix.Errno(-code))
	case unix.SOCK_DIAG_BY_FAMILY:
	default:
		return diagSocket{}, fmt.Errorf("a netlink reply has type %d", kind)
	}
	if len(body) < messageLen {
		return diagSocket{}, fmt.Errorf("a socket's description has %d bytes, not %d", len(body), messageLen)
	}
	id := body[4:]
	local, ok := diagAddr(body[0], id[4:20], id[0:2])
	remote, ok2 := diagAddr(body[0], id[20:36], id[2:4])
	if !ok || !ok2 {
		return diagSocket{}, fmt.Errorf("a socket of address family %d", body[0])
	}
	return diagSocket{
		local:  local,
		remote: remote,
		state:  body[1],
		uid:    native.Uint32(body[64:]),
		inode:  native.Uint32(body[68:]),
	}, nil
}

func diagAddr(family uint8, addr, port []byte) (netip.AddrPort, bool) {
	var a netip.Addr
	switch family {
	case unix.AF_INET:
		a = netip.AddrFrom4([4]byte(addr))
	case unix.AF_INET6: // also a socket of IPv6 that talks IPv4
		a = netip.AddrFrom16([16]byte(addr)).Unmap()
	default:
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port)), true
}
