package socks

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start serves s on l and shuts it down at the end of the test, when all of its
// connections must have ended, or end soon.
func start(t testing.TB, s *Server, l net.Listener) {
	t.Helper()
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error("Shutdown:", err)
		}
		if err := <-served; err != nil {
			t.Error("Serve:", err)
		}
	})
}

// listen returns a listener of a network, "pipe" included, and how to reach it.
func listen(t testing.TB, network string) (net.Listener, func() net.Conn) {
	t.Helper()
	var l net.Listener
	var err error
	switch network {
	case "pipe":
		p := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		return p, p.dial
	case "unix":
		dir, derr := os.MkdirTemp("", "socks") //nolint:usetesting // t.TempDir is too long for the path of a socket
		if derr != nil {
			t.Fatal(derr)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		l, err = net.Listen("unix", filepath.Join(dir, "s"))
	default:
		l, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		t.Fatal(err)
	}
	return l, func() net.Conn {
		conn, err := net.Dial(l.Addr().Network(), l.Addr().String())
		if err != nil {
			t.Error(err)
			return nil
		}
		return conn
	}
}

// A pipeListener accepts one end of a net.Pipe for each dial.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) dial() net.Conn {
	near, far := net.Pipe()
	select {
	case l.conns <- far:
	case <-l.closed:
	}
	return near
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

// connected returns the two ends of a connection over a network.
func connected(t testing.TB, network string) (near, far net.Conn) {
	t.Helper()
	l, dial := listen(t, network)
	defer l.Close()
	accepted := make(chan net.Conn)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		accepted <- c
	}()
	near = dial()
	far = <-accepted
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// readExactly reads n bytes.
func readExactly(t testing.TB, r io.Reader, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if m, err := io.ReadFull(r, b); err != nil {
		t.Fatalf("got % x and then %v, want %d bytes", b[:m], err, n)
	}
	return b
}
