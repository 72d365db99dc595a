package free

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/ptipc/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The carrier of these tests: TCP on the loopback, without anything around it.
var carrier = ptipc.ServerFactory{
	GenerateConfig: func(_ context.Context, options ptipc.Opaque, _ ptipc.Env) (client, server ptipc.Opaque, err error) {
		var o struct {
			Port int `json:"port"`
		}
		if err := options.Decode(&o); err != nil {
			return nil, nil, err
		}
		addr, err := json.Marshal(map[string]string{"addr": (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: o.Port}).String()})
		return addr, addr, err
	},
	Listen: func(_ context.Context, config ptipc.Opaque, _ ptipc.Env) (ptipc.Listener, error) {
		addr, err := carrierAddr(config)
		if err != nil {
			return nil, err
		}
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, err
		}
		return &listener{Listener: l}, nil
	},
}

func carrierAddr(config ptipc.Opaque) (string, error) {
	var c struct {
		Addr string `json:"addr"`
	}
	err := config.Decode(&c)
	return c.Addr, err
}

// openCarrier is the client of the carrier, "plain".
func openCarrier(_ context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	addr, err := carrierAddr(config)
	if err != nil {
		return nil, err
	}
	meter := new(relay.Meter)
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"plain": meter.Factory(true, func(ctx context.Context, settings ptipc.Opaque, _ string) (net.Conn, error) {
			if err := settings.Decode(&struct{}{}); err != nil {
				return nil, err
			}
			return env.Dial(ctx, "tcp", addr)
		}),
	}, nil), nil
}

// A listener makes a [ptipc.Listener] of any.
type listener struct {
	net.Listener
	meter relay.Meter
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.meter.Conn(c, relay.Options{}), nil
}

func (l *listener) Stats() ptipc.TransportStats { return ptipc.TransportStats{Failed: 7} }
func (l *listener) Wait() error                 { return nil }

// A pipeListener accepts one end of a net.Pipe for each dial.
type pipeListener struct {
	conns  chan net.Conn
	errs   chan error // what Accept is to fail with
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), errs: make(chan error), closed: make(chan struct{})}
}

func (l *pipeListener) dial() net.Conn {
	near, far := net.Pipe()
	select {
	case l.conns <- far:
	case <-l.closed:
		far.Close()
	}
	return near
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case err := <-l.errs:
		return nil, err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

// startServer serves carriers of a network, "tcp" or "pipe", and returns how to
// open one. The server is closed at the end of the test, if it is not by then.
func startServer(t testing.TB, network string, drain time.Duration, dial dialFunc) (*server, func() net.Conn) {
	t.Helper()
	var l net.Listener
	var open func() net.Conn
	if network == "pipe" {
		p := newPipeListener()
		l, open = p, p.dial
	} else {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l, open = tcp, func() net.Conn {
			c, err := net.Dial("tcp", tcp.Addr().String())
			if err != nil {
				t.Error(err)
				return nil
			}
			_ = c.SetDeadline(time.Now().Add(stuck))
			return c
		}
	}
	s := serve(&listener{Listener: l}, dial, slog.New(slog.DiscardHandler), drain)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error("Close:", err)
		}
	})
	return s, open
}

// connected returns the two ends of a connection over a network.
func connected(t testing.TB, network string) (near, far net.Conn) {
	t.Helper()
	if network == "pipe" {
		near, far = net.Pipe()
	} else {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if near, err = net.Dial("tcp", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		if far, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
	}
	if network != "pipe" {
		_ = near.SetDeadline(time.Now().Add(stuck))
		_ = far.SetDeadline(time.Now().Add(stuck))
	}
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

func mustWrite(t testing.TB, w io.Writer, b []byte) {
	t.Helper()
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
}

func mustEnd(t testing.TB, r io.Reader) {
	t.Helper()
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes and %v, want the end of the stream", n, err)
	}
}

func closeWrite(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
}

// target is a destination that hands over what connects to it.
func target(t testing.TB) (addr string, accepted <-chan net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan net.Conn, 64)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		for len(conns) > 0 {
			(<-conns).Close()
		}
	})
	return l.Addr().String(), conns
}

// An adapter is [Client] or [Mux].
type adapter = func(ptipc.TransportFactory) ptipc.TransportFactory

func eachAdapter(t *testing.T, f func(t *testing.T, adapter adapter)) {
	t.Run("one", func(t *testing.T) { f(t, Client) })
	t.Run("many", func(t *testing.T) { f(t, Mux) })
}

// chain opens both ends over the carrier. egress is the policy.
func chain(t testing.TB, adapter adapter, egress string) (*ptipc.Transport, ptipc.ServerManager) {
	t.Helper()
	config := ptipc.Opaque(`{"egress":` + egress + `,"carrier":{"addr":"127.0.0.1:0"}}`)
	s, err := Server(carrier).Proxy(t.Context(), config, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), s.Wait()); err != nil {
			t.Error("the server:", err)
		}
	})
	client, err := json.Marshal(map[string]string{"addr": s.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	transport, err := adapter(openCarrier)(t.Context(), client, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(transport.Close(), transport.Wait()); err != nil {
			t.Error("the client:", err)
		}
	})
	return transport, s
}

// loopback is a policy for the destinations of these tests.
const loopback = `{"allow":["127.0.0.1:*"]}`

var past = time.Unix(1, 0)

// stuck is when a test gives up waiting for what does not come.
const stuck = 20 * time.Second

func descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("only Linux lists a process's descriptors in /proc:", err)
	}
	return len(entries)
}
