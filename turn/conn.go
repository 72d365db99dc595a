package turn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"pthost/ptipc"
)

// What a Conn keeps at most (TURN-14).
const (
	maxPeers       = 1024             // those that were not used for longest are forgotten
	maxQueued      = 256              // packets to a peer whose channel is not bound yet
	maxInbox       = 1024             // packets that were not read yet
	firstNumber    = minChannel       // of the channels; RFC 8656 has no higher ones than lastNumber
	lastNumber     = 0x4FFF           //
	numberPause    = 16 * time.Minute // a channel's lifetime and five minutes (RFC 5766, section 11)
	rebindAfter    = 4 * time.Minute  // less than a permission's lifetime
	refreshAtLeast = 10 * time.Second // so that the end of an allocation is noticed
	rebindsAtOnce  = 16
	refusalPause   = time.Second // before a peer is tried again that the server refused
)

// An Option changes what [Dial] does.
type Option func(*Conn)

// WithLogger has the Conn log what an operator should know. Without it nothing is logged.
func WithLogger(log *slog.Logger) Option { return func(c *Conn) { c.log = orDiscard(log) } }

// WithRedial keeps the Conn alive when its server is lost, for instance because its child
// was restarted: redial is called for a new address and new credentials, and the Conn
// goes on with a new allocation there (TURN-16). redial can block until there is a
// server; its context ends when the Conn is closed. Its error ends the Conn, and is in
// the chain of what ReadFrom and WriteTo return from then on. It is called again,
// with growing pauses of up to 5 seconds, while the server that it named gives no allocation.
func WithRedial(redial func(context.Context) (netip.AddrPort, Credentials, error)) Option {
	return func(c *Conn) { c.redial = redial }
}

// A Conn is the packet connection that a transport opened for one allocation. Peers are
// addressed by *net.UDPAddr, and never by name. It is safe for use by several goroutines.
type Conn struct {
	log    *slog.Logger
	redial func(context.Context) (netip.AddrPort, Credentials, error)
	open   func(ctx context.Context, server netip.AddrPort) (socket, *endpoint, error)

	count  counters
	life   context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup
	inbox  chan inbound
	closed chan struct{} // closed with failure set
	read   deadline
	write  deadline

	mu      sync.RWMutex
	session *session // the present one, or the last
	failure error
	peers   map[netip.AddrPort]*peer
	numbers map[uint16]*peer
	ips     map[netip.Addr]int // how many peers have it
	resting map[uint16]time.Time
	next    uint16
	last    uint16 // lastNumber
	most    int    // maxPeers
}

// A peer is who the application has sent something to.
type peer struct {
	port    netip.AddrPort
	addr    *net.UDPAddr
	number  uint16
	session *session  // the channel is bound there; nil: not yet
	binding bool      // somebody is at it
	bound   time.Time // when it was last
	refusal error     // why it could not be, if it could not
	queue   [][]byte  // what waits for the channel, with headers
	used    atomic.Int64
}

// inbound is a packet for ReadFrom.
type inbound struct {
	buffer *buffer
	n      int
	from   *net.UDPAddr
}

type buffer [channelHeader + MaxPayload]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// Dial gets an allocation from the TURN server at a loopback address. ctx bounds the
// dial only. Errors are *[RefusedError] if the server refuses, wrap [ErrLost] if it
// is not there or does not answer, and answer errors.Is for the ptipc.Class constants.
func Dial(ctx context.Context, server netip.AddrPort, credentials Credentials, options ...Option) (*Conn, error) {
	return dial(ctx, server, credentials, openUDP, options...)
}

// openUDP opens a socket that the kernel lets nobody but the server send to.
func openUDP(ctx context.Context, server netip.AddrPort) (socket, *endpoint, error) {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "udp", server.String())
	if err != nil {
		return nil, nil, ptipc.Classify(fmt.Errorf("turn: %w", err))
	}
	udp := c.(*net.UDPConn)
	growBuffers(udp)
	return newSocket(udp, true), nil, nil
}

func dial(ctx context.Context, server netip.AddrPort, credentials Credentials, open func(context.Context, netip.AddrPort) (socket, *endpoint, error), options ...Option) (*Conn, error) {
	c := &Conn{
		log:     orDiscard(nil),
		open:    open,
		inbox:   make(chan inbound, maxInbox),
		closed:  make(chan struct{}),
		read:    makeDeadline(),
		write:   makeDeadline(),
		peers:   map[netip.AddrPort]*peer{},
		numbers: map[uint16]*peer{},
		ips:     map[netip.Addr]int{},
		resting: map[uint16]time.Time{},
		next:    firstNumber,
		last:    lastNumber,
		most:    maxPeers,
	}
	for _, option := range options {
		option(c)
	}
	c.life, c.cancel = context.WithCancel(context.Background())
	s, err := c.connect(ctx, server, credentials)
	if err != nil {
		c.cancel()
		return nil, ptipc.Classify(err)
	}
	c.session = s
	c.done.Go(c.keep)
	return c, nil
}

func (c *Conn) connect(ctx context.Context, server netip.AddrPort, credentials Credentials) (*session, error) {
	server = plainAddr(server)
	if !server.IsValid() || !server.Addr().IsLoopback() || server.Port() == 0 {
		return nil, ptipc.WithClass(ptipc.ErrAddressType, fmt.Errorf("turn: %q is not the loopback address of a server", server))
	}
	if err := credentials.check(); err != nil {
		return nil, err
	}
	sock, to, err := c.open(ctx, server)
	if err != nil {
		return nil, err
	}
	s, err := newSession(ctx, sock, server, to, credentials, &c.count, c.log, c.deliver)
	if err != nil {
		return nil, err
	}
	c.count.allocated.Add(1)
	return s, nil
}

// keep keeps the allocation and the channels alive, and finds another server when this
// one is lost.
func (c *Conn) keep() {
	for {
		s := c.current()
		err := c.maintain(s)
		if c.life.Err() != nil {
			s.release()
			return
		}
		s.end(err)
		if c.redial == nil {
			c.fail(err)
			return
		}
		c.log.Info("turn: the server is lost, going on with another", "error", err)
		next, err := c.reconnect()
		if err != nil {
			c.fail(err)
			return
		}
		c.mu.Lock()
		c.session = next
		stale := c.unbound(next)
		c.mu.Unlock()
		c.bindAll(stale)
	}
}

func (c *Conn) reconnect() (*session, error) {
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		server, credentials, err := c.redial(c.life)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrLost, err)
		}
		ctx, cancel := context.WithTimeout(c.life, openTimeout)
		s, err := c.connect(ctx, server, credentials)
		cancel()
		if err == nil {
			return s, nil
		}
		c.log.Warn("turn: no allocation from the next server", "server", server, "error", err)
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-c.life.Done():
			timer.Stop()
			return nil, net.ErrClosed
		}
	}
}

// maintain refreshes in time (TURN-15) and returns why that has come to an end.
func (c *Conn) maintain(s *session) error {
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for {
		timer.Reset(min(s.life/2, refreshAtLeast))
		select {
		case <-c.life.Done():
			return net.ErrClosed
		case <-s.over:
			return s.err()
		case <-timer.C:
		}
		if err := s.refresh(); err != nil {
			if ended := s.err(); ended != nil {
				return ended
			}
			return fmt.Errorf("%w: %w", ErrLost, err)
		}
		c.mu.Lock()
		stale := c.unbound(s)
		c.mu.Unlock()
		c.bindAll(stale)
	}
}

// unbound returns the peers whose channels have to be bound, or bound again. Needs mu.
func (c *Conn) unbound(s *session) []*peer {
	var stale []*peer
	now := time.Now()
	for _, p := range c.peers {
		if !p.binding && (p.session != s || p.refusal == nil && now.Sub(p.bound) > rebindAfter) {
			p.binding = true
			stale = append(stale, p)
		}
	}
	return stale
}

func (c *Conn) bindAll(stale []*peer) {
	room := make(chan struct{}, rebindsAtOnce)
	var all sync.WaitGroup
	for _, p := range stale {
		room <- struct{}{}
		all.Go(func() {
			c.bind(p)
			<-room
		})
	}
	all.Wait()
}

// bind binds the channel of a peer and then sends what has waited for it.
func (c *Conn) bind(p *peer) {
	for again := true; again; {
		s := c.current()
		began := time.Now()
		again = c.isBound(p, s, began, s.bind(p.number, p.port))
	}
}

// isBound takes the outcome of binding a channel. It says whether it is to be tried
// again, with the session that has followed meanwhile.
func (c *Conn) isBound(p *peer, s *session, began time.Time, err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	var refused *RefusedError
	switch {
	case c.peers[p.port] != p: // forgotten meanwhile
	case err == nil:
		p.session, p.bound, p.refusal = s, began, nil
		for _, b := range p.queue {
			c.transmit(s, b)
		}
		p.queue = nil
	case s.ended():
		if s != c.session {
			return true
		}
	case errors.As(err, &refused) && refused.Code == 437:
		s.end(fmt.Errorf("%w: %w", ErrLost, err))
	default:
		c.log.Warn("turn: no channel to a peer", "peer", p.port, "error", err)
		c.count.failed.Add(uint64(len(p.queue)))
		// A channel that was bound and is not kept is none: what is sent next is to find that out.
		p.session, p.queue, p.refusal, p.bound = nil, nil, err, began
	}
	p.binding = false
	return false
}

func (c *Conn) transmit(s *session, b []byte) {
	if s.send(b) {
		c.count.sentPackets.Add(1)
		c.count.sentBytes.Add(uint64(len(b) - channelHeader))
	}
}

// forget drops a peer. Its channel cannot be another's for a while. Needs mu.
func (c *Conn) forget(p *peer) {
	delete(c.peers, p.port)
	delete(c.numbers, p.number)
	if c.ips[p.port.Addr()]--; c.ips[p.port.Addr()] <= 0 {
		delete(c.ips, p.port.Addr())
	}
	c.resting[p.number] = time.Now().Add(numberPause)
}

func (c *Conn) current() *session {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.session
}

// fail ends the Conn for a reason.
func (c *Conn) fail(reason error) {
	c.mu.Lock()
	first := c.failure == nil
	if first {
		c.failure = reason
		close(c.closed)
	}
	c.mu.Unlock()
}

// deliver takes a payload from the session's reading goroutine. It has to be from who the
// application has sent to, or from another port there (TURN-4).
func (c *Conn) deliver(channel uint16, sender netip.AddrPort, payload []byte) {
	var from *net.UDPAddr
	c.mu.RLock()
	known := c.numbers[channel]
	if channel == 0 {
		known = c.peers[sender]
	}
	switch {
	case known != nil:
		from = known.addr
	case channel == 0 && c.ips[sender.Addr()] > 0:
		from = net.UDPAddrFromAddrPort(sender)
	}
	c.mu.RUnlock()
	switch {
	case from == nil:
		c.count.unexpected.Add(1)
		return
	case len(payload) > MaxPayload:
		c.count.tooLarge.Add(1)
		return
	}
	in := inbound{buffer: buffers.Get().(*buffer), from: from}
	in.n = copy(in.buffer[:], payload)
	c.count.receivedPackets.Add(1) // before somebody can read it
	c.count.receivedBytes.Add(uint64(len(payload)))
	select {
	case c.inbox <- in:
	default:
		c.count.receivedPackets.Add(^uint64(0))
		c.count.receivedBytes.Add(-uint64(len(payload)))
		buffers.Put(in.buffer)
		c.count.full.Add(1)
	}
}

// ReadFrom reads one packet of a peer, whose address is a *net.UDPAddr that must not be
// changed. What does not fit into b is lost, as with any UDP socket.
func (c *Conn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case <-c.closed:
		return 0, nil, c.opError("read", nil, c.reason())
	case <-c.read.wait():
		return 0, nil, c.opError("read", nil, os.ErrDeadlineExceeded)
	default:
	}
	select {
	case in := <-c.inbox:
		n := copy(b, in.buffer[:in.n])
		buffers.Put(in.buffer)
		return n, in.from, nil
	case <-c.closed:
		return 0, nil, c.opError("read", nil, c.reason())
	case <-c.read.wait():
		return 0, nil, c.opError("read", nil, os.ErrDeadlineExceeded)
	}
}

// WriteTo sends one packet to a peer, which has to be a *net.UDPAddr without a zone:
// names are refused, not looked up (TURN-13). It does not wait: until there is
// a channel to the peer, packets are queued (TURN-14). One larger than [MaxPayload] is
// an error that wraps syscall.EMSGSIZE.
func (c *Conn) WriteTo(b []byte, addr net.Addr) (int, error) {
	udp, ok := addr.(*net.UDPAddr)
	if !ok || udp == nil {
		return 0, c.opError("write", addr, ptipc.WithClass(ptipc.ErrAddressType,
			fmt.Errorf("a peer is a *net.UDPAddr, not a %T: names are not looked up", addr)))
	}
	to := plainAddr(udp.AddrPort())
	select {
	case <-c.closed:
		return 0, c.opError("write", addr, c.reason())
	case <-c.write.wait():
		return 0, c.opError("write", addr, os.ErrDeadlineExceeded)
	default:
	}
	if !to.IsValid() || to.Port() == 0 || to.Addr().Zone() != "" || to.Addr().IsUnspecified() {
		return 0, c.opError("write", addr, ptipc.WithClass(ptipc.ErrAddressType, errors.New("a peer has an address without a zone, and a port")))
	}
	if len(b) > MaxPayload {
		c.count.tooLarge.Add(1)
		return 0, c.opError("write", addr, fmt.Errorf("a payload of %d bytes is larger than %d: %w", len(b), MaxPayload, syscall.EMSGSIZE))
	}
	buf := buffers.Get().(*buffer)
	n := copy(buf[channelHeader:], b)
	err := c.sendTo(to, buf[:channelHeader+n])
	buffers.Put(buf)
	if err != nil {
		return 0, c.opError("write", addr, err)
	}
	return n, nil
}

// sendTo sends a payload that has room for the header in front.
func (c *Conn) sendTo(to netip.AddrPort, b []byte) error {
	c.mu.RLock()
	if p := c.peers[to]; p != nil && p.session == c.session {
		putChannel(b, p.number)
		s := c.session
		c.mu.RUnlock()
		p.used.Store(time.Now().UnixNano())
		c.transmit(s, b)
		return nil
	}
	c.mu.RUnlock()

	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.peers[to]
	if p == nil {
		var err error
		if p, err = c.meet(to); err != nil {
			return err
		}
	}
	p.used.Store(time.Now().UnixNano())
	putChannel(b, p.number)
	if p.session == c.session { // since a moment
		c.transmit(c.session, b)
		return nil
	}
	if p.refusal != nil && time.Since(p.bound) < refusalPause {
		c.count.failed.Add(1)
		return p.refusal
	}
	if len(p.queue) == maxQueued {
		c.count.full.Add(1)
		return nil
	}
	p.queue = append(p.queue, append([]byte(nil), b...))
	if !p.binding && !c.session.ended() {
		p.binding = true
		c.done.Go(func() { c.bind(p) })
	}
	return nil
}

func putChannel(b []byte, number uint16) {
	n := len(b) - channelHeader
	b[0], b[1], b[2], b[3] = byte(number>>8), byte(number), byte(n>>8), byte(n)
}

// meet makes a peer, if need be in place of the one that was not used for longest. Needs mu.
func (c *Conn) meet(to netip.AddrPort) (*peer, error) {
	select {
	case <-c.closed:
		return nil, c.failure
	default:
	}
	if len(c.peers) >= c.most {
		var oldest *peer
		for _, p := range c.peers {
			if oldest == nil || p.used.Load() < oldest.used.Load() {
				oldest = p
			}
		}
		c.count.full.Add(uint64(len(oldest.queue)))
		c.forget(oldest)
	}
	now := time.Now()
	for range c.last - firstNumber + 1 {
		number := c.next
		if c.next++; c.next > c.last {
			c.next = firstNumber
		}
		if c.numbers[number] != nil || now.Before(c.resting[number]) {
			continue
		}
		delete(c.resting, number)
		p := &peer{port: to, addr: net.UDPAddrFromAddrPort(to), number: number}
		c.peers[to], c.numbers[number] = p, p
		c.ips[to.Addr()]++
		return p, nil
	}
	c.count.full.Add(1)
	return nil, fmt.Errorf("more than %d peers in %s: %w", c.last-firstNumber+1, numberPause, syscall.ENOBUFS)
}

// Close gives the allocation back, which takes up to a second if the server does not
// answer. Pending reads and writes end with net.ErrClosed.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.life.Err() != nil {
		c.mu.Unlock()
		return c.opError("close", nil, net.ErrClosed)
	}
	c.cancel()
	c.mu.Unlock()
	c.fail(net.ErrClosed)
	c.current().release()
	c.done.Wait()
	c.read.set(time.Time{})
	c.write.set(time.Time{})
	return nil
}

// Lost tells the Conn that its server is gone, for a caller who knows it before an
// answer is missed.
func (c *Conn) Lost() { c.current().end(ErrLost) }

func (c *Conn) reason() error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.failure
}

// LocalAddr is the address where peers reach the Conn, as the server tells it, which is
// unspecified where a transport has none. It changes with the server.
func (c *Conn) LocalAddr() net.Addr {
	return net.UDPAddrFromAddrPort(c.current().relayed)
}

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline sets when ReadFrom fails with os.ErrDeadlineExceeded; zero is never.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.read, t) }

// SetWriteDeadline sets when WriteTo fails with os.ErrDeadlineExceeded; zero is never.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.write, t) }

func (c *Conn) setDeadline(d *deadline, t time.Time) error {
	if c.life.Err() != nil {
		return c.opError("set", nil, net.ErrClosed)
	}
	d.set(t)
	return nil
}

// Stats returns what has passed, and what was dropped.
func (c *Conn) Stats() Stats { return c.count.stats() }

// opError is the error that any packet connection of the net package would return.
func (c *Conn) opError(op string, addr net.Addr, err error) error {
	return ptipc.Classify(&net.OpError{Op: op, Net: "turn", Source: c.LocalAddr(), Addr: addr, Err: err})
}

// A deadline is a channel that is closed while the deadline is over.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	over  chan struct{}
}

func makeDeadline() deadline { return deadline{over: make(chan struct{})} }

func (d *deadline) wait() chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.over
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.over // the timer is about to close it, or has
	}
	d.timer = nil
	over := false
	select {
	case <-d.over:
		over = true
	default:
	}
	switch wait := time.Until(t); {
	case t.IsZero() || wait > 0:
		if over {
			d.over = make(chan struct{})
		}
		if !t.IsZero() {
			ch := d.over
			d.timer = time.AfterFunc(wait, func() { close(ch) })
		}
	case !over:
		close(d.over)
	}
}
