package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pthost/ptipc"
)

func udpSocket(t *testing.T) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func openUDP(context.Context) (net.PacketConn, error) {
	return net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
}

// PKT-1, PKT-2: a packet factory in process is like one behind TURN: addresses only,
// and nothing from whom nothing was sent to. A meter counts what it opens.
func TestPacketConn(t *testing.T) {
	var meter Meter
	transport := meter.Transport(nil, nil)
	transport.Packets = map[string]ptipc.PacketFactory{
		"udp": meter.Packets(openUDP),
		"bad": meter.Packets(func(context.Context) (net.PacketConn, error) { return nil, syscall.ENETUNREACH }),
	}
	conn, err := transport.Packets["udp"](t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := transport.Packets["bad"](t.Context()); !errors.Is(err, ptipc.ErrNetworkUnreachable) {
		t.Errorf("a factory that fails: %v", err)
	}
	peer := udpSocket(t)
	stranger, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()

	for _, addr := range []net.Addr{
		&net.IPAddr{IP: net.IPv4(127, 0, 0, 1)}, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1},
		&net.UDPAddr{Port: 1}, &net.UDPAddr{IP: net.IPv4zero, Port: 1}, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}, name("example.com:53"), nil,
	} {
		if n, err := conn.WriteTo([]byte("x"), addr); n != 0 || !errors.Is(err, ptipc.ErrAddressType) {
			t.Errorf("to %v: %d, %v", addr, n, err)
		}
	}
	for _, from := range []*net.UDPConn{stranger, peer} {
		if _, err := from.WriteTo([]byte("unasked"), conn.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.WriteTo([]byte("to you"), peer.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, from, err := peer.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "to you" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	if _, err := stranger.WriteTo([]byte("unasked"), from); err != nil {
		t.Fatal(err)
	}
	if _, err := peer.WriteTo([]byte("answer"), from); err != nil {
		t.Fatal(err)
	}
	// That of the peer came before it was known, but is read after it was.
	var got []string
	for range 2 {
		n, from, err := conn.ReadFrom(buf)
		if udp, ok := from.(*net.UDPAddr); err != nil || !ok || udp.String() != peer.LocalAddr().String() {
			t.Fatalf("%q from %v, %v", buf[:n], from, err)
		}
		got = append(got, string(buf[:n]))
	}
	if !slices.Equal(got, []string{"unasked", "answer"}) || conn.(*PacketConn).Dropped() != 2 {
		t.Errorf("%q, dropped %d", got, conn.(*PacketConn).Dropped())
	}
	if s := meter.Stats(); s.Active != 1 || s.Opened != 1 || s.Failed != 1 || s.Sent != 6 || s.Received != 13 {
		t.Errorf("%+v", s)
	}
	if err := transport.Close(); err != nil {
		t.Error(err)
	}
	if _, _, err := conn.ReadFrom(buf); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := transport.Packets["udp"](t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed transport opens: %v", err)
	}
	if s := meter.Stats(); s.Active != 0 || s.Sent != 6 || s.Received != 13 {
		t.Errorf("in the end %+v", s)
	}
}

// name is an address that is none.
type name string

func (name) Network() string  { return "udp" }
func (n name) String() string { return string(n) }

// One socket talks to a bounded number of addresses, and says so.
func TestPacketConnPeers(t *testing.T) {
	var meter Meter
	conn := meter.packetConn(&pipeConn{out: make(chan string, maxPeers+1)})
	for i := range maxPeers {
		if _, err := conn.WriteTo(nil, &net.UDPAddr{IP: net.IPv4(10, 0, byte(i>>8), byte(i)), Port: 1}); err != nil {
			t.Fatal(i, err)
		}
	}
	if _, err := conn.WriteTo(nil, &net.UDPAddr{IP: net.IPv4(10, 1, 0, 0), Port: 1}); err == nil {
		t.Error("one more was learned")
	}
	if _, err := conn.WriteTo(nil, &net.UDPAddr{IP: net.IPv4(10, 0, 0, 7), Port: 2}); err != nil {
		t.Error("another port of a known one:", err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
}

// echoUDP answers each datagram with what it was.
func echoUDP(t *testing.T) netip.AddrPort {
	t.Helper()
	conn := udpSocket(t)
	_ = conn.SetDeadline(time.Time{})
	var serving sync.WaitGroup
	serving.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	})
	t.Cleanup(func() { conn.Close(); serving.Wait() })
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

// Each source has a session of its own, a new one takes the place of the one that
// was silent for longest, and what is too long is dropped, not cut.
func TestPacketForward(t *testing.T) {
	f := &PacketForward{Open: openUDP, To: echoUDP(t), Max: 2}
	front := udpSocket(t)
	_ = front.SetDeadline(time.Time{})
	served := make(chan error, 1)
	go func() { served <- f.Serve(front) }()
	buf := make([]byte, 1<<16)
	ask := func(conn *net.UDPConn, size int) {
		t.Helper()
		if _, err := conn.WriteTo(make([]byte, size), front.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		if n, _, err := conn.ReadFrom(buf); err != nil || n != size {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
	a, b, c := udpSocket(t), udpSocket(t), udpSocket(t)
	ask(a, 1)
	ask(b, 0)
	ask(a, MaxDatagram)
	if _, err := a.WriteTo(make([]byte, MaxDatagram+1), front.LocalAddr()); err != nil {
		t.Fatal(err)
	}
	ask(a, 1500)
	if s := f.Stats(); s.Active != 2 || s.Opened != 2 || s.Evicted != 0 || s.Dropped != 1 || s.Sent != 1+1500+MaxDatagram || s.Received != s.Sent {
		t.Errorf("%+v", s)
	}
	ask(c, 3) // in place of b
	ask(a, 4)
	if s := f.Stats(); s.Active != 2 || s.Opened != 3 || s.Evicted != 1 {
		t.Errorf("%+v", s)
	}
	ask(b, 5) // in place of c
	if err := f.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if s := f.Stats(); s.Active != 0 || s.Evicted != 2 {
		t.Errorf("in the end %+v", s)
	}
	if err := f.Serve(udpSocket(t)); err != nil {
		t.Error("Serve after Shutdown:", err)
	}
}

// pipeConn is a socket of a test: what it is given to read comes from in, what is
// written goes to out.
type pipeConn struct {
	net.PacketConn
	in     chan string
	out    chan string
	closed chan struct{}
	once   sync.Once
}

func newPipeConn() *pipeConn {
	return &pipeConn{in: make(chan string), out: make(chan string, 100), closed: make(chan struct{})}
}

var pipeAddr = &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7}

func (c *pipeConn) ReadFrom(p []byte) (int, net.Addr, error) {
	select {
	case s := <-c.in:
		return copy(p, s), pipeAddr, nil
	case <-c.closed:
		return 0, nil, net.ErrClosed
	}
}

func (c *pipeConn) WriteTo(p []byte, _ net.Addr) (int, error) {
	c.out <- string(p)
	return len(p), nil
}

func (c *pipeConn) LocalAddr() net.Addr { return pipeAddr }

func (c *pipeConn) Close() error {
	if c.closed != nil {
		c.once.Do(func() { close(c.closed) })
	}
	return nil
}

// A silent session ends after the time Idle, one that only answers does not; what
// comes before a session's socket is open waits, up to a bound.
func TestPacketForwardIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		front := newPipeConn()
		sockets := make(chan *pipeConn, 1)
		goOn := make(chan struct{})
		f := &PacketForward{
			Open: func(context.Context) (net.PacketConn, error) {
				<-goOn
				return <-sockets, nil
			},
			To: pipeAddr.AddrPort(), Idle: time.Minute,
		}
		served := make(chan error, 1)
		go func() { served <- f.Serve(front) }()
		for i := range maxQueue + 3 {
			front.in <- fmt.Sprint(i)
		}
		synctest.Wait()
		if s := f.Stats(); s.Dropped != 3 || s.Active != 1 {
			t.Errorf("%+v", s)
		}
		first := newPipeConn()
		sockets <- first
		close(goOn)
		synctest.Wait()
		for i := range maxQueue {
			if got := <-first.out; got != fmt.Sprint(i) {
				t.Fatalf("%d came as %s", i, got)
			}
		}
		for range 5 {
			time.Sleep(50 * time.Second)
			first.in <- "answer"
			if got := <-front.out; got != "answer" {
				t.Errorf("%q", got)
			}
		}
		synctest.Wait()
		if s := f.Stats(); s.Active != 1 {
			t.Errorf("a session that answers has ended: %+v", s)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if s := f.Stats(); s.Active != 0 {
			t.Errorf("a silent session lives: %+v", s)
		}
		<-first.closed
		_ = f.Shutdown(t.Context())
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// What cannot be opened is told once a second, however many datagrams ask for it.
func TestPacketForwardFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said bytes.Buffer
		front := newPipeConn()
		f := &PacketForward{
			Open: func(context.Context) (net.PacketConn, error) { return nil, syscall.ENETUNREACH },
			To:   pipeAddr.AddrPort(), Log: slog.New(slog.NewTextHandler(&said, nil)),
		}
		served := make(chan error, 1)
		go func() { served <- f.Serve(front) }()
		for range 2 {
			for range 5 {
				front.in <- "question"
				synctest.Wait()
			}
			time.Sleep(time.Second)
		}
		if s := f.Stats(); s.Failed != 10 || s.Active != 0 {
			t.Errorf("%+v", s)
		}
		_ = f.Shutdown(t.Context())
		if err := <-served; err != nil {
			t.Error(err)
		}
		if n := strings.Count(said.String(), "could not be forwarded"); n != 2 {
			t.Errorf("%d warnings: %s", n, &said)
		}
	})
}

// A front that fails ends Serve with its error, and the sessions with it.
func TestPacketForwardFrontFails(t *testing.T) {
	f := &PacketForward{Open: openUDP, To: echoUDP(t)}
	front := newPipeConn()
	front.Close()
	if err := f.Serve(front); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	_ = f.Shutdown(t.Context())
}

// A socket that is given up is its new owner's, and no longer the meter's; another kind
// of socket, or one that is in use, is not given up.
func TestDetach(t *testing.T) {
	var meter Meter
	open := func(raw net.PacketConn) *PacketConn {
		t.Helper()
		conn, err := meter.Packets(func(context.Context) (net.PacketConn, error) { return raw, nil })(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return conn.(*PacketConn)
	}
	raw := udpSocket(t)
	conn := open(raw)
	if got, ok := conn.Detach(); !ok || got != raw {
		t.Errorf("%v, %v", got, ok)
	}
	if _, ok := conn.Detach(); ok {
		t.Error("it was given up twice")
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if _, err := raw.WriteTo([]byte("x"), raw.LocalAddr()); err != nil {
		t.Error("the socket of another owner was closed:", err)
	}
	if s := meter.Stats(); s.Active != 0 || s.Opened != 1 {
		t.Errorf("%+v", s)
	}
	for _, kept := range []*PacketConn{open(newPipeConn()), open(struct{ *net.UDPConn }{udpSocket(t)}), open(udpSocket(t))} {
		if _, ok := kept.PacketConn.(*net.UDPConn); ok {
			if _, err := kept.WriteTo([]byte("x"), raw.LocalAddr()); err != nil {
				t.Error(err)
			}
		}
		if _, ok := kept.Detach(); ok {
			t.Errorf("a %T was given up", kept.PacketConn)
		}
		if err := kept.Close(); err != nil {
			t.Error(err)
		}
	}
}
