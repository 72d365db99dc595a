package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
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
// other, so that a truncated stream never looks like a complete one.
//
// The result is nil if both directions ended with the end of the stream and all
// bytes were handed over.
func Join(ctx context.Context, a, b net.Conn) error {
	defer a.Close()
	defer b.Close()
	if ctx.Err() != nil {
		_, _ = abort(a), abort(b)
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
	a, b net.Conn

	mu     sync.Mutex
	failed error              // why both sides were aborted; nil while they were not
	reset  map[net.Conn]error // conns on which a write found out that the peer has reset them
}

func joinConns(ctx context.Context, a, b net.Conn) error {
	j := &join{a: a, b: b, reset: make(map[net.Conn]error)}
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(cut)
		j.fail(cutBy(ctx))
	})
	back := make(chan error, 1)
	go func() { back <- j.flow(a, b) }()
	err := errors.Join(j.flow(b, a), <-back)
	if !stop() {
		<-cut
	}
	if len(j.reset) > 0 {
		j.fail(err)
	}
	if j.failed != nil {
		return j.failed
	}
	return err
}

// fail aborts both sides, which ends both flows. The first cause is kept.
func (j *join) fail(err error) {
	j.mu.Lock()
	first := j.failed == nil
	if first {
		j.failed = err
	}
	j.mu.Unlock()
	if first {
		_, _ = abort(j.a), abort(j.b)
	}
}

// flow copies from src to dst until the end of the stream and passes the end on.
// An error that it returns leaves the other direction as it is.
func (j *join) flow(dst, src net.Conn) error {
	rerr, werr := copyConn(dst, src)
	switch {
	case werr != nil:
		return j.writeFailed(dst, werr)
	case rerr != nil:
		j.fail(readFailed(rerr))
		return nil
	}
	// A reset is reported once, to whoever comes first. After a write has had it,
	// a read sees what looks like the end of the stream.
	j.mu.Lock()
	err := j.reset[src]
	j.mu.Unlock()
	if err != nil {
		j.fail(err)
		return nil
	}
	half, ok := dst.(closeWriter)
	if !ok {
		return nil
	}
	if err := half.CloseWrite(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return j.writeFailed(dst, err)
	}
	return nil
}

func (j *join) writeFailed(dst net.Conn, err error) error {
	err = writeFailed(err)
	switch {
	case errors.Is(err, syscall.EPIPE), errors.Is(err, io.ErrClosedPipe), errors.Is(err, syscall.ENOTCONN):
		// The peer takes no more. It may have said all it had to say before, and
		// that is still to be read: an early answer to a long upload.
	case errors.Is(err, syscall.ECONNRESET):
		// The same, but the other direction cannot end cleanly any more.
		j.mu.Lock()
		j.reset[dst] = err
		j.mu.Unlock()
	default:
		j.fail(err)
	}
	return err
}

func readFailed(err error) error { return fmt.Errorf("relay: read: %w", err) }

func writeFailed(err error) error { return fmt.Errorf("relay: write: %w", err) }

func cutBy(ctx context.Context) error { return fmt.Errorf("relay: cut: %w", context.Cause(ctx)) }

// A Read of a conn that has nothing to say keeps its buffer for as long as it
// blocks, so that one is small. It is full when there is more to come.
const (
	idleSize = 2 << 10
	bulkSize = 32 << 10
)

var (
	idleBuffers = sync.Pool{New: func() any { return new([idleSize]byte) }}
	bulkBuffers = sync.Pool{New: func() any { return new([bulkSize]byte) }}
)

// copyConn copies with nothing but Read and Write: io.Copy would look for
// ReadFrom and WriteTo, see socketOf. The end of the stream is no error.
func copyConn(dst, src net.Conn) (rerr, werr error) {
	idle := idleBuffers.Get().(*[idleSize]byte)
	defer idleBuffers.Put(idle)
	for {
		n, rerr, werr := copyOnce(dst, src, idle[:])
		if n == idleSize && rerr == nil && werr == nil {
			rerr, werr = copyBulk(dst, src)
		}
		if rerr == io.EOF {
			return nil, werr
		}
		if rerr != nil || werr != nil {
			return rerr, werr
		}
	}
}

// copyBulk copies until there is little to copy.
func copyBulk(dst, src net.Conn) (rerr, werr error) {
	bulk := bulkBuffers.Get().(*[bulkSize]byte)
	defer bulkBuffers.Put(bulk)
	for {
		n, rerr, werr := copyOnce(dst, src, bulk[:])
		if n < idleSize || rerr != nil || werr != nil {
			return rerr, werr
		}
	}
}

func copyOnce(dst, src net.Conn, buf []byte) (n int, rerr, werr error) {
	n, rerr = src.Read(buf)
	if n > 0 {
		m, err := dst.Write(buf[:n])
		if err == nil && m < n {
			err = io.ErrShortWrite
		}
		werr = err
	}
	return n, rerr, werr
}
