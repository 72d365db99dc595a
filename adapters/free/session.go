package free

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/relay"
)

const (
	firstWindow = 64 << 10 // what a stream may send before it is told more (FREE-19)
	maxWindow   = 4 << 20  // what it becomes for a reader who keeps up
	extraWindow = 64 << 20 // the sum of what windows have become larger, of one client or server

	outSize    = 256 << 10 // frames on their way to the carrier
	minRoom    = 32 << 10  // with less, what has more to say waits
	maxControl = 256 << 10 // what waits behind them; only a hostile peer makes that much of it

	pingInterval    = 30 * time.Second // FREE-21
	silentIntervals = 3

	maxPerCarrier = 1024 // streams; the server's limit (FREE-20)

	bulkBytes = 1 << 20 // a stream that has moved as much is bulk
)

var (
	errGone    = fmt.Errorf("free: the carrier has ended: %w", io.ErrUnexpectedEOF)
	errSilence = ptipc.WithClass(ptipc.ErrTimedOut, fmt.Errorf("free: nothing came from the peer for %v: it is gone", silentIntervals*pingInterval))
	errOld     = errors.New("free: the far end takes one stream for each carrier")
)

// A budget bounds memory that many streams share.
type budget struct{ left atomic.Int64 }

func newBudget(n int64) *budget {
	b := new(budget)
	b.left.Store(n)
	return b
}

func (b *budget) take(n int) bool {
	if b.left.Add(-int64(n)) >= 0 {
		return true
	}
	b.give(n)
	return false
}

func (b *budget) give(n int) { b.left.Add(int64(n)) }

// A session is a carrier of many streams (FREE-15). One goroutine reads, and never
// waits for a stream: what it reads is within the windows of the streams. One writes
// what streams have put into out.
type session struct {
	carrier net.Conn
	windows *budget
	accept  func(s *muxStream, open []byte) // what a server does with a stream, in a goroutine; nil on a client
	onFree  func()                          // a stream has gone; called with mu held

	mu      sync.Mutex
	err     error // why it has ended; nil while it lives
	streams map[uint32]*muxStream
	last    uint32 // the highest stream so far
	out     []byte // frames to be written
	control []byte // frames that are not data, and found no room in out
	writer  sync.Cond
	blocked []*muxStream // that wait for room in out
	closing bool         // when no streams are left; new ones are refused
	greeted bool         // the answer to the client's greeting has come
	pong    bool         // a PONG is on its way to the writer

	handlers chan struct{} // one for each accept
	refused  func()        // a server counts a stream that it did not accept
	work     sync.WaitGroup

	// Of the goroutine that reads.
	dec      decoder
	greeting []byte

	received atomic.Bool  // something, since the last tick
	dead     atomic.Bool  // err is set
	bulk     atomic.Int64 // when bulk was moved last, in nanoseconds
	missed   int          // ticks
	timer    *time.Timer
}

var outs = sync.Pool{New: func() any { return new([outSize]byte) }}

// newSession starts a session. greeting is the first thing that is written.
func newSession(carrier net.Conn, windows *budget, greeting []byte) *session {
	c := &session{carrier: carrier, windows: windows, streams: make(map[uint32]*muxStream), onFree: func() {}}
	c.writer.L = &c.mu
	c.out = append(outs.Get().(*[outSize]byte)[:0], greeting...)
	return c
}

func (c *session) start() {
	c.work.Add(2)
	c.mu.Lock()
	c.timer = time.AfterFunc(jitter(pingInterval), c.tick)
	c.mu.Unlock()
	go c.read()
	go c.write()
}

// jitter keeps the pings of many carriers from falling together.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.9 + 0.2*rand.Float64()))
}

// end ends the session, and with it its streams. mu is held.
func (c *session) end(err error) {
	if c.err != nil {
		return
	}
	c.err = err
	c.dead.Store(true)
	c.timer.Stop()
	for id, s := range c.streams {
		delete(c.streams, id)
		s.broke(err) // FREE-18
		c.onFree()
	}
	c.writer.Signal()
	c.work.Go(func() {
		if errors.Is(err, net.ErrClosed) {
			_ = c.carrier.Close() // nothing was on its way
		} else {
			_ = relay.Abort(c.carrier)
		}
	})
}

// abort ends the session with whatever runs on it.
func (c *session) abort(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.end(err)
}

// close ends the session once it has no streams, and refuses new ones.
func (c *session) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closing = true
	c.writer.Signal()
}

// tick pings, and looks for life (FREE-21).
func (c *session) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	if c.received.Swap(false) {
		c.missed = 0
	} else {
		if c.missed++; c.missed == silentIntervals {
			c.end(errSilence)
			return
		}
		c.send(framePing, 0, nil)
	}
	c.timer.Reset(jitter(pingInterval))
}

// write writes what streams have to say.
func (c *session) write() {
	defer c.work.Done()
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		for c.err == nil && len(c.out) == 0 {
			if c.closing && len(c.streams) == 0 {
				c.end(net.ErrClosed)
				return
			}
			c.writer.Wait()
		}
		if c.err != nil {
			return
		}
		out, control := c.out, c.control
		c.out, c.control, c.pong = nil, nil, false
		for _, s := range c.blocked {
			s.blocked = false
			s.writable.Signal()
		}
		c.blocked = c.blocked[:0]
		c.mu.Unlock()
		_, err := c.carrier.Write(out)
		outs.Put((*[outSize]byte)(out[:outSize]))
		if err == nil && len(control) > 0 {
			_, err = c.carrier.Write(control)
		}
		c.mu.Lock()
		if err != nil {
			c.end(fmt.Errorf("free: write to the carrier: %w", err))
		}
	}
}

// room is how much data one frame more can have in out. mu is held.
func (c *session) room() int {
	if c.out == nil {
		c.out = outs.Get().(*[outSize]byte)[:0]
	}
	return min(outSize-len(c.out)-frameHeader, maxFrameData)
}

// send queues a frame that is not data. mu is held.
func (c *session) send(kind byte, id uint32, payload []byte) {
	switch {
	case c.err != nil:
	case len(c.control) == 0 && c.room() >= len(payload):
		c.out = appendFrame(c.out, kind, id, payload)
		c.writer.Signal()
	case len(c.control) > maxControl: // FREE-20
		c.end(errors.New("free: the peer does not read what it asks for"))
	default: // behind out, which has no more room until the writer takes both
		c.control = appendFrame(c.control, kind, id, payload)
	}
}

// What a Read waits with is small, and larger after one that was full: then there is
// more to come, and with the largest hardly a need to wait.
var readBuffers = [...]sync.Pool{
	{New: func() any { return newBuffer(2 << 10) }},
	{New: func() any { return newBuffer(32 << 10) }},
	{New: func() any { return newBuffer(256 << 10) }},
}

func newBuffer(size int) *[]byte {
	b := make([]byte, size)
	return &b
}

// read reads frames until the carrier ends.
func (c *session) read() {
	defer c.work.Done()
	for size := 0; ; {
		buf := readBuffers[size].Get().(*[]byte)
		n, err := c.carrier.Read(*buf)
		err = c.take((*buf)[:n], err)
		readBuffers[size].Put(buf)
		switch {
		case err != nil:
			c.abort(err)
			return
		case n == len(*buf):
			size = min(size+1, len(readBuffers)-1)
		case size > 0 && n > 2<<10:
			size = 1
		default:
			size = 0
		}
	}
}

// take acts on what a Read gave.
func (c *session) take(b []byte, rerr error) error {
	c.received.Store(true)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if c.accept == nil && !c.greeted {
		var err error
		if b, err = c.greet(b); err != nil {
			return err
		}
	}
	if err := c.dec.decode(b, c); err != nil {
		return err
	}
	switch {
	case rerr == nil:
		return nil
	case !errors.Is(rerr, io.EOF):
		return fmt.Errorf("free: read from the carrier: %w", rerr)
	case len(c.streams) == 0 && c.dec.have == 0 && (c.accept != nil || c.greeted):
		return net.ErrClosed
	}
	return errGone
}

// greet takes the answer to a client's greeting (FREE-16).
func (c *session) greet(b []byte) ([]byte, error) {
	n := min(answerSize-len(c.greeting), len(b))
	c.greeting = append(c.greeting, b[:n]...)
	if len(c.greeting) < answerSize {
		return nil, nil
	}
	class := ptipc.Class(c.greeting[1])
	switch {
	case c.greeting[0] == version && class == ptipc.ErrCommand:
		return nil, errOld
	case c.greeting[0] != version && c.greeting[0] != versionMany:
		return nil, fmt.Errorf("free: the far end answers in version %d, it is no free server: %w", c.greeting[0], ptipc.ErrGeneral)
	case class != 0 && class.Known():
		return nil, fmt.Errorf("free: the far end refused the carrier: %w", class)
	case class != 0 || c.greeting[0] == version:
		return nil, fmt.Errorf("free: the far end refused the carrier for an unknown reason, 0x%02x: %w", c.greeting[1], ptipc.ErrGeneral)
	}
	c.greeted, c.greeting = true, nil
	return b[n:], nil
}

// begin implements [frameReceiver].
func (c *session) begin(kind byte, id uint32, length int) error {
	switch kind {
	case framePing, framePong:
		if id != 0 {
			return fault("a ping is for a stream")
		}
		return nil
	case frameOpen:
		if c.accept == nil {
			return fault("a server opens a stream")
		}
		if id <= c.last { // 0 as well
			return fault("a stream is opened that was there before")
		}
		return nil
	case frameAnswer:
		if c.accept != nil {
			return fault("a client answers")
		}
	case frameData:
		if id == 0 || id > c.last {
			break
		}
		s := c.streams[id]
		if s == nil {
			return nil // it has gone, and the peer does not know yet
		}
		if !s.answered && c.accept == nil {
			return fault("data came before the answer") // FREE-7
		}
		if s.peerEnded {
			return fault("data came after the end of the stream")
		}
		if length > s.window {
			return fault("a stream sends more than its window")
		}
		s.window -= length
		if s.moved += int64(length); s.moved > bulkBytes {
			c.bulk.Store(time.Now().UnixNano())
		}
		return nil
	}
	if _, _, known := limit(kind); known && (id == 0 || id > c.last) {
		return fault("a frame is for a stream that was never opened")
	}
	return nil
}

// data implements [frameReceiver].
func (c *session) data(id uint32, p []byte) error {
	if s := c.streams[id]; s != nil {
		s.deliver(p)
	}
	return nil
}

// frame implements [frameReceiver].
func (c *session) frame(kind byte, id uint32, payload []byte) error {
	switch kind {
	case frameOpen:
		c.last = id
		return c.opened(id, payload)
	case framePing:
		if !c.pong { // one answers several
			c.pong = true
			c.send(framePong, 0, nil)
		}
		return nil
	}
	s := c.streams[id]
	if s == nil {
		return nil
	}
	switch kind {
	case frameAnswer:
		if s.answered {
			return fault("a stream is answered twice")
		}
		s.answer(ptipc.Class(payload[0]))
	case frameEnd:
		if s.peerEnded {
			return fault("a stream ends twice")
		}
		s.peerEnd()
	case frameStop:
		s.peerStop()
	case frameReset:
		s.broke(errReset)
		c.remove(s)
	case frameWindow:
		n := int64(binary.BigEndian.Uint32(payload))
		if n+int64(s.credit) > 1<<31-1 {
			return fault("a window is too large")
		}
		s.credit += int(n)
		s.writable.Signal()
	}
	return nil
}

// opened starts what a server does with a stream (FREE-17).
func (c *session) opened(id uint32, open []byte) error {
	s := newStream(c, id)
	s.answered = false
	c.streams[id] = s
	full := c.closing // FREE-24
	if !full {
		select {
		case c.handlers <- struct{}{}:
		default: // FREE-20
			full = true
		}
	}
	if full {
		c.refused()
		s.answerLocked(ptipc.ErrGeneral)
		return nil
	}
	body := append([]byte(nil), open...)
	c.work.Go(func() {
		defer func() { <-c.handlers }()
		c.accept(s, body)
	})
	return nil
}

// open opens a stream (FREE-17). The caller waits for its answer.
func (c *session) open(body []byte) (*muxStream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return nil, c.err
	case c.closing || c.last == 1<<32-1:
		return nil, errGone
	}
	c.last++
	s := newStream(c, c.last)
	c.streams[s.id] = s
	c.send(frameOpen, s.id, body)
	return s, nil
}

// remove forgets a stream of which nothing more comes. mu is held.
func (c *session) remove(s *muxStream) {
	if c.streams[s.id] != s {
		return
	}
	delete(c.streams, s.id)
	s.giveBack()
	c.onFree()
	if c.closing && len(c.streams) == 0 {
		c.writer.Signal()
	}
}

// movesBulk reports whether a stream has moved bulk of late.
func (c *session) movesBulk() bool {
	last := c.bulk.Load()
	return last != 0 && time.Since(time.Unix(0, last)) < bulkTime
}

const bulkTime = 2 * time.Second
