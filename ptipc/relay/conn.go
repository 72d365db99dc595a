package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"pthost/ptipc"
)

// Options says what a [Conn] does beyond counting. The zero value is enough.
type Options struct {
	// OnClose runs once, after the connection has been closed.
	OnClose func()

	// Remote, if set, is what RemoteAddr returns: the address of who is really at the
	// other end, where somebody stands between.
	Remote net.Addr

	// End, if set, tells a clean end of the stream from a break where the socket
	// underneath cannot: both ends mark theirs. Nil is a nil interface.
	End End

	// TakeOver, with End, offers the other end of a unix socket to take over the TCP
	// socket that it relays for (SOCKS-23): a [Join] with what is not a socket then
	// reads and writes that one itself.
	TakeOver bool

	// HandOver, with End, lets a [Join] with a TCP socket hand that socket over, once
	// bulk has gone through, to another end that takes it.
	HandOver bool

	// Ask is consulted by [Conn.Stats] before its own counters: a child process
	// may know better what went over the wire. false means that it does not know.
	Ask func() (ptipc.Stats, bool)
}

// An End is where the two ends of a connection note that their direction has ended
// cleanly (SOCKS-20).
type End interface {
	// Mark is called before the outgoing direction is ended or the connection is
	// closed, and not before it is aborted.
	Mark()
	// Marked is asked after the end of the incoming stream.
	Marked() bool

	// Take notes that this end takes over the socket behind the other one, and Takes
	// asks whether the other end does (SOCKS-23). Finish notes that all that went over
	// that socket has ended, and Finished asks for it (SOCKS-25).
	Take()
	Takes() bool
	Finish()
	Finished() bool
}

var errBroken = fmt.Errorf("the peer has gone without ending its stream: %w", io.ErrUnexpectedEOF)

// A Conn is a connection that counts its bytes and belongs to a [Meter]. It
// implements [ptipc.Conn]. It adds one atomic addition to a Read or a Write.
type Conn struct {
	raw    net.Conn
	meter  *Meter
	opts   Options
	opened time.Time

	received, sent atomic.Uint64
	beyond         atomic.Pointer[func() (received, sent uint64)] // what a socket that was handed over carries; nil without

	mu     sync.Mutex
	closed bool
	cut    func() // ends the relay that has the socket, and waits for it; nil outside of one
}

var _ ptipc.Conn = (*Conn)(nil)

// Read reads from the connection and counts what was received. The end of a stream
// that has broken is [io.ErrUnexpectedEOF] with [Options.End].
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.raw.Read(p)
	c.received.Add(uint64(n))
	if err == io.EOF && c.opts.End != nil && !c.opts.End.Marked() { //nolint:errorlint // see copyConn
		err = errBroken
	}
	return n, err
}

// Write writes to the connection and counts what was sent.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.raw.Write(p)
	c.sent.Add(uint64(n))
	return n, err
}

// CloseWrite ends the outgoing direction. The error is [errors.ErrUnsupported]
// if the connection underneath cannot end one direction alone.
func (c *Conn) CloseWrite() error {
	half, ok := c.raw.(closeWriter)
	if !ok {
		return fmt.Errorf("relay: %T cannot close one direction: %w", c.raw, errors.ErrUnsupported)
	}
	if c.opts.End != nil {
		c.opts.End.Mark()
	}
	return half.CloseWrite()
}

// Close closes the connection; a [Join] that relays it ends with [net.ErrClosed], and
// what it did not end itself has broken. Only the first call does anything.
func (c *Conn) Close() error {
	return c.close(func() error {
		if c.opts.End != nil {
			c.opts.End.Mark()
		}
		return c.raw.Close()
	})
}

// Abort closes the connection so that the peer sees a reset, not a clean end, where
// the socket underneath can say so, as TCP can, or [Options.End] does.
func (c *Conn) Abort() error { return c.close(func() error { return Abort(c.raw) }) }

func (c *Conn) close(end func() error) error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	cut := c.cut
	c.cut = nil
	c.mu.Unlock()

	var err error
	if cut != nil {
		cut()
		_ = c.raw.Close() // Join has closed the socket already
	} else {
		err = end()
	}
	c.meter.remove(c)
	if c.opts.OnClose != nil {
		c.opts.OnClose()
	}
	return err
}

// Stats returns what [Options.Ask] knows, and its own counts otherwise (STAT-1).
func (c *Conn) Stats() ptipc.Stats {
	if c.opts.Ask != nil {
		if s, ok := c.opts.Ask(); ok {
			return s
		}
	}
	received, sent := c.counts()
	return ptipc.Stats{Opened: c.opened, Received: received, Sent: sent}
}

func (c *Conn) counts() (received, sent uint64) {
	received, sent = c.received.Load(), c.sent.Load()
	if beyond := c.beyond.Load(); beyond != nil {
		r, s := (*beyond)()
		received, sent = received+r, sent+s
	}
	return received, sent
}

// LocalAddr returns the local address.
func (c *Conn) LocalAddr() net.Addr { return c.raw.LocalAddr() }

// RemoteAddr returns the address of the peer.
func (c *Conn) RemoteAddr() net.Addr {
	if c.opts.Remote != nil {
		return c.opts.Remote
	}
	return c.raw.RemoteAddr()
}

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { return c.raw.SetDeadline(t) }

// SetReadDeadline sets the deadline of Read.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.raw.SetReadDeadline(t) }

// SetWriteDeadline sets the deadline of Write.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.raw.SetWriteDeadline(t) }

type closeWriter interface{ CloseWrite() error }

// Abort closes c so that its peer does not take the end for a clean one. Close
// is called in any case: a conn that embeds one with Abort may add to its Close.
func Abort(c net.Conn) error {
	switch c := c.(type) {
	case interface{ Abort() error }:
		_ = c.Abort() // Close follows and reports
	case interface{ SetLinger(sec int) error }:
		_ = c.SetLinger(0) // fails only on a socket that is closed already
	}
	return c.Close()
}
