package socks

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// watchSocket waits until the client on a socket has hung up, and then returns
// true, or until the read deadline. Nothing is read: early data stays in the
// kernel, which bounds it. ok is false if conn is not a socket.
func watchSocket(conn net.Conn, early bool) (gone, ok bool) {
	// Exactly these types: one that embeds them may read its stream from elsewhere.
	var socket syscall.Conn
	switch conn := conn.(type) {
	case *net.TCPConn:
		socket = conn
	case *net.UnixConn:
		socket = conn
	default:
		return false, false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return true, true // closed
	}
	err = raw.Read(func(fd uintptr) bool {
		gone, early = hungUp(int(fd), early)
		return gone
	})
	return gone || err != nil && !errors.Is(err, os.ErrDeadlineExceeded), true
}

// hungUp looks at a socket without waiting (SOCKS-14). It also returns whether
// there was early data, before or now.
func hungUp(fd int, early bool) (gone, stillEarly bool) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return false, early // interrupted; the next event brings us back
	}
	// A reset on TCP. On a unix socket the other end is closed whole, which
	// is more than the end of its stream: it cannot read an answer.
	if fds[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0 {
		return true, early
	}
	if early || fds[0].Revents&unix.POLLIN == 0 {
		return false, early
	}
	var b [1]byte
	n, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	switch {
	case err == nil:
		return n == 0, n > 0
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return false, false
	}
	return true, false
}
