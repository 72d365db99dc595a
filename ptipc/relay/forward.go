package relay

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"pthost/ptipc"
)

// The limits of a [PacketForward] that does not set its own.
const (
	DefaultIdle     = 2 * time.Minute // what RFC 4787 asks of those who translate addresses
	DefaultSessions = 1024
)

const (
	// MaxDatagram is the largest payload that a [PacketForward] carries. A longer one is
	// dropped and counted, never cut (PKT-6).
	MaxDatagram = 4096
	// maxQueue is how many datagrams wait for a session's socket.
	maxQueue = 64
	// openTimeout bounds the opening of a session's socket.
	openTimeout = 30 * time.Second
)

// A PacketForward passes the datagrams that come to one socket on to one address, and
// the answers back. Each source address is a session with a socket of its own, so
// that answers find their way; it ends when nothing has gone either way for the
// time Idle. When there are as many sessions as there may be, a new source takes
// the place of the one that was silent for longest. Fields must not change once Serve
// has been called.
type PacketForward struct {
	// Open opens a session's socket.
	Open ptipc.PacketFactory
	// To is where datagrams go, and the only address that is answered for.
	To netip.AddrPort
	// Idle is how long a session without datagrams lives. 0 is DefaultIdle.
	Idle time.Duration
	// Max bounds the sessions. 0 is DefaultSessions.
	Max int
	// Log receives warnings about sessions that could not be opened. nil discards.
	Log *slog.Logger

	once sync.Once
	log  *slog.Logger
	ctx  context.Context
	cut  context.CancelFunc
	idle time.Duration
	to   *net.UDPAddr
	open sync.WaitGroup

	mu       sync.Mutex
	closing  bool
	fronts   map[net.PacketConn]bool
	sessions map[origin]*list.Element
	recent   *list.List // of *session, the one that was silent for longest at its end

	opened, failed, evicted, dropped, received, sent atomic.Uint64
	warned                                           atomic.Int64 // when, in seconds since 1970
}

// origin is who a session belongs to.
type origin struct {
	front net.PacketConn
	from  netip.AddrPort
}

type session struct {
	origin
	addr *net.UDPAddr // of origin
	stop context.CancelFunc

	used atomic.Int64 // when the last datagram went either way, in nanoseconds of the clock

	mu    sync.Mutex
	conn  net.PacketConn // nil until it is open
	queue [][]byte       // what came before it was
}

// ForwardStats count what a [PacketForward] has done.
type ForwardStats struct {
	Active   int    // sessions now
	Opened   uint64 // sessions ever opened
	Failed   uint64 // sessions whose socket could not be opened
	Evicted  uint64 // sessions that had to go for a new one
	Dropped  uint64 // datagrams: too long, from elsewhere, or too many for a socket that is not open yet
	Received uint64 // bytes of answers
	Sent     uint64 // bytes for the destination
}

// Stats returns the counts since the beginning.
func (f *PacketForward) Stats() ForwardStats {
	f.init()
	f.mu.Lock()
	active := len(f.sessions)
	f.mu.Unlock()
	return ForwardStats{
		Active: active, Opened: f.opened.Load(), Failed: f.failed.Load(), Evicted: f.evicted.Load(),
		Dropped: f.dropped.Load(), Received: f.received.Load(), Sent: f.sent.Load(),
	}
}

func (f *PacketForward) init() {
	f.once.Do(func() {
		f.log = f.Log
		if f.log == nil {
			f.log = slog.New(slog.DiscardHandler)
		}
		f.idle = f.Idle
		if f.idle <= 0 {
			f.idle = DefaultIdle
		}
		f.to = net.UDPAddrFromAddrPort(f.To)
		f.ctx, f.cut = context.WithCancel(context.Background())
		f.fronts, f.sessions, f.recent = map[net.PacketConn]bool{}, map[origin]*list.Element{}, list.New()
	})
}

// Serve passes on what comes to front until Shutdown, and then returns nil, or until
// front fails. It closes front.
func (f *PacketForward) Serve(front net.PacketConn) error {
	f.init()
	defer front.Close()
	if !f.enter(func() { f.fronts[front] = true }) {
		return nil
	}
	sweep := make(chan struct{})
	var sweeping sync.WaitGroup
	sweeping.Go(func() { f.sweep(front, sweep) })
	err := f.receive(front)
	close(sweep)
	sweeping.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.fronts, front)
	if f.closing {
		return nil
	}
	return fmt.Errorf("relay: datagrams to %s: %w", front.LocalAddr(), err)
}

// enter runs step unless Shutdown has begun.
func (f *PacketForward) enter(step func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closing {
		step()
	}
	return !f.closing
}

func (f *PacketForward) receive(front net.PacketConn) error {
	buf := make([]byte, MaxDatagram+1)
	for {
		n, addr, err := front.ReadFrom(buf)
		var timeout net.Error
		switch {
		case err != nil && errors.As(err, &timeout) && timeout.Timeout():
			continue
		case err != nil:
			return err
		}
		udp, ok := addr.(*net.UDPAddr)
		if !ok || n > MaxDatagram {
			f.dropped.Add(1)
			continue
		}
		if s := f.session(origin{front, udp.AddrPort()}, udp); s != nil {
			f.pass(s, buf[:n])
		}
	}
}

// session finds or makes the session of a source. It is nil when there are no more.
func (f *PacketForward) session(from origin, addr *net.UDPAddr) *session {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e, ok := f.sessions[from]; ok {
		f.recent.MoveToFront(e)
		return e.Value.(*session)
	}
	if f.closing {
		return nil
	}
	limit := f.Max
	if limit <= 0 {
		limit = DefaultSessions
	}
	for len(f.sessions) >= limit {
		oldest := f.recent.Back().Value.(*session)
		f.evicted.Add(1)
		f.forget(oldest)
	}
	ctx, stop := context.WithCancel(f.ctx)
	s := &session{origin: from, addr: addr, stop: stop}
	s.used.Store(time.Now().UnixNano())
	f.sessions[from] = f.recent.PushFront(s)
	f.opened.Add(1)
	f.open.Go(func() {
		f.run(ctx, s)
		f.mu.Lock()
		defer f.mu.Unlock()
		f.forget(s)
	})
	return s
}

// forget ends a session. f.mu is held.
func (f *PacketForward) forget(s *session) {
	s.stop()
	if e, ok := f.sessions[s.origin]; ok && e.Value == s {
		delete(f.sessions, s.origin)
		f.recent.Remove(e)
	}
}

// pass sends one datagram on, or keeps it until the session's socket is open.
func (f *PacketForward) pass(s *session, p []byte) {
	s.used.Store(time.Now().UnixNano())
	s.mu.Lock()
	conn := s.conn
	if conn == nil {
		if len(s.queue) < maxQueue {
			s.queue = append(s.queue, append([]byte(nil), p...))
		} else {
			f.dropped.Add(1)
		}
	}
	s.mu.Unlock()
	if conn != nil {
		f.send(conn, p)
	}
}

func (f *PacketForward) send(conn net.PacketConn, p []byte) {
	f.sent.Add(uint64(len(p)))
	if _, err := conn.WriteTo(p, f.to); err != nil {
		f.dropped.Add(1) // as any datagram that the network loses
	}
}

// run opens the session's socket and brings its answers back until ctx ends.
func (f *PacketForward) run(ctx context.Context, s *session) {
	opening, cancel := context.WithTimeout(ctx, openTimeout)
	conn, err := f.Open(opening)
	cancel()
	if err != nil {
		if ctx.Err() == nil {
			f.failed.Add(1)
			// Each datagram tries again.
			if now, last := time.Now().Unix(), f.warned.Load(); now != last && f.warned.CompareAndSwap(last, now) {
				f.log.Warn("datagrams could not be forwarded", "err", err, "sessions in all", f.failed.Load())
			}
		}
		return
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	// What waits goes before what comes now, since datagrams in order are what
	// programs are used to.
	for {
		s.mu.Lock()
		queue := s.queue
		s.queue = nil
		if len(queue) == 0 {
			s.conn = conn
			s.mu.Unlock()
			break
		}
		s.mu.Unlock()
		for _, p := range queue {
			f.send(conn, p)
		}
	}
	buf := make([]byte, MaxDatagram+1)
	for {
		n, addr, err := conn.ReadFrom(buf)
		if err != nil {
			if ctx.Err() == nil {
				f.log.Debug("a session for datagrams broke", "err", err)
			}
			return
		}
		udp, ok := addr.(*net.UDPAddr)
		if !ok || n > MaxDatagram || !same(udp.AddrPort(), f.To) {
			f.dropped.Add(1)
			continue
		}
		s.used.Store(time.Now().UnixNano())
		f.received.Add(uint64(n))
		if _, err := s.front.WriteTo(buf[:n], s.addr); err != nil {
			f.dropped.Add(1)
		}
	}
}

func same(a, b netip.AddrPort) bool {
	return a.Port() == b.Port() && a.Addr().Unmap() == b.Addr().Unmap()
}

// sweep ends the sessions of front that have been silent for too long, and all of them
// once done is closed.
func (f *PacketForward) sweep(front net.PacketConn, done <-chan struct{}) {
	ticker := time.NewTicker(max(f.idle/8, time.Millisecond))
	defer ticker.Stop()
	for {
		ended := false
		select {
		case <-ticker.C:
		case <-done:
			ended = true
		}
		oldest := time.Now().Add(-f.idle).UnixNano()
		f.mu.Lock()
		for from, e := range f.sessions {
			if s := e.Value.(*session); from.front == front && (ended || s.used.Load() < oldest) {
				f.forget(s)
			}
		}
		f.mu.Unlock()
		if ended {
			return
		}
	}
}

// Shutdown stops receiving and ends all sessions: datagrams have no end to wait for.
func (f *PacketForward) Shutdown(context.Context) error {
	f.init()
	f.mu.Lock()
	f.closing = true
	for front := range f.fronts {
		_ = front.Close() // Serve reports nothing any more
	}
	f.mu.Unlock()
	f.cut()
	f.open.Wait()
	return nil
}
