package turn

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"
)

// A memNet is a network in memory, for tests in which time passes by itself or datagrams
// have accidents.
type memNet struct {
	mu    sync.Mutex
	conns map[netip.AddrPort]*memConn
	port  uint16
	fate  func(from, to netip.AddrPort) []time.Duration // when each copy arrives; nil: at once
}

type memPacket struct {
	b    []byte
	from netip.AddrPort
}

type memConn struct {
	net      *memNet
	addr     netip.AddrPort
	inbox    chan memPacket
	closed   chan struct{}
	once     sync.Once
	deadline deadline
}

func newMemNet() *memNet { return &memNet{conns: map[netip.AddrPort]*memConn{}, port: 1000} }

func (n *memNet) listen(host string) *memConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.port++
	c := &memConn{net: n, addr: netip.AddrPortFrom(netip.MustParseAddr(host), n.port), inbox: make(chan memPacket, 4096), closed: make(chan struct{}), deadline: makeDeadline()}
	n.conns[c.addr] = c
	return c
}

// open is for dial.
func (n *memNet) open(_ context.Context, server netip.AddrPort) (socket, *endpoint, error) {
	return newSocket(n.listen("127.0.0.1"), false), newEndpoint(server), nil
}

func (n *memNet) packets(context.Context) (net.PacketConn, error) { return n.listen("192.0.2.1"), nil }

func (c *memConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	default:
	}
	to := plainAddr(addr.(*net.UDPAddr).AddrPort())
	p := memPacket{append([]byte(nil), b...), c.addr}
	arrivals := []time.Duration{0}
	if c.net.fate != nil {
		arrivals = c.net.fate(c.addr, to)
	}
	for _, wait := range arrivals {
		if wait == 0 {
			c.net.arrive(to, p)
		} else {
			time.AfterFunc(wait, func() { c.net.arrive(to, p) })
		}
	}
	return len(b), nil
}

func (n *memNet) arrive(to netip.AddrPort, p memPacket) {
	n.mu.Lock()
	c := n.conns[to]
	n.mu.Unlock()
	if c == nil {
		return
	}
	select {
	case c.inbox <- p:
	default:
	}
}

func (c *memConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case p := <-c.inbox:
		return copy(b, p.b), net.UDPAddrFromAddrPort(p.from), nil
	case <-c.closed:
		return 0, nil, net.ErrClosed
	case <-c.deadline.wait():
		return 0, nil, os.ErrDeadlineExceeded
	}
}

func (c *memConn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.net.mu.Lock()
		delete(c.net.conns, c.addr)
		c.net.mu.Unlock()
	})
	return nil
}
func (c *memConn) LocalAddr() net.Addr               { return net.UDPAddrFromAddrPort(c.addr) }
func (c *memConn) SetDeadline(t time.Time) error     { c.deadline.set(t); return nil }
func (c *memConn) SetReadDeadline(t time.Time) error { c.deadline.set(t); return nil }
func (c *memConn) SetWriteDeadline(time.Time) error  { return errors.ErrUnsupported }

// serve starts a server in this network. The function that it returns ends it.
func (n *memNet) serve(t testing.TB, s *Server) (addr netip.AddrPort, stop func()) {
	t.Helper()
	if s.Credentials == (Credentials{}) {
		s.Credentials = NewCredentials()
	}
	if s.Packets == nil {
		s.Packets = n.packets
	}
	c := n.listen("127.0.0.1")
	served := make(chan error, 1)
	go func() { served <- s.Serve(c) }()
	return c.addr, func() {
		_ = s.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
}

// accidents loses, doubles and delays datagrams, each with a chance in a hundred.
func accidents(lose, double, late int, delay time.Duration) func(netip.AddrPort, netip.AddrPort) []time.Duration {
	var mu sync.Mutex
	r := rand.New(rand.NewPCG(1, 2))
	return func(netip.AddrPort, netip.AddrPort) []time.Duration {
		mu.Lock()
		defer mu.Unlock()
		if r.IntN(100) < lose {
			return nil
		}
		arrivals := []time.Duration{0}
		if r.IntN(100) < double {
			arrivals = append(arrivals, 0)
		}
		if r.IntN(100) < late {
			arrivals[0] = time.Duration(r.Int64N(int64(delay)))
		}
		return arrivals
	}
}

// count is how many sockets are open.
func (n *memNet) count() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.conns)
}
