package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// Join relays bytes between a and b until both directions have ended, and owns
// both from the call on: they are closed when it returns, and nothing is left
// behind. To end it early cancel ctx, which resets both sides, or close one that
// is a [Conn]; closing another conn, and deadlines set on one, need not have an
// effect on a Join.
//
// The end of the stream on one side becomes CloseWrite on the other, and the
// other direction goes on. A conn that has no CloseWrite stays open until the
// other direction has ended too: its peer waits longer for the end, but gets its
// answer through. A side that fails, by a reset say, makes Join abort the
// other, so that a truncated stream never looks like a complete one (SOCKS-15). Not
// even when this process is killed: until the end a TCP socket is set to be reset
// when it is closed (SO_LINGER), whatever was set before.
//
// The result is nil if both directions ended with the end of the stream and all
// bytes were handed over.
func Join(ctx context.Context, a, b net.Conn) error {
	defer a.Close()
	defer b.Close()
	if ctx.Err() != nil {
		_, _ = Abort(a), Abort(b)
		return fmt.Errorf("relay: not started: %w", context.Cause(ctx))
	}
	for _, c := range []net.Conn{a, b} {
		if s := socketOf(c); s != nil && !stream(s) {
			return fmt.Errorf("relay: a %s socket carries messages, not a stream: %w", s.LocalAddr().Network(), errors.ErrUnsupported)
		}
	}
	if err, ok := joinSockets(ctx, a, b); ok {
		return err
	}
	return joinConns(ctx, a, b)
}

// socketOf returns the socket whose bytes are exactly the bytes of c, if c has
// one: c is a *net.TCPConn, a *net.UnixConn, or a *Conn around one of them. The
// types are matched exactly. A type that embeds one of them may override Read
// and Write, to encrypt say, and would be bypassed: that puts plaintext on the
// wire. So no interface is good enough here.
func socketOf(c net.Conn) net.Conn {
	switch c := c.(type) {
	case *Conn:
		return socketOf(c.raw)
	case *net.TCPConn, *net.UnixConn:
		return c
	case *taker: // only joinConns makes one
		return c.socket()
	}
	return nil
}

func stream(socket net.Conn) bool {
	switch socket.LocalAddr().Network() {
	case "unixgram", "unixpacket":
		return false
	}
	return true
}

// A join copies between two conns of which nothing is known but net.Conn.
type join struct {
	ends [2]end

	mu     sync.Mutex
	failed error // why both ends were aborted; nil while they were not
}

type end struct {
	net.Conn
	writing chan struct{} // holds one element during a Write
	widened bool          // a unix socket that has unixSendBuffer
	reset   error         // a Write found out that the peer has reset the connection; under writing
}

func joinConns(ctx context.Context, a, b net.Conn) error {
	for _, c := range []*net.Conn{&a, &b} {
		if t := newTaker(*c); t != nil {
			*c = t
			defer t.release()
		}
	}
	j := &join{ends: [2]end{
		{Conn: a, writing: make(chan struct{}, 1)},
		{Conn: b, writing: make(chan struct{}, 1)},
	}}
	setLinger(a, 0)
	setLinger(b, 0)
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cut)
		j.fail(cutBy(ctx))
	})
	back := make(chan error, 1)
	go func() { back <- j.flow(&j.ends[0], &j.ends[1]) }()
	err := errors.Join(j.flow(&j.ends[1], &j.ends[0]), <-back)
	if !stop() {
		<-cut
	}
	if j.ends[0].reset != nil || j.ends[1].reset != nil {
		j.fail(err)
	}
	if j.failed != nil {
		return j.failed
	}
	setLinger(a, -1)
	setLinger(b, -1)
	if err == nil {
		for _, c := range []net.Conn{a, b} {
			if t, ok := c.(*taker); ok {
				t.finish()
			}
		}
	}
	return err
}

// setLinger with 0 makes every close of a TCP connection a reset, also the one that
// comes of the end of this process; with -1 no longer.
func setLinger(c net.Conn, sec int) {
	if socket := socketOf(c); socket != nil {
		c = socket
	}
	if socket, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = socket.SetLinger(sec) // fails only on a closed socket
	}
}

// fail aborts both ends, which ends both flows. The first cause is kept.
func (j *join) fail(err error) {
	j.mu.Lock()
	first := j.failed == nil
	if first {
		j.failed = err
	}
	j.mu.Unlock()
	if first {
		_, _ = Abort(j.ends[0].Conn), Abort(j.ends[1].Conn)
	}
}

// flow copies from src to dst until the end of the stream and passes the end on.
// An error that it returns leaves the other direction as it is.
func (j *join) flow(dst, src *end) error {
	rerr, werr := copyConn(dst, src)
	switch {
	case werr != nil:
		return j.writeFailed(werr)
	case rerr != nil:
		j.fail(readFailed(rerr))
		return nil
	}
	if err := src.wasReset(); err != nil {
		j.fail(writeFailed(err))
		return nil
	}
	half, ok := dst.Conn.(closeWriter)
	if !ok {
		return nil
	}
	if err := half.CloseWrite(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return j.writeFailed(err)
	}
	return nil
}

// writeFailed decides whether the other direction may go on.
func (j *join) writeFailed(err error) error {
	failed := writeFailed(err)
	if !peerIsGone(err) && !errors.Is(err, syscall.ECONNRESET) {
		j.fail(failed)
	}
	return failed
}

// peerIsGone says of an error of a write that the peer takes no more. It may have
// said all it had to say before, and that is still to be read: an early answer
// to a long upload. After ECONNRESET there may be something to read as well, but
// it is no complete stream.
func peerIsGone(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN) || errors.Is(err, io.ErrClosedPipe)
}

// resetWait bounds how long the end of a stream is held back because the other
// direction is in a Write.
const resetWait = time.Second

// wasReset tells, after a Read has seen the end of the stream, whether it was a
// reset. The system reports that once. If a Write has had it, a Read sees what
// looks like a clean end, perhaps before the Write returns; but then it does so
// at once. A Write that does not is waiting for a peer that is there.
func (e *end) wasReset() error {
	patience := time.NewTimer(resetWait)
	defer patience.Stop()
	select {
	case e.writing <- struct{}{}:
		defer func() { <-e.writing }()
		return e.reset
	case <-patience.C:
		return nil
	}
}

func (e *end) Write(p []byte) (int, error) {
	e.writing <- struct{}{}
	defer func() { <-e.writing }()
	n, err := e.Conn.Write(p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if errors.Is(err, syscall.ECONNRESET) {
		e.reset = err
	}
	return n, err
}

func readFailed(err error) error { return fmt.Errorf("relay: read: %w", err) }

func writeFailed(err error) error { return fmt.Errorf("relay: write: %w", err) }

func cutBy(ctx context.Context) error { return fmt.Errorf("relay: cut: %w", context.Cause(ctx)) }

// A Read of a conn that has nothing to say keeps its buffer for as long as it
// blocks, so that one is small. It is full when there is more to come; then the next is
// larger, and a Read of the largest is likely to find something.
const (
	idleSize = 2 << 10
	someSize = 32 << 10
	// A quarter of this takes a tenth to a fifth more CPU.
	bulkSize = 256 << 10
	// Less is read from a socket: what goes to a WebSocket then fills sixteen records of
	// TLS with its header, and at the other end a buffer of bulkSize. A few bytes more would be
	// another record, and another turn of everything behind it.
	headerRoom = 16
)

var (
	idleBuffers = sync.Pool{New: func() any { return new([idleSize]byte) }}
	someBuffers = sync.Pool{New: func() any { return new([someSize]byte) }}
	bulkBuffers = sync.Pool{New: func() any { return new([bulkSize]byte) }}
)

// copyConn copies with nothing but Read and Write: io.Copy would look for
// ReadFrom and WriteTo, see socketOf. The end of the stream is no error.
func copyConn(dst, src *end) (rerr, werr error) {
	idle := idleBuffers.Get().(*[idleSize]byte)
	defer idleBuffers.Put(idle)
	for rerr == nil && werr == nil {
		var n int
		n, rerr, werr = copyOnce(dst, src, idle[:])
		if n == idleSize && rerr == nil && werr == nil {
			rerr, werr = copyBulk(dst, src)
		}
	}
	if rerr == io.EOF { //nolint:errorlint // wrapped, it is not the end of this stream but of one underneath
		rerr = nil
	}
	return rerr, werr
}

// What a unix socket that bulk goes to may hold on its way to the peer, before the
// system doubles it. The default is so little that bulk moves in small pieces, and its
// cost is that of waking for each of them.
const unixSendBuffer = 1 << 20

// copyBulk copies until there is little to copy.
func copyBulk(dst, src *end) (rerr, werr error) {
	if s, ok := socketOf(dst.Conn).(*net.UnixConn); ok && !dst.widened {
		dst.widened = true
		_ = s.SetWriteBuffer(unixSendBuffer) // without it bulk is only slower
	}
	socket := socketOf(src.Conn) != nil
	for n := someSize; n > idleSize && rerr == nil && werr == nil; {
		some := someBuffers.Get().(*[someSize]byte)
		n, rerr, werr = copyOnce(dst, src, some[:])
		someBuffers.Put(some)
		if n < someSize-headerRoom || rerr != nil || werr != nil {
			continue
		}
		bulk := bulkBuffers.Get().(*[bulkSize]byte)
		room := bulk[:]
		if socket {
			room = bulk[:bulkSize-headerRoom]
		}
		for n = bulkSize; n >= bulkSize-2*headerRoom && rerr == nil && werr == nil; {
			n, rerr, werr = copyOnce(dst, src, room)
		}
		bulkBuffers.Put(bulk)
	}
	return rerr, werr
}

func copyOnce(dst, src *end, buf []byte) (n int, rerr, werr error) {
	n, rerr = src.Read(buf)
	if n > 0 {
		_, werr = dst.Write(buf[:n])
	}
	return n, rerr, werr
}
