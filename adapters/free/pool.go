package free

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"pthost/ptipc"
)

const (
	// A stream goes to the carrier with the fewest. Above fewStreams, and when all move
	// bulk, it gets another carrier, unless there are as many as manyCarriers.
	fewStreams   = 32
	manyCarriers = 8

	idleTime = time.Minute // after the last stream, a carrier is kept for as long

	maxPools = 256 // of settings with a carrier, or of which it is known that the far end is old
)

// A mux opens streams on carriers of many. Carriers are shared by streams with the same
// settings alone (FREE-23).
type mux struct {
	factory ptipc.ConnectionFactory
	windows *budget

	mu       sync.Mutex
	pools    map[string]*pool         // by settings
	all      map[*muxCarrier]struct{} // those too that no pool has any more
	closed   bool
	carriers sync.WaitGroup
	stop     context.CancelFunc
	life     context.Context
}

// A pool is the carriers with the same settings.
type pool struct {
	carriers []*muxCarrier
	old      bool // the far end knows version 1 alone (FREE-16)
}

// A muxCarrier is a session, or will be.
type muxCarrier struct {
	ready   chan struct{} // closed when session or err is set
	session *session
	err     error
	load    atomic.Int32 // streams, and those who wait for ready
	idle    *time.Timer
	used    atomic.Bool // a stream was answered
}

func newMux(factory ptipc.ConnectionFactory) *mux {
	m := &mux{factory: factory, windows: newBudget(extraWindow), pools: make(map[string]*pool), all: make(map[*muxCarrier]struct{})}
	m.life, m.stop = context.WithCancel(context.Background())
	return m
}

// close closes the carriers without streams, lets end close the transport, which may
// give those with streams some time, and cuts what is left.
func (m *mux) close(end func() error) error {
	m.each((*session).close)
	err := end()
	m.each(func(c *session) { c.abort(errClosed) })
	m.carriers.Wait()
	return err
}

// each calls f with every session, the first time after it has seen to it that there
// will be no more.
func (m *mux) each(f func(c *session)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.stop()
	for c := range m.all {
		c.idle.Stop()
		if c.session != nil {
			f(c.session)
		}
	}
}

// dial opens a stream. When a carrier ends that has worked before, another one is
// tried: it may have ended before the stream was on its way.
func (m *mux) dial(ctx context.Context, settings ptipc.Opaque, dest string) (net.Conn, error) {
	header, err := appendHeader(nil, dest)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	for again := true; ; again = false {
		c, err := m.carrier(ctx, settings)
		if err != nil {
			return nil, err
		}
		if c == nil {
			return dial(ctx, m.factory, settings, dest)
		}
		used := c.used.Load()
		s, err := c.dial(ctx, header[prefixSize:])
		switch {
		case err == nil:
			c.used.Store(true)
			return s, nil
		case errors.Is(err, errOld):
			m.learnOld(settings)
			return dial(ctx, m.factory, settings, dest)
		case !again || !used || ctx.Err() != nil || !c.hasEnded():
			return nil, err
		}
	}
}

func (c *muxCarrier) dial(ctx context.Context, body []byte) (*muxStream, error) {
	select {
	case <-c.ready:
	case <-ctx.Done():
		c.release()
		return nil, context.Cause(ctx)
	}
	if c.err != nil {
		c.release()
		return nil, c.err
	}
	s, err := c.session.open(body)
	if err != nil {
		c.release()
		return nil, err
	}
	return s, s.wait(ctx)
}

func (c *muxCarrier) hasEnded() bool {
	select {
	case <-c.ready:
		return c.session == nil || c.session.dead.Load()
	default:
		return false
	}
}

// release takes note of a stream that has gone.
func (c *muxCarrier) release() {
	if c.load.Add(-1) == 0 {
		c.idle.Reset(idleTime)
	}
}

// carrier picks the carrier of a new stream, and counts it there. It is nil when the far
// end takes one stream for each.
func (m *mux) carrier(ctx context.Context, settings ptipc.Opaque) (*muxCarrier, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, net.ErrClosed
	}
	p := m.pool(settings)
	if p.old {
		return nil, nil //nolint:nilnil // there is none, and that is no error
	}
	c := p.choose()
	if c == nil {
		c = &muxCarrier{ready: make(chan struct{})}
		c.idle = time.AfterFunc(idleTime, func() { m.closeIdle(settings, c) })
		p.carriers = append(p.carriers, c)
		m.all[c] = struct{}{}
		m.carriers.Go(func() { m.run(context.WithoutCancel(ctx), settings, c) })
	}
	c.load.Add(1)
	c.idle.Stop()
	return c, nil
}

// choose returns the carrier for a stream, or nil for a new one.
func (p *pool) choose() *muxCarrier {
	var calm, least *muxCarrier
	for _, c := range p.carriers {
		if c.load.Load() >= maxPerCarrier || c.hasEnded() {
			continue
		}
		if least == nil || c.load.Load() < least.load.Load() {
			least = c
		}
		if !c.movesBulk() && (calm == nil || c.load.Load() < calm.load.Load()) {
			calm = c
		}
	}
	switch {
	case calm != nil && (calm.load.Load() < fewStreams || len(p.carriers) >= manyCarriers):
		return calm
	case len(p.carriers) >= manyCarriers:
		return least
	}
	return nil
}

func (c *muxCarrier) movesBulk() bool {
	select {
	case <-c.ready:
		return c.session != nil && c.session.movesBulk()
	default:
		return false
	}
}

// makeRoom forgets settings without streams when there are many, and closes their
// carriers. m.mu is held.
func (m *mux) makeRoom() {
	if len(m.pools) < maxPools {
		return
	}
	for key, p := range m.pools {
		if slices.ContainsFunc(p.carriers, func(c *muxCarrier) bool { return c.session == nil || c.load.Load() > 0 }) {
			continue
		}
		for _, c := range p.carriers {
			c.session.close()
		}
		delete(m.pools, key)
	}
}

// learnOld has streams with these settings go one by one from now on.
func (m *mux) learnOld(settings ptipc.Opaque) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pool(settings).old = true // of a new one, if the carrier that was told so has gone
}

// pool is that of the settings, made if need be. m.mu is held.
func (m *mux) pool(settings ptipc.Opaque) *pool {
	p := m.pools[string(settings)]
	if p == nil {
		m.makeRoom()
		p = new(pool)
		m.pools[string(settings)] = p
	}
	return p
}

// closeIdle closes a carrier that nobody has used for a while.
func (m *mux) closeIdle(settings ptipc.Opaque, c *muxCarrier) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.load.Load() > 0 || c.session == nil {
		return
	}
	m.forget(settings, c)
	c.session.close()
}

// forget takes a carrier out of its pool. m.mu is held.
func (m *mux) forget(settings ptipc.Opaque, c *muxCarrier) {
	p := m.pools[string(settings)]
	if p == nil {
		return
	}
	for i, other := range p.carriers {
		if other == c {
			p.carriers = append(p.carriers[:i:i], p.carriers[i+1:]...)
			break
		}
	}
	if len(p.carriers) == 0 && !p.old {
		delete(m.pools, string(settings))
	}
}

// run opens a carrier, and returns when it has ended.
func (m *mux) run(ctx context.Context, settings ptipc.Opaque, c *muxCarrier) {
	if m.open(ctx, settings, c) == nil {
		c.session.work.Wait()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c.idle.Stop()
	m.forget(settings, c)
	delete(m.all, c)
}

func (m *mux) open(ctx context.Context, settings ptipc.Opaque, c *muxCarrier) error {
	defer close(c.ready)
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	stop := context.AfterFunc(m.life, cancel)
	defer stop()
	conn, err := m.factory.Dial(ctx, settings, "")
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		c.err = err
		m.forget(settings, c) // the next stream is to try again
		return err
	}
	c.session = newSession(conn, m.windows, []byte{versionMany, 0, 0})
	c.session.onFree = c.release
	c.session.start()
	if c.load.Load() == 0 { // all who waited for it have given up
		c.idle.Reset(idleTime)
	}
	if m.closed {
		c.session.close()
	}
	return nil
}
