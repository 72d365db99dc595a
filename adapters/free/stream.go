package free

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"pthost/ptipc"
)

var (
	errReset   = fmt.Errorf("free: the peer reset the stream: %w", syscall.ECONNRESET)
	errStopped = fmt.Errorf("free: the peer reads no more: %w", syscall.EPIPE)
	errEnded   = fmt.Errorf("free: write after CloseWrite: %w", io.ErrClosedPipe)
)

// A muxStream is one of many on a carrier. Its fields belong to the session's mutex.
type muxStream struct {
	session *session
	id      uint32

	reading, writing sync.Mutex // one Read and one Write at a time; taken before the session's

	readable, writable sync.Cond
	readBy, writeBy    deadline

	// What came and was not read.
	chunks  []*chunk
	unread  int
	want    []byte // where a Read that waits has room
	got     int    // bytes in what was want
	readErr error  // behind all that; io.EOF or it broke

	size     int // of the window: what the peer may have on its way or unread
	extra    int // of it, what is from the budget
	window   int // what is left of it
	consumed int // read, and not given back to the peer

	credit   int  // what may still be sent
	blocked  bool // it is among those of the session
	writeErr error
	moved    int64 // bytes, both ways

	answered  bool        // by the server
	answerErr error       // it refused
	onHangUp  func(error) // a server's, until it answers
	ended     bool        // END was sent, or nothing can be sent any more
	peerEnded bool        // END has come, or nothing comes any more
	closed    bool
}

func newStream(c *session, id uint32) *muxStream {
	s := &muxStream{session: c, id: id, size: firstWindow, window: firstWindow, credit: firstWindow}
	s.readable.L, s.writable.L = &c.mu, &c.mu
	return s
}

// A chunk holds what came of a stream.
type chunk struct {
	b    []byte
	r, w int
}

const (
	smallChunk = 2 << 10
	largeChunk = 32 << 10
)

var (
	smallChunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, smallChunk)} }}
	largeChunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, largeChunk)} }}
)

func newChunk(n int) *chunk {
	pool := &smallChunks
	if n > smallChunk {
		pool = &largeChunks
	}
	c := pool.Get().(*chunk)
	c.r, c.w = 0, 0
	return c
}

func (c *chunk) free() {
	if len(c.b) == smallChunk {
		smallChunks.Put(c)
	} else {
		largeChunks.Put(c)
	}
}

// deliver takes data off the carrier. The window has room for it.
func (s *muxStream) deliver(p []byte) {
	if s.closed || s.readErr != nil {
		return // nobody will read it
	}
	if s.want != nil && len(p) > 0 {
		s.got = copy(s.want, p)
		s.want = nil
		p = p[s.got:]
		s.readable.Broadcast()
	}
	for len(p) > 0 {
		var last *chunk
		if n := len(s.chunks); n > 0 && s.chunks[n-1].w < len(s.chunks[n-1].b) {
			last = s.chunks[n-1]
		} else {
			last = newChunk(len(p))
			s.chunks = append(s.chunks, last)
		}
		n := copy(last.b[last.w:], p)
		last.w += n
		s.unread += n
		p = p[n:]
	}
}

// take moves what was not read to b.
func (s *muxStream) take(b []byte) (n int) {
	for len(s.chunks) > 0 && n < len(b) {
		first := s.chunks[0]
		m := copy(b[n:], first.b[first.r:first.w])
		first.r += m
		n += m
		if first.r == first.w {
			first.free()
			s.chunks[0] = nil
			if s.chunks = s.chunks[1:]; len(s.chunks) == 0 {
				s.chunks = nil
			}
		}
	}
	s.unread -= n
	return n
}

// drop forgets what was not read.
func (s *muxStream) drop() {
	for _, c := range s.chunks {
		c.free()
	}
	s.chunks, s.unread = nil, 0
	s.giveBack()
}

// giveBack returns what the stream has of the budget, once it is over and all was read.
func (s *muxStream) giveBack() {
	if s.extra > 0 && s.unread == 0 && s.session.streams[s.id] != s {
		s.session.windows.give(s.extra)
		s.extra = 0
	}
}

// grant gives the peer room for what was read, and more than that to a reader who
// has read all there was (FREE-19).
func (s *muxStream) grant(n int) {
	s.consumed += n
	if s.readErr != nil || s.consumed < s.size/2 {
		return
	}
	more := s.consumed
	s.consumed = 0
	if s.unread == 0 && s.size < maxWindow && s.session.streams[s.id] == s && s.session.windows.take(s.size) {
		more += s.size
		s.extra += s.size
		s.size *= 2
	}
	s.window += more
	s.session.send(frameWindow, s.id, binary.BigEndian.AppendUint32(nil, uint32(more)))
}

// Read reads from the stream. io.EOF means that the peer ended it; a stream that
// was reset, or whose carrier broke, is another error (FREE-18).
func (s *muxStream) Read(b []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	for {
		switch {
		case s.closed:
			return 0, net.ErrClosed
		case s.readBy.passed():
			return 0, os.ErrDeadlineExceeded
		case len(b) == 0:
			return 0, nil
		case s.unread > 0:
			n := s.take(b)
			s.grant(n)
			s.giveBack()
			return n, nil
		case s.readErr != nil:
			return 0, s.readErr
		}
		s.want = b
		s.readable.Wait()
		s.want = nil
		if n := s.got; n > 0 {
			s.got = 0
			n += s.take(b[n:])
			s.grant(n)
			s.giveBack()
			return n, nil
		}
	}
}

// Write writes to the stream. What it took is on its way to the carrier.
func (s *muxStream) Write(b []byte) (n int, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	c := s.session
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case s.closed:
			return n, net.ErrClosed
		case s.writeErr != nil:
			return n, s.writeErr
		case s.ended:
			return n, errEnded
		case s.writeBy.passed():
			return n, os.ErrDeadlineExceeded
		case n == len(b):
			return n, nil
		}
		rest := len(b) - n
		room := c.room()
		switch {
		case s.credit == 0:
		case room < min(rest, minRoom), len(c.control) > 0: // behind which it would overtake
			if !s.blocked {
				s.blocked = true
				c.blocked = append(c.blocked, s)
			}
		default:
			m := min(rest, room, s.credit)
			c.out = appendFrame(c.out, frameData, s.id, b[n:n+m])
			c.writer.Signal()
			s.credit -= m
			if s.moved += int64(m); s.moved > bulkBytes {
				c.bulk.Store(time.Now().UnixNano())
			}
			if n += m; n == len(b) {
				return n, nil
			}
			continue
		}
		s.writable.Wait()
	}
}

// CloseWrite ends the outgoing direction (FREE-18).
func (s *muxStream) CloseWrite() error {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	switch {
	case s.closed:
		return net.ErrClosed
	case s.writeErr != nil:
		return s.writeErr
	}
	s.end()
	return nil
}

// end sends END, once.
func (s *muxStream) end() {
	if s.ended {
		return
	}
	s.ended = true
	s.session.send(frameEnd, s.id, nil)
	s.writable.Broadcast()
	s.settle()
}

// settle forgets the stream when both directions are over.
func (s *muxStream) settle() {
	if s.ended && s.peerEnded {
		s.session.remove(s)
	}
}

// Close ends both directions: the peer reads what was written and the end of it,
// and its writes fail (FREE-18).
func (s *muxStream) Close() error {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if !s.peerEnded {
		s.session.send(frameStop, s.id, nil)
		s.peerEnded = true
	}
	if s.writeErr == nil {
		s.end()
	}
	s.release()
	return nil
}

// Abort ends both directions so that the peer's stream breaks (FREE-18).
func (s *muxStream) Abort() error {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	s.abort()
	return nil
}

func (s *muxStream) abort() {
	s.closed = true
	if s.session.streams[s.id] == s {
		s.session.send(frameReset, s.id, nil)
	}
	s.release()
}

// release lets go of what a closed stream holds.
func (s *muxStream) release() {
	s.ended, s.peerEnded = true, true
	s.settle()
	s.drop()
	s.readBy.stop()
	s.writeBy.stop()
	s.readable.Broadcast()
	s.writable.Broadcast()
}

// broke ends both directions because of the peer or the carrier.
func (s *muxStream) broke(err error) {
	s.hangUp(err)
	if s.readErr == nil {
		s.readErr = err
		s.drop() // a reset is no end
	}
	if s.writeErr == nil {
		s.writeErr = err
	}
	if !s.answered {
		s.answered, s.answerErr = true, err
	}
	s.ended, s.peerEnded = true, true
	s.giveBack()
	s.readable.Broadcast()
	s.writable.Broadcast()
}

// peerEnd is the peer's END.
func (s *muxStream) peerEnd() {
	if s.unread == 0 {
		s.hangUp(errHungUp) // FREE-11
	}
	s.peerEnded = true
	if s.readErr == nil {
		s.readErr = io.EOF
	}
	s.readable.Broadcast()
	s.settle()
}

// peerStop is the peer's STOP.
func (s *muxStream) peerStop() {
	s.hangUp(errHungUp)
	if s.writeErr == nil {
		s.writeErr = errStopped
	}
	s.ended = true
	s.writable.Broadcast()
	s.settle()
}

func (s *muxStream) hangUp(err error) {
	if s.onHangUp != nil {
		s.onHangUp(err)
		s.onHangUp = nil
	}
}

// watch has f called if the client hangs up before the answer (FREE-11).
func (s *muxStream) watch(f func(error)) {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	switch {
	case s.ended || s.closed:
		f(errHungUp)
	case s.peerEnded && s.unread == 0:
		f(errHungUp)
	default:
		s.onHangUp = f
	}
}

// respond answers the client, with 0 or why it is refused; false means that the client
// has hung up.
func (s *muxStream) respond(class ptipc.Class) bool {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	return s.answerLocked(class)
}

func (s *muxStream) answerLocked(class ptipc.Class) bool {
	s.onHangUp = nil
	if s.session.streams[s.id] != s {
		return false
	}
	s.session.send(frameAnswer, s.id, []byte{byte(class)})
	s.answered = true
	if class != 0 {
		s.closed = true
		s.release()
	}
	return true
}

// answer takes the server's answer.
func (s *muxStream) answer(class ptipc.Class) {
	s.answered = true
	if class != 0 {
		s.answerErr = refusal(class)
		s.closed = true
		s.release()
	}
	s.readable.Broadcast()
}

// fail ends a dial.
func (s *muxStream) fail(err error) {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	if s.answered {
		return
	}
	s.answered, s.answerErr = true, err
	s.abort()
}

// wait waits for the answer. When ctx ends first, the far end takes it as a hang-up.
func (s *muxStream) wait(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		s.fail(fmt.Errorf("free: the far end has not answered: %w", context.Cause(ctx)))
	})
	defer stop()
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	for !s.answered {
		s.readable.Wait()
	}
	return s.answerErr
}

// LocalAddr returns the carrier's local address.
func (s *muxStream) LocalAddr() net.Addr { return s.session.carrier.LocalAddr() }

// RemoteAddr returns the carrier's peer.
func (s *muxStream) RemoteAddr() net.Addr { return s.session.carrier.RemoteAddr() }

// SetDeadline sets both deadlines.
func (s *muxStream) SetDeadline(t time.Time) error {
	return s.setDeadlines(t, &s.readBy, &s.writeBy)
}

// SetReadDeadline sets the deadline of Read.
func (s *muxStream) SetReadDeadline(t time.Time) error { return s.setDeadlines(t, &s.readBy) }

// SetWriteDeadline sets the deadline of Write.
func (s *muxStream) SetWriteDeadline(t time.Time) error { return s.setDeadlines(t, &s.writeBy) }

func (s *muxStream) setDeadlines(t time.Time, deadlines ...*deadline) error {
	s.session.mu.Lock()
	defer s.session.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	for _, d := range deadlines {
		d.set(t, func() {
			s.session.mu.Lock()
			defer s.session.mu.Unlock()
			s.readable.Broadcast()
			s.writable.Broadcast()
		})
	}
	s.readable.Broadcast()
	s.writable.Broadcast()
	return nil
}

// A deadline of Read or Write.
type deadline struct {
	at    time.Time
	timer *time.Timer
}

// set has wake called when the time has come.
func (d *deadline) set(at time.Time, wake func()) {
	d.stop()
	d.at = at
	if left := time.Until(at); !at.IsZero() && left > 0 {
		d.timer = time.AfterFunc(left, wake)
	}
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }
