package scramble

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"pthost/ptipc"
)

// conn is a socket whose datagrams are sealed.
type conn struct {
	net.PacketConn
	keys   *keys
	sender *sender
	log    *slog.Logger

	dropped atomic.Uint64
	warned  atomic.Int64 // when of a wrong clock, in seconds since 1970
}

func newConn(raw net.PacketConn, keys *keys, log *slog.Logger) *conn {
	return &conn{PacketConn: raw, keys: keys, sender: newSender(), log: log}
}

// buffers hold one datagram of the wire each. One byte more than the longest shows
// that one was longer.
var buffers = sync.Pool{New: func() any { return new([maxWire + 1]byte) }}

// WriteTo seals a datagram and sends it. ErrGeneral: the payload is longer than MaxPayload.
func (c *conn) WriteTo(p []byte, addr net.Addr) (int, error) {
	if len(p) > MaxPayload { // SCRAM-6
		return 0, fmt.Errorf("scramble: a datagram of %d bytes is too long; send %d at most: %w", len(p), MaxPayload, ptipc.ErrGeneral)
	}
	buf := buffers.Get().(*[maxWire + 1]byte)
	defer buffers.Put(buf)
	var random [nonceSize + 2]byte
	_, _ = rand.Read(random[:]) // never fails
	padding := randomPadding(len(p), binary.BigEndian.Uint16(random[nonceSize:]))
	wire := c.keys.sealed(buf[:0], (*[nonceSize]byte)(random[:]), c.sender.next(), p, padding)
	if _, err := c.PacketConn.WriteTo(wire, addr); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ReadFrom returns the next datagram of somebody with the key. What is forged, comes
// again, or is longer than p, is dropped and counted, without a word to anybody
// (SCRAM-7): an answer would tell what listens here.
func (c *conn) ReadFrom(p []byte) (int, net.Addr, error) {
	buf := buffers.Get().(*[maxWire + 1]byte)
	defer buffers.Put(buf)
	for {
		n, addr, err := c.PacketConn.ReadFrom(buf[:])
		if err != nil {
			return 0, addr, err
		}
		h, payload, err := c.keys.opened(buf[:n])
		if err == nil {
			err = c.keys.windows.accept(h, time.Now())
		}
		if err != nil || len(payload) > len(p) {
			c.dropped.Add(1)
			c.warn(err)
			continue
		}
		return copy(p, payload), addr, nil
	}
}

// warnInterval keeps replays from filling the log.
const warnInterval = 60

// warn tells the operator of what may be a wrong clock: nothing would arrive then, and
// nobody would know why.
func (c *conn) warn(err error) {
	if !errors.Is(err, errTime) {
		return
	}
	now, last := time.Now().Unix(), c.warned.Load()
	if now-last >= warnInterval && c.warned.CompareAndSwap(last, now) {
		c.log.Warn("datagrams are dropped", "err", err, "dropped", c.dropped.Load())
	}
}
