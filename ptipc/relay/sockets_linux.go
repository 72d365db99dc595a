package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// joinSockets relays between two sockets on a loop. done is false if the conns
// are not both sockets, or if descriptors are short: copying still works then.
func joinSockets(ctx context.Context, a, b net.Conn) (err error, done bool) {
	socketA, socketB := socketOf(a), socketOf(b)
	if socketA == nil || socketB == nil {
		return nil, false
	}
	p := &pair{done: make(chan struct{})}
	l := &loops[nextLoop.Add(1)%uint32(len(loops))]
	if !p.legs[0].take(a, socketA) {
		return nil, false
	}
	defer p.legs[0].close(p)
	if !p.legs[1].take(b, socketB) {
		return nil, false
	}
	defer p.legs[1].close(p)
	// Before the loop may count a byte, closing a Conn has to wait for it.
	closed := fmt.Errorf("relay: %w", net.ErrClosed)
	if !p.cutWith(func() { l.cut(p, closed); <-p.done }) {
		p.failed = closed
		close(p.done)
		return closed, true
	}
	first, ok := l.add(p)
	if !ok {
		p.cutWith(nil)
		close(p.done)
		return nil, false
	}
	// The loop has the sockets now. Left open, these would have the
	// runtime's poller wake a thread for each event as well.
	_, _ = socketA.Close(), socketB.Close()
	if first {
		stop := context.AfterFunc(ctx, func() { l.cut(p, cutBy(ctx)) })
		l.run(p)
		stop()
	} else {
		select {
		case <-p.done:
		case <-ctx.Done():
			l.cut(p, cutBy(ctx))
			<-p.done
		}
	}
	if p.failed != nil {
		return p.failed, true
	}
	return errors.Join(p.flows[0].err, p.flows[1].err), true
}

// A pair is two sockets that are joined. Only its loop touches it until done is
// closed, except for what is said to be under the loop's mutex.
type pair struct {
	id     int32
	legs   [2]leg
	flows  [2]flow // flows[i] goes from legs[i] to legs[1-i]
	queued bool    // in the loop's ready list
	cut    error   // why it is to end now; under the loop's mutex
	reset  error   // a write found out that the peer has reset its connection
	failed error   // why both sides were aborted
	done   chan struct{}

	moved  int // bytes, both ways
	hand   handing
	app    int     // the leg whose socket is handed over
	ledger *ledger // of that socket, once it is
}

// cutWith sets what a Conn of the pair calls when it is closed, to end the relay
// that has its socket. It reports false if one is closed already.
func (p *pair) cutWith(cut func()) bool {
	open := true
	for i := range p.legs {
		for _, c := range p.legs[i].layers {
			c.mu.Lock()
			c.cut = cut
			open = open && !c.closed
			c.mu.Unlock()
		}
	}
	return open
}

// A leg is one socket of a pair.
type leg struct {
	fd      int
	end     End // nil if the socket itself says whether its stream has broken
	tcp     bool
	hands   bool    // its peer may be handed the other leg's socket
	layers  []*Conn // that count it, the outermost first
	armed   bool    // EPOLLOUT is asked for
	silent  bool    // nothing is read from it any more
	gone    bool    // the peer takes nothing any more
	widened bool    // a unix socket that has unixSendBuffer
}

// take duplicates the descriptor of the socket underneath c.
func (g *leg) take(c, socket net.Conn) bool {
	for layer, ok := c.(*Conn); ok; layer, ok = layer.raw.(*Conn) {
		g.layers = append(g.layers, layer)
		if layer.opts.End != nil {
			g.end, g.hands = layer.opts.End, layer.opts.HandOver
		}
	}
	_, g.tcp = socket.(*net.TCPConn)
	raw, err := socket.(syscall.Conn).SyscallConn()
	if err != nil {
		return false
	}
	var dupErr error
	err = raw.Control(func(fd uintptr) {
		g.fd, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err != nil || dupErr != nil {
		return false
	}
	g.linger(resetOnClose)
	return true
}

func (g *leg) close(p *pair) {
	switch {
	case p.failed == nil:
		g.linger(unix.Linger{})
	case g == &p.legs[p.app] && p.hand >= handed:
		disconnect(g.fd)
	}
	unix.Close(g.fd)
}

// resetOnClose makes every close a reset. It is set while a pair is relayed, so that
// also the end of this process, however it comes about, breaks the stream.
var resetOnClose = unix.Linger{Onoff: 1}

func (g *leg) linger(l unix.Linger) {
	if g.tcp {
		_ = unix.SetsockoptLinger(g.fd, unix.SOL_SOCKET, unix.SO_LINGER, &l)
	}
}

func (g *leg) received(n int) {
	for _, c := range g.layers {
		c.received.Add(uint64(n))
	}
}

func (g *leg) sent(n int) {
	for _, c := range g.layers {
		c.sent.Add(uint64(n))
	}
}

func (g *leg) count(beyond func() (received, sent uint64)) {
	for _, c := range g.layers {
		c.beyond.Store(&beyond)
	}
}

// A flow is one direction of a pair. It holds bytes, in a pipe or in a buffer,
// only while the destination does not take them.
type flow struct {
	readable bool // the source may have something: epoll says so once
	ending   bool // the end or an error is behind the last byte
	blocked  bool // the destination takes nothing until epoll says so
	bulk     bool // the last read was full: splice
	copies   bool // the source cannot be spliced
	eof      bool // the source has ended; to be passed on
	done     bool
	err      error // why it ended, if not at the end of the stream

	pipe   *pipe
	inPipe int
	buf    *[chunk]byte
	rest   []byte // of buf
}
