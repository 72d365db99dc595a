package relay

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"pthost/ptipc"
)

// A Meter holds the open connections of one transport and its totals. The zero
// value is ready; a Meter must not be copied. Its methods may be called from
// any goroutine.
type Meter struct {
	mu      sync.Mutex
	open    map[*Conn]struct{}
	packets map[*PacketConn]struct{}
	closed  ptipc.TransportStats // the connections that are closed; Active is unused
	empty   chan struct{}        // closed when open becomes empty; nil while nobody waits
	ended   bool                 // the transport is closed
}

// Conn makes raw a [Conn] of this meter, which owns it from then on. It counts
// as open until it is closed.
func (m *Meter) Conn(raw net.Conn, opts Options) *Conn {
	c := &Conn{raw: raw, meter: m, opts: opts, opened: time.Now()}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open == nil {
		m.open = make(map[*Conn]struct{})
	}
	m.open[c] = struct{}{}
	m.closed.Opened++
	return c
}

func (m *Meter) remove(c *Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.open, c)
	m.removed(c.counts())
}

// removed counts what a closed connection has carried. m.mu is held.
func (m *Meter) removed(received, sent uint64) {
	m.closed.Received += received
	m.closed.Sent += sent
	if len(m.open)+len(m.packets) == 0 && m.empty != nil {
		close(m.empty)
		m.empty = nil
	}
}

// end lets no more connections be dialled.
func (m *Meter) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = true
}

func (m *Meter) hasEnded() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ended
}

// Failed counts a dial that failed.
func (m *Meter) Failed() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed.Failed++
}

// Stats returns the totals, the bytes of open connections included (STAT-2).
func (m *Meter) Stats() ptipc.TransportStats {
	m.mu.Lock()
	s := m.closed
	s.Active = uint64(len(m.open) + len(m.packets))
	open := slices.Collect(maps.Keys(m.open))
	for c := range m.packets {
		s.Received += c.received.Load()
		s.Sent += c.sent.Load()
	}
	m.mu.Unlock()
	// The kernel is asked about sockets that were handed over, and nobody is to wait for that. What
	// is closed meanwhile keeps its counts.
	for _, c := range open {
		received, sent := c.counts()
		s.Received += received
		s.Sent += sent
	}
	return s
}

// Conns returns the connections that are open now.
func (m *Meter) Conns() []*Conn {
	m.mu.Lock()
	defer m.mu.Unlock()
	conns := make([]*Conn, 0, len(m.open))
	for c := range m.open {
		conns = append(conns, c)
	}
	return conns
}

// Drain waits until no connection is open. When ctx ends first, it aborts those
// that are left and returns the cause. It does not keep new ones from coming:
// stop accepting and dialling before.
func (m *Meter) Drain(ctx context.Context) error {
	m.mu.Lock()
	if len(m.open)+len(m.packets) == 0 {
		m.mu.Unlock()
		return nil
	}
	if m.empty == nil {
		m.empty = make(chan struct{})
	}
	empty := m.empty
	m.mu.Unlock()

	select {
	case <-empty:
		return nil
	case <-ctx.Done():
	}
	left, packets := m.Conns(), m.packetConns()
	for _, c := range left {
		_ = c.Abort() // there is nobody to tell
	}
	for _, c := range packets {
		_ = c.Close()
	}
	return fmt.Errorf("relay: %d connections were cut: %w", len(left)+len(packets), context.Cause(ctx))
}
