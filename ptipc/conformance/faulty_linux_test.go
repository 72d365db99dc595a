package conformance_test

import (
	"bufio"
	"bytes"
	"cmp"
	"io"
	"net"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// bindTCP takes a port at which nobody listens before the function it returns does.
// Without SO_REUSEADDR nobody else gets it meanwhile.
func bindTCP() (listen func() (net.Listener, error), addr string, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, "", err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return nil, "", err
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, "", err
	}
	return func() (net.Listener, error) {
		if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
			return nil, err
		}
		file := os.NewFile(uintptr(fd), "late")
		defer file.Close()
		return net.FileListener(file)
	}, "127.0.0.1:" + strconv.Itoa(name.(*unix.SockaddrInet4).Port), nil
}

// A faultyTaker takes over the socket of the host, with nothing but what any language has.
type faultyTaker struct {
	*net.UnixConn
	f     *faulty
	end   *faultyEnd
	early io.Reader // what came with the handshake; nil if nothing

	mu      sync.Mutex
	over    *net.TCPConn // nil until it has come
	writes  bool         // what is written goes to over
	hasSent bool         // the direction has ended before
}

func (f *faulty) taker(conn net.Conn, end *faultyEnd, early *bufio.Reader) (halfCloser, func(clean bool)) {
	socket, ok := conn.(*net.UnixConn)
	if end == nil || !ok {
		return nil, func(bool) {}
	}
	t := &faultyTaker{UnixConn: socket, f: f, end: end}
	if early != nil && early.Buffered() > 0 {
		b, _ := early.Peek(early.Buffered())
		t.early = bytes.NewReader(b)
	}
	end.note(2)
	return t, t.finish
}

func (t *faultyTaker) taken() *net.TCPConn {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.over
}

func (t *faultyTaker) Read(p []byte) (int, error) {
	if t.early != nil {
		if n, err := t.early.Read(p); err == nil {
			return n, nil
		}
		t.early = nil
	}
	if over := t.taken(); over != nil {
		return over.Read(p)
	}
	rights := make([]byte, unix.CmsgSpace(4))
	n, m, _, _, err := t.ReadMsgUnix(p, rights)
	if err != nil || n == 0 {
		return 0, cmp.Or(err, io.EOF)
	}
	if m == 0 {
		return n, nil
	}
	if err := t.take(rights[:m]); err != nil || n > 1 {
		return n - 1, err
	}
	return t.Read(p)
}

func (t *faultyTaker) take(rights []byte) error {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fds[0]), "handed over")
	defer file.Close()
	if t.f.is("reads on from the unix socket") {
		return nil
	}
	conn, err := net.FileConn(file)
	if err == nil {
		t.mu.Lock()
		t.over = conn.(*net.TCPConn)
		t.mu.Unlock()
	}
	return err
}

// turn ends the direction on the unix socket and waits for the host.
func (t *faultyTaker) turn() *net.TCPConn {
	over := t.taken()
	if over == nil || t.writes || t.hasSent {
		return over
	}
	t.writes = true
	_ = t.UnixConn.CloseWrite()
	if !t.f.is("does not wait for the host") {
		_, _ = io.ReadFull(t.UnixConn, make([]byte, 1))
	}
	return over
}

func (t *faultyTaker) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if over := t.turn(); over != nil {
		return over.Write(p)
	}
	return t.UnixConn.Write(p)
}

func (t *faultyTaker) CloseWrite() error {
	if over := t.turn(); over != nil {
		return over.CloseWrite()
	}
	t.hasSent = true
	return t.UnixConn.CloseWrite()
}

// finish closes what was taken.
func (t *faultyTaker) finish(clean bool) {
	over := t.taken()
	if over == nil {
		return
	}
	over.Close()
	if clean && !t.f.is("never finishes") {
		t.end.note(4)
	}
}
