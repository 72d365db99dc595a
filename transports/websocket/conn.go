package websocket

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/gorilla/websocket"

	"pthost/ptipc"
)

const (
	// maxPayload is the most that one frame carries. With its header it fills sixteen
	// records of TLS: a few bytes more would be another one.
	maxPayload = 256<<10 - maxHeader

	// smallRead is what a Read with a smaller buffer takes from the wire. Others
	// take no more than they have room for, and no buffer stands between.
	smallRead = 512

	// lingerTime is how long a closed connection waits for its last bytes to go out
	// and for the peer to close, answerTime how long it takes over a close frame
	// after the peer's (WS-11).
	lingerTime = 30 * time.Second
	answerTime = 5 * time.Second

	// silentPings is how many intervals a peer may be silent (WS-14).
	silentPings = 2
)

var frames = sync.Pool{New: func() any { return new([maxHeader + maxPayload]byte) }}

// longAgo is a deadline that interrupts.
var longAgo = time.Unix(1, 0)

var (
	errEnded  = fmt.Errorf("websocket: write after CloseWrite: %w", io.ErrClosedPipe)
	errGone   = fmt.Errorf("websocket: the peer has closed: %w", syscall.EPIPE)
	errSilent = ptipc.WithClass(ptipc.ErrTimedOut, fmt.Errorf("websocket: nothing came from the peer for %d ping intervals: it is gone", silentPings))
)

// A conn is a stream in a WebSocket.
type conn struct {
	stream net.Conn // where frames go: the wire, or TLS on it
	wire   *wire
	client bool
	remote net.Addr
	ping   time.Duration // 0: none

	// One Read at a time; and when nobody reads any more, drain.
	reading sync.Mutex
	in      decoder
	early   []byte // came from the wire and is still to be decoded

	// One frame at a time. It is taken before mu.
	writing sync.Mutex

	mu        sync.Mutex
	closed    bool      // by Close or Abort
	limit     time.Time // when a closed connection stops waiting
	readErr   error     // how the incoming stream ended: io.EOF, or it broke
	writeErr  error     // why nothing can be written any more
	ended     bool      // the outgoing stream, by CloseWrite
	peerEnded bool      // the incoming stream, by the peer's mark
	closeSent bool
	over      bool // nothing follows on the wire
	answer    int  // the code for the close frame that is still to be sent; 0: none
	draining  bool
	pong      []byte // what a ping asked for; nil: nothing
	timer     *time.Timer
	lastReads uint32 // wire.reads when timer fired
	missed    int    // times that it had not moved, while somebody waited
}

// newConn makes a conn of a WebSocket whose opening handshake is done. early is
// what came with the handshake. remote is the peer's address.
func newConn(stream net.Conn, w *wire, client bool, early []byte, remote net.Addr, ping time.Duration) *conn {
	c := &conn{stream: stream, wire: w, client: client, early: early, remote: remote, ping: ping}
	c.in.masked = !client
	if ping > 0 {
		c.mu.Lock()
		c.timer = time.AfterFunc(jitter(ping), c.tick)
		c.mu.Unlock()
	}
	return c
}

// jitter keeps the pings of many connections from falling together.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.9 + 0.2*rand.Float64()))
}

// Read reads from the stream. io.EOF means that the peer ended it (WS-6, WS-9);
// a WebSocket that broke is another error (SOCKS-15).
func (c *conn) Read(b []byte) (int, error) {
	if err := c.readable(); err != nil {
		return 0, err // drain may hold the lock
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	for {
		if err := c.readable(); err != nil {
			return 0, err
		}
		if len(b) == 0 {
			return 0, nil
		}
		n, err := c.receive(b)
		if n > 0 {
			return n, nil // an error is kept, or a deadline that comes again
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if err := c.readable(); err != nil {
				return 0, err // Close interrupts by a deadline
			}
			return 0, err
		}
	}
}

func (c *conn) readable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return c.readErr
}

// receive takes what one Read of the wire gives and acts on it. The error is
// that of the wire; but for a deadline it has been seen to.
func (c *conn) receive(b []byte) (int, error) {
	if len(c.early) > 0 {
		n, used := c.decode(b, c.early)
		if c.early = c.early[used:]; len(c.early) == 0 {
			c.early = nil
		}
		return n, nil
	}
	into := b
	if len(b) < smallRead {
		into = make([]byte, smallRead)
	}
	got, err := c.read(into)
	n, used := c.decode(b, into[:got])
	if used < got {
		c.early = append([]byte(nil), into[used:got]...)
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.lost(err)
	}
	return n, err
}

// read reads from the stream. Under TLS, which gives one record at a time, it takes
// all records that have come, as far as there is room.
func (c *conn) read(b []byte) (n int, err error) {
	n, err = c.stream.Read(b)
	if c.stream == net.Conn(c.wire) {
		return n, err
	}
	c.wire.nowait = true
	defer func() { c.wire.nowait = false }()
	for err == nil && n < len(b) {
		var m int
		m, err = c.stream.Read(b[n:])
		if n += m; errors.Is(err, os.ErrDeadlineExceeded) {
			return n, nil
		}
	}
	return n, err
}

// decode puts what src holds of the stream into dst, until one of them is used
// up or the stream has ended.
func (c *conn) decode(dst, src []byte) (n, used int) {
	for used < len(src) {
		m, took, what, err := c.in.decode(dst[n:], src[used:])
		n += m
		used += took
		if err != nil {
			c.fault(err)
			return n, len(src)
		}
		switch what {
		case nothing:
			return n, used
		case gotPing:
			c.sendPong(c.in.control)
		case gotPong: // the wire has counted it
		case gotEnd:
			c.peerEnd()
			return n, used
		case gotClose:
			c.peerClose(c.in.control)
			return n, len(src)
		}
	}
	return n, used
}

// peerEnd ends the incoming stream (WS-6).
func (c *conn) peerEnd() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peerEnded = true
	if c.readErr == nil {
		c.readErr = io.EOF
	}
	c.startDrain()
}

// peerClose ends both streams, cleanly or not (WS-9).
func (c *conn) peerClose(payload []byte) {
	closed, err := closing(payload)
	if err != nil {
		c.fault(err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answer = closed.Code
	switch {
	case !clean(closed):
		c.finish(closed, closed)
	case c.in.inMessage:
		c.finish(fmt.Errorf("%w inside a message: %w", closed, io.ErrUnexpectedEOF), errGone)
	default:
		c.finish(io.EOF, errGone)
	}
}

// fault ends both streams because of the peer's (WS-12).
func (c *conn) fault(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answer = websocket.CloseProtocolError
	c.finish(err, err)
}

// lost ends both streams because the wire broke. One whose end has been seen
// stays as it is.
func (c *conn) lost(err error) {
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("websocket: the connection ended without a close frame: %w", io.ErrUnexpectedEOF)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.finish(err, err)
}

// finish is called with mu held. It keeps the first errors.
func (c *conn) finish(readErr, writeErr error) {
	if c.readErr == nil {
		c.readErr = readErr
	}
	if c.writeErr == nil {
		c.writeErr = writeErr
	}
	c.over = true
	c.stopPings()
	// A Write that waits would hold up the answer. What it loses is lost anyhow.
	_ = c.wire.SetWriteDeadline(longAgo)
	c.startDrain()
}

// stopPings is called with mu held.
func (c *conn) stopPings() {
	if c.timer != nil {
		c.timer.Stop()
	}
}

// startDrain is called with mu held. The user's deadline does not bind drain.
func (c *conn) startDrain() {
	if c.draining {
		return
	}
	c.draining = true
	_ = c.wire.SetReadDeadline(c.limit) // fails only on a closed conn
	if !c.wire.group.run(c.drain) {
		c.draining = false // there is nothing left to drain
	}
}

// drain reads when nobody else does any more: the incoming stream has ended, or
// the connection was closed. It answers pings, waits for the end of the
// WebSocket, sees to it that the end is proper, and closes the wire.
func (c *conn) drain() {
	c.reading.Lock()
	defer c.reading.Unlock()
	defer c.wire.Close()
	c.endBoth()
	waste := make([]byte, smallRead)
	for !c.isOver() {
		if _, err := c.receive(waste); errors.Is(err, os.ErrDeadlineExceeded) {
			return // the limit has passed
		}
	}
	c.mu.Lock()
	answer, sent := c.answer, c.closeSent
	c.mu.Unlock()
	if answer == 0 {
		return // the wire is lost
	}
	limit := time.Now().Add(answerTime)
	_ = c.wire.SetWriteDeadline(limit) // these fail only on a closed conn
	_ = c.wire.SetReadDeadline(limit)
	if !sent {
		c.sendClose(answer)
	}
	if !c.client {
		_ = c.wire.ready()   // the answer may stand behind what was kept
		_ = c.stream.Close() // the peer has both frames: it loses nothing
		return
	}
	// The server closes first (RFC 6455, section 7.1.1): a client that did would
	// have to remember the connection, or reset it under the server's last bytes.
	for {
		if _, err := c.stream.Read(waste); err != nil {
			return
		}
	}
}

func (c *conn) isOver() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over
}

// endBoth sends the close frame when both streams have ended (WS-8).
func (c *conn) endBoth() {
	c.mu.Lock()
	done := c.ended && c.peerEnded && !c.closeSent
	c.mu.Unlock()
	if done {
		c.sendClose(websocket.CloseNormalClosure)
		_ = c.wire.SetReadDeadline(time.Now().Add(lingerTime)) // fails only on a closed conn
	}
}

// Write writes to the stream. Bytes that a deadline kept back count as written
// and go out later; there is less than a frame of them.
func (c *conn) Write(b []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	n := 0
	for {
		if err := c.writable(); err != nil {
			return n, err
		}
		if err := c.wire.ready(); err != nil {
			if err := c.writable(); err != nil {
				return n, err // Close interrupts by a deadline
			}
			return n, err
		}
		if n == len(b) {
			return n, nil // no empty message: that would end the stream (WS-5)
		}
		chunk := b[n:min(n+maxPayload, len(b))]
		if err := c.send(opBinary, chunk); err != nil {
			return n, err
		}
		if n += len(chunk); n == len(b) {
			return n, nil
		}
	}
}

func (c *conn) writable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return net.ErrClosed
	case c.writeErr != nil:
		return c.writeErr
	case c.ended:
		return errEnded
	}
	return nil
}

// send writes one frame. writing is held.
func (c *conn) send(op byte, payload []byte) error {
	var key *[4]byte
	if c.client {
		key = new([4]byte)
		r := rand.Uint32() // not to be foretold by whoever chose the payload
		*key = [4]byte{byte(r), byte(r >> 8), byte(r >> 16), byte(r >> 24)}
	}
	buf := frames.Get().(*[maxHeader + maxPayload]byte)
	defer frames.Put(buf)
	secure := c.stream != net.Conn(c.wire)
	if secure {
		c.wire.cork()
	}
	_, err := c.stream.Write(appendFrame(buf[:0], op, payload, key))
	if secure {
		err = firstOf(err, c.wire.uncork())
	}
	if err == nil {
		return nil
	}
	// What the peer has sent before is still to be read.
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writeErr == nil {
		c.writeErr = err
	}
	if c.closed {
		return net.ErrClosed
	}
	return c.writeErr
}

// CloseWrite ends the outgoing stream (WS-6).
func (c *conn) CloseWrite() error {
	c.writing.Lock()
	err := c.writable()
	if err == nil {
		err = c.wire.ready()
	}
	if err == nil {
		err = c.end()
	}
	c.writing.Unlock()
	if errors.Is(err, errEnded) {
		return nil
	}
	if err == nil {
		c.endBoth()
	}
	return err
}

// end sends the mark (WS-6). writing is held.
func (c *conn) end() error {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	return c.send(opBinary, nil)
}

// sendClose sends a close frame, unless one has been sent.
func (c *conn) sendClose(code int) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.mu.Lock()
	sent := c.closeSent
	c.closeSent = true
	c.stopPings()
	c.mu.Unlock()
	if !sent {
		_ = c.send(opClose, websocket.FormatCloseMessage(code, "")) // a wire that broke needs none
	}
}

// sendPong answers a ping in the background, and of several the last one: a
// reader that waited to write would hold up the peer's reader, who may do the same.
func (c *conn) sendPong(payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	busy := c.pong != nil
	c.pong = append(make([]byte, 0, maxControl), payload...)
	if busy {
		return
	}
	if !c.wire.group.run(func() {
		c.writing.Lock()
		defer c.writing.Unlock()
		c.mu.Lock()
		payload := c.pong
		c.pong = nil
		c.mu.Unlock()
		c.control(opPong, payload)
	}) {
		c.pong = nil
	}
}

// control sends a ping or a pong, if that makes sense now. writing is held.
func (c *conn) control(op byte, payload []byte) {
	c.mu.Lock()
	silent := c.over || c.closeSent || c.writeErr != nil
	c.mu.Unlock()
	if !silent && !c.wire.stuck() {
		_ = c.send(op, payload) // it is kept for Write
	}
}

// tick pings and looks for life (WS-13, WS-14). Nothing is known about a peer
// while nobody waits for it: what it sent may lie in the system's buffer.
func (c *conn) tick() {
	c.mu.Lock()
	if c.closed || c.over || c.closeSent || c.wire.closed.Load() {
		c.mu.Unlock()
		return
	}
	if reads := c.wire.reads.Load(); reads%2 == 1 && reads == c.lastReads {
		c.missed++
	} else {
		c.missed, c.lastReads = 0, reads
	}
	if c.missed >= silentPings {
		c.readErr, c.writeErr = firstOf(c.readErr, errSilent), firstOf(c.writeErr, errSilent)
		c.mu.Unlock()
		c.wire.abort()
		return
	}
	c.timer.Reset(jitter(c.ping))
	c.mu.Unlock()
	if c.writing.TryLock() { // a frame that is on its way does as well
		c.control(opPing, nil)
		c.writing.Unlock()
	}
}

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// Close ends both directions and returns at once. What was written goes out in
// the background, followed by the end of the stream and a close frame (WS-10).
func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	c.stopPings()
	if c.over {
		return nil // drain closes the wire
	}
	c.limit = time.Now().Add(lingerTime)
	_ = c.wire.SetWriteDeadline(longAgo) // interrupts a Write; fails only on a closed conn
	if !c.draining {
		_ = c.wire.SetReadDeadline(longAgo)
	}
	if !c.wire.group.run(c.linger) {
		return nil // the group has cut the wire
	}
	return nil
}

// linger sends what follows the last Write, and has drain wait for the peer.
func (c *conn) linger() {
	c.writing.Lock()
	_ = c.wire.SetWriteDeadline(c.limit) // fails only on a closed conn
	c.mu.Lock()
	ended, broke, draining := c.ended, c.writeErr != nil, c.draining
	c.mu.Unlock()
	if !ended && !broke {
		_ = c.end() // drain finds out
	}
	c.writing.Unlock()
	switch {
	case !broke:
		c.sendClose(websocket.CloseNormalClosure)
	case !draining:
		_ = c.wire.Close() // the peer hears nothing any more, and nobody listens
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining {
		_ = c.wire.SetReadDeadline(c.limit)
	}
	c.startDrain()
}

// Abort closes the connection so that the peer's stream breaks: without a close
// frame, and with a reset where the network has one (WS-10).
func (c *conn) Abort() error {
	c.mu.Lock()
	c.closed = true
	c.stopPings()
	c.mu.Unlock()
	c.wire.abort()
	return nil
}

// refuse closes a connection that nobody wants. It blocks for a while.
func (c *conn) refuse() {
	_ = c.wire.SetWriteDeadline(time.Now().Add(answerTime)) // fails only on a closed conn
	c.sendClose(websocket.CloseTryAgainLater)
	_ = c.stream.Close()
}

// LocalAddr returns the local address.
func (c *conn) LocalAddr() net.Addr { return c.wire.LocalAddr() }

// RemoteAddr returns the address of the peer, which a trusted proxy may have told.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets both deadlines.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline sets the deadline of Read. A connection lives on after one.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return net.ErrClosed
	case c.draining:
		return nil
	}
	return c.wire.SetReadDeadline(t)
}

// SetWriteDeadline sets the deadline of Write and CloseWrite. A connection lives
// on after one.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return net.ErrClosed
	case c.over:
		return nil
	}
	return c.wire.SetWriteDeadline(t)
}
