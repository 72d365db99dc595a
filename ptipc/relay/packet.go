package relay

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"pthost/ptipc"
)

// maxPeers bounds the addresses that one [PacketConn] hears. A peer that makes an
// application talk to ever more addresses must not make it keep them all.
const maxPeers = 4096

// A PacketConn counts its datagrams' bytes and belongs to a [Meter]. It makes of any
// socket what an application has through TURN as well: addresses are
// [*net.UDPAddr] alone (PKT-1), and what comes from an address to which nothing was
// sent is dropped (PKT-2).
type PacketConn struct {
	net.PacketConn
	meter *Meter

	received, sent, dropped atomic.Uint64

	last  atomic.Pointer[netip.Addr] // the peer of the last datagram, which is mostly that of the next
	mu    sync.RWMutex
	peers map[netip.Addr]*netip.Addr // to itself, so that last needs no memory of its own

	closing sync.Once
}

// Packets makes a packet factory of open: its sockets and failures are counted here,
// and its errors answer errors.Is for their [ptipc.Class] (ERR-2).
func (m *Meter) Packets(open ptipc.PacketFactory) ptipc.PacketFactory {
	return func(ctx context.Context) (net.PacketConn, error) {
		if m.hasEnded() {
			return nil, net.ErrClosed
		}
		raw, err := open(ctx)
		if err != nil {
			m.Failed()
			return nil, ptipc.Classify(err)
		}
		conn := m.packetConn(raw)
		if m.hasEnded() { // perhaps after what was open has been cut
			_ = conn.Close()
			return nil, net.ErrClosed
		}
		return conn, nil
	}
}

func (m *Meter) packetConn(raw net.PacketConn) *PacketConn {
	c := &PacketConn{PacketConn: raw, meter: m, peers: make(map[netip.Addr]*netip.Addr)}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.packets == nil {
		m.packets = make(map[*PacketConn]struct{})
	}
	m.packets[c] = struct{}{}
	m.closed.Opened++
	return c
}

func (m *Meter) packetConns() []*PacketConn {
	m.mu.Lock()
	defer m.mu.Unlock()
	conns := make([]*PacketConn, 0, len(m.packets))
	for c := range m.packets {
		conns = append(conns, c)
	}
	return conns
}

// ReadFrom returns the next datagram of a peer that this conn has sent to.
func (c *PacketConn) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		n, addr, err := c.PacketConn.ReadFrom(p)
		if err != nil {
			return n, addr, err
		}
		udp, ok := addr.(*net.UDPAddr)
		if ok && c.knows(udp.AddrPort().Addr().Unmap()) {
			c.received.Add(uint64(n))
			return n, udp, nil
		}
		c.dropped.Add(1)
	}
}

// WriteTo sends one datagram to a [*net.UDPAddr]. The address is heard from then on.
func (c *PacketConn) WriteTo(p []byte, addr net.Addr) (int, error) {
	udp, ok := addr.(*net.UDPAddr)
	if !ok {
		return 0, fmt.Errorf("relay: datagrams go to a *net.UDPAddr, never to a name, and this is the %T %v: %w", addr, addr, ptipc.ErrAddressType)
	}
	peer := udp.AddrPort().Addr().Unmap()
	if !peer.IsValid() || peer.IsUnspecified() || udp.Port == 0 {
		return 0, fmt.Errorf("relay: %v is no address to send to; give an address and a port: %w", addr, ptipc.ErrAddressType)
	}
	if !c.knows(peer) {
		if err := c.learn(peer); err != nil {
			return 0, err
		}
	}
	n, err := c.PacketConn.WriteTo(p, udp)
	c.sent.Add(uint64(n))
	return n, err
}

// Dropped is how many datagrams came from addresses that nothing was sent to.
func (c *PacketConn) Dropped() uint64 { return c.dropped.Load() }

func (c *PacketConn) knows(peer netip.Addr) bool {
	if last := c.last.Load(); last != nil && *last == peer {
		return true
	}
	c.mu.RLock()
	known, ok := c.peers[peer]
	c.mu.RUnlock()
	if ok {
		c.last.Store(known)
	}
	return ok
}

func (c *PacketConn) learn(peer netip.Addr) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.peers) == maxPeers {
		return fmt.Errorf("relay: one socket talks to %d addresses at most; open another one: %w", maxPeers, ptipc.ErrGeneral)
	}
	c.peers[peer] = &peer
	c.last.Store(&peer)
	return nil
}

// Detach gives up a socket that is exactly a [*net.UDPConn], for a TURN server that
// moves many of its datagrams with one system call: the server sees to PKT-1 and PKT-2
// itself, counts, and closes the socket. The meter counts it as opened, and no more
// than that. ok is false, and nothing has changed, for any other socket, whose own
// methods have the last word, and for one that was used or closed.
func (c *PacketConn) Detach() (conn *net.UDPConn, ok bool) {
	if conn, ok = c.PacketConn.(*net.UDPConn); !ok || c.sent.Load()+c.received.Load() > 0 {
		return nil, false
	}
	ok = false
	c.closing.Do(func() {
		ok = true
		c.leave()
	})
	return conn, ok
}

func (c *PacketConn) leave() {
	c.meter.mu.Lock()
	defer c.meter.mu.Unlock()
	delete(c.meter.packets, c)
	c.meter.removed(c.received.Load(), c.sent.Load())
}

// Close closes the socket. Only the first call does anything.
func (c *PacketConn) Close() (err error) {
	c.closing.Do(func() {
		err = c.PacketConn.Close()
		c.leave()
	})
	return err
}
