package turn

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"
)

// listenUDP opens a socket on the loopback that is closed with the test.
func listenUDP(t testing.TB, host string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(host)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// directPackets is the simplest transport: a UDP socket on the loopback.
func directPackets(context.Context) (net.PacketConn, error) {
	return net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
}

// startServer serves on sockets of its own and makes sure that the server ends.
func startServer(t testing.TB, s *Server, conns ...net.PacketConn) netip.AddrPort {
	t.Helper()
	if s.Credentials == (Credentials{}) {
		s.Credentials = NewCredentials()
	}
	if s.Packets == nil {
		s.Packets = directPackets
	}
	if len(conns) == 0 {
		conns = []net.PacketConn{listenUDP(t, "127.0.0.1")}
	}
	addr := conns[0].LocalAddr().(*net.UDPAddr).AddrPort()
	served := make(chan error, 1)
	go func() { served <- s.Serve(conns...) }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("Serve: %v", err)
		}
		if n := s.Stats().Allocations; n != 0 {
			t.Errorf("%d allocations are left", n)
		}
	})
	return addr
}

func mustDial(t testing.TB, addr netip.AddrPort, c Credentials, options ...Option) *Conn {
	t.Helper()
	conn, err := Dial(t.Context(), addr, c, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func deadlineIn(t testing.TB, c net.PacketConn, d time.Duration) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	s := &Server{}
	addr := startServer(t, s)
	conn := mustDial(t, addr, s.Credentials)
	peer := listenUDP(t, "127.0.0.1")
	deadlineIn(t, peer, 10*time.Second)
	deadlineIn(t, conn, 10*time.Second)
	buf := make([]byte, 4096)
	for range 3 {
		if _, err := conn.WriteTo([]byte("there"), peer.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		n, from, err := peer.ReadFrom(buf)
		if err != nil || string(buf[:n]) != "there" {
			t.Fatalf("%q %v", buf[:n], err)
		}
		if from.String() != conn.LocalAddr().String() {
			t.Errorf("from %v, want %v", from, conn.LocalAddr())
		}
		if _, err := peer.WriteTo([]byte("back"), from); err != nil {
			t.Fatal(err)
		}
		n, from, err = conn.ReadFrom(buf)
		if err != nil || string(buf[:n]) != "back" || from.String() != peer.LocalAddr().String() {
			t.Fatalf("%q from %v: %v", buf[:n], from, err)
		}
	}
	t.Logf("%+v %+v", s.Stats(), conn.Stats())
}
