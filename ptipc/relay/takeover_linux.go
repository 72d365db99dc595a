package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A taker is a connection over a unix socket whose other end may hand over the
// socket that is behind it. From then on it is that socket which is read, and, as soon as
// the other end has passed on what was written before, also written (SOCKS-23 to SOCKS-25).
type taker struct {
	*Conn
	unix    *net.UnixConn
	raw     syscall.RawConn
	receive receive
	over    atomic.Pointer[net.TCPConn] // the other end's; nil until it has come

	ended    atomic.Bool // the direction was ended while it was on the unix socket
	switched atomic.Bool // what is written goes to over

	mu      sync.Mutex
	aborted bool
}

// newTaker returns nil if c does not take over.
func newTaker(c net.Conn) *taker {
	conn, ok := c.(*Conn)
	if !ok || !conn.opts.TakeOver || conn.opts.End == nil {
		return nil
	}
	socket, ok := conn.raw.(*net.UnixConn)
	if !ok {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil || !roomy(raw) {
		return nil
	}
	t := &taker{Conn: conn, unix: socket, raw: raw}
	t.receive.call = t.receive.attempt
	conn.opts.End.Take()
	return t
}

// roomy reports whether there are descriptors to spare: the number of a new one tells how many
// are open. A socket that comes when there are none left is lost, and its stream breaks.
func roomy(raw syscall.RawConn) bool {
	room := false
	_ = raw.Control(func(fd uintptr) { room = uint64(fd) < mostDescriptors()/2 })
	return room
}

var mostDescriptors = sync.OnceValue(func() uint64 {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 0
	}
	return limit.Cur
})

// socket is what Read reads.
func (t *taker) socket() net.Conn {
	if over := t.over.Load(); over != nil {
		return over
	}
	return t.unix
}

func (t *taker) Read(p []byte) (int, error) {
	over := t.over.Load()
	if over == nil {
		n, fd, err := t.receive.from(t.raw, p)
		if fd >= 0 {
			n-- // the byte that the descriptor came with
			over, err = t.take(fd)
		}
		t.received.Add(uint64(n))
		if n > 0 || err != nil {
			if err == io.EOF && !t.opts.End.Marked() { //nolint:errorlint // see copyConn
				err = errBroken
			}
			return n, err
		}
	}
	n, err := over.Read(p)
	t.received.Add(uint64(n))
	if err == io.EOF && t.broken(over) { //nolint:errorlint // see copyConn
		err = errBroken
	}
	return n, err
}

// take makes a connection of a descriptor that has come.
func (t *taker) take(fd int) (*net.TCPConn, error) {
	file := os.NewFile(uintptr(fd), "handed over")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("relay: what was handed over is no connection: %w", err)
	}
	over, ok := conn.(*net.TCPConn)
	if !ok {
		_ = conn.Close()
		return nil, fmt.Errorf("relay: what was handed over is no TCP connection, but a %T: %w", conn, errors.ErrUnsupported)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.aborted {
		_ = over.Close()
		return nil, fmt.Errorf("relay: %w", net.ErrClosed)
	}
	t.over.Store(over)
	return over, nil
}

// broken reports whether the end that a Read has seen was a reset of which the error
// is lost: the other process may have had it, with the last that it had to write. A
// connection is closed then, and after an end only if its other direction has ended too.
func (t *taker) broken(over *net.TCPConn) bool {
	switch {
	case !isClosed(over) || t.switched.Load():
		return false
	case t.ended.Load():
		return t.await() != nil // the other process knows
	}
	return true
}

func isClosed(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	is := true
	_ = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		is = err != nil || info.State == unix.BPF_TCP_CLOSE
	})
	return is
}

func (t *taker) Write(p []byte) (int, error) {
	if t.over.Load() == nil {
		return t.Conn.Write(p)
	}
	if err := t.switchOver(); err != nil {
		return 0, err
	}
	n, err := t.over.Load().Write(p)
	t.sent.Add(uint64(n))
	return n, err
}

// CloseWrite ends the direction on whichever socket it is on. When the other socket comes
// later than that, it is for reading alone.
func (t *taker) CloseWrite() error {
	if t.over.Load() == nil {
		t.ended.Store(true)
		return t.Conn.CloseWrite()
	}
	if err := t.switchOver(); err != nil {
		return err
	}
	return t.over.Load().CloseWrite()
}

// switchOver waits until the other end has passed on all that was written to it: it reads up
// to the end of the stream, and answers with a byte.
func (t *taker) switchOver() error {
	if t.switched.Load() {
		return nil
	}
	if err := t.unix.CloseWrite(); err != nil {
		return err
	}
	if err := t.await(); err != nil {
		return err
	}
	t.switched.Store(true)
	return nil
}

func (t *taker) await() error {
	var answer [1]byte
	if _, err := io.ReadFull(t.unix, answer[:]); err != nil {
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	return nil
}

// Abort makes both sockets break.
func (t *taker) Abort() error {
	t.mu.Lock()
	t.aborted = true
	over := t.over.Load()
	t.mu.Unlock()
	if over != nil {
		_ = Abort(over) // the other process resets the connection, if this does not
	}
	return t.Conn.Abort()
}

// finish notes that all has ended as it should, before release and Close.
func (t *taker) finish() {
	if over := t.over.Load(); over != nil {
		_ = over.Close()
		t.opts.End.Finish()
	}
}

// release closes the socket that has come.
func (t *taker) release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.aborted = true
	if over := t.over.Load(); over != nil {
		_ = over.Close() // perhaps not for the first time
	}
}

// A receive reads from a unix socket, and takes a descriptor that comes with the bytes. Nobody but
// one goroutine uses it. The function of the standard library would make a name of
// the peer's address each time.
type receive struct {
	call    func(fd uintptr) bool
	p       []byte
	control [32]byte // room for one descriptor
	n       int
	fd      int
	err     error
}

// from fills p, which has room. It returns -1 as the descriptor if none has come.
func (r *receive) from(raw syscall.RawConn, p []byte) (n, fd int, err error) {
	r.p = p
	err = raw.Read(r.call)
	r.p = nil
	if err == nil {
		err = r.err
	}
	if err != nil {
		return 0, -1, err
	}
	if r.n == 0 {
		return 0, -1, io.EOF
	}
	return r.n, r.fd, nil
}

func (r *receive) attempt(socket uintptr) bool {
	iov := unix.Iovec{Base: unsafe.SliceData(r.p)}
	iov.SetLen(len(r.p))
	message := unix.Msghdr{Iov: &iov, Control: &r.control[0]}
	message.SetIovlen(1)
	message.SetControllen(len(r.control))
	for {
		n, _, errno := unix.Syscall(unix.SYS_RECVMSG, socket, uintptr(unsafe.Pointer(&message)), unix.MSG_CMSG_CLOEXEC)
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		case 0:
			r.n, r.fd, r.err = int(n), -1, nil
			r.takeControl(int(message.Controllen), int(message.Flags))
		default:
			r.n, r.fd, r.err = 0, -1, os.NewSyscallError("recvmsg", errno)
		}
		return true
	}
}

// takeControl takes the descriptor.
func (r *receive) takeControl(length, flags int) {
	if flags&unix.MSG_CTRUNC != 0 {
		r.err = errors.New("relay: a socket was handed over, and there is no descriptor left for it")
	}
	if length == 0 {
		return
	}
	messages, err := unix.ParseSocketControlMessage(r.control[:length])
	if err != nil {
		r.err = errors.Join(r.err, os.NewSyscallError("recvmsg", err))
		return
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if r.fd < 0 && r.err == nil {
				r.fd = fd
			} else {
				unix.Close(fd)
			}
		}
	}
}
