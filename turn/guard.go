package turn

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pion/stun"
)

const (
	defaultLifetime    = 10 * time.Minute        // RFC 5766, section 2.2
	maxLifetime        = time.Hour - time.Second // pion takes an hour for no lifetime at all
	permissionLifetime = 5 * time.Minute         // RFC 5766, section 8; TURN-8
	channelLifetime    = 10 * time.Minute        // RFC 5766, section 11; TURN-8

	openTimeout   = 30 * time.Second // for Server.Packets
	allowInterval = time.Second      // before Server.Allow is asked again about one client
	warnInterval  = time.Second      // before a stranger is in the log again

	// For one allocation. A client has no more channels than there are numbers.
	maxPermissions = 4096
	maxChannels    = 4096
)

// A guard stands between a server's socket and pion (TURN-2 to TURN-6). Payloads never
// get to pion: the guard relays them. Requests do, if nothing is wrong with them, and
// not as they came but written anew; what pion answers says what the guard allows from
// then on. So pion keeps nonces, lifetimes and conflicts, and never reads what
// others wrote.
//
// pion reads, handles and answers in one goroutine, so that the answer to a request is
// written before ReadFrom is called again.
type guard struct {
	server *Server
	sock   socket
	key    stun.MessageIntegrity
	done   chan<- error

	mu      sync.RWMutex
	clients map[netip.AddrPort]*allocation

	// What follows belongs to pion's reading goroutine.
	batch   *batch
	next    int           // of the batch
	last    *allocation   // who sent the datagram before
	sending []*allocation // with packets that wait for flush
	now     time.Time
	warned  time.Time // of a stranger
	msg     message
	request request
}

// A request is what pion is working at.
type request struct {
	method    stun.Method
	id        [stun.TransactionIDSize]byte
	client    netip.AddrPort
	alloc     *allocation // nil: none yet
	challenge bool        // only the nonce of the answer is wanted
	reserved  bool        // there is room for an allocation, until pion has made it or not
	lifetime  time.Duration
	even      bool // the relayed address is to have an even port
	channel   uint16
	peers     []netip.AddrPort
}

func newGuard(s *Server, sock socket, key stun.MessageIntegrity, done chan<- error) *guard {
	return &guard{server: s, sock: sock, key: key, done: done, clients: map[netip.AddrPort]*allocation{}}
}

// ReadFrom relays payloads until there is a request that pion has to see.
func (g *guard) ReadFrom(b []byte) (int, net.Addr, error) {
	if g.request.reserved {
		g.server.unreserve()
	}
	g.request = request{}
	for {
		if g.batch != nil && g.next == len(g.batch.packets) {
			g.flush()
			g.batch.release()
			g.batch = nil
		}
		if g.batch == nil {
			batch, err := g.receive()
			if err != nil {
				return 0, nil, err
			}
			g.batch, g.next, g.now = batch, 0, time.Now()
		}
		p := &g.batch.packets[g.next]
		g.next++
		if n := g.handle(p, b); n > 0 {
			g.flush() // what came before is not kept waiting
			return n, net.UDPAddrFromAddrPort(p.from), nil
		}
	}
}

// receive ends everything when the socket has ended.
func (g *guard) receive() (*batch, error) {
	for failures := 0; ; failures++ {
		batch, err := g.sock.receive()
		if err == nil {
			return batch, nil
		}
		if !closed(err) && failures < maxFailures {
			g.server.count.failed.Add(1)
			continue
		}
		g.mu.RLock()
		all := make([]*allocation, 0, len(g.clients))
		for _, a := range g.clients {
			all = append(all, a)
		}
		g.mu.RUnlock()
		for _, a := range all {
			a.end()
		}
		if errors.Is(err, net.ErrClosed) {
			g.done <- nil
		} else {
			g.done <- err
		}
		return nil, err
	}
}

// Some systems report with a read what went wrong with an earlier datagram. A socket is
// given up when nothing else comes from it.
const maxFailures = 64

func (g *guard) client(from netip.AddrPort) *allocation {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.clients[from]
}

// handle takes one datagram. If pion has to see something, it is written to b.
func (g *guard) handle(p *packet, b []byte) int {
	count := &g.server.count
	switch {
	case p.cut:
		count.tooLarge.Add(1)
		return 0
	case len(p.data) == 0 || !p.from.IsValid():
		count.malformed.Add(1)
		return 0
	}
	var a *allocation
	if g.last != nil && g.last.client.port == p.from && !g.last.ending.Load() {
		a = g.last
	} else {
		a = g.client(p.from)
		g.last = a
	}
	if a != nil && !g.stillAllowed(a) {
		count.stranger.Add(1)
		return 0
	}
	if p.data[0]&0xC0 == 0x40 {
		channel, payload, ok := parseChannelData(p.data)
		switch {
		case !ok:
			count.malformed.Add(1)
		case len(payload) > MaxPayload:
			count.tooLarge.Add(1)
		case a == nil:
			count.unexpected.Add(1)
		default:
			g.relay(a, p, payload, a.peerOfChannel(channel, g.now))
		}
		return 0
	}
	m := &g.msg
	if m.parse(p.data) != nil {
		count.malformed.Add(1)
		return 0
	}
	switch m.class {
	case stun.ClassIndication:
		g.indication(a, p)
		return 0
	case stun.ClassRequest:
		if a == nil && g.server.Allow != nil {
			if !g.allowed(p.from) {
				count.stranger.Add(1)
				return 0
			}
		}
		return g.ask(a, p.from, b)
	default: // a server asks for nothing
		count.unexpected.Add(1)
		return 0
	}
}

// allowed asks about a client (TURN-3).
func (g *guard) allowed(client netip.AddrPort) bool {
	err := g.server.Allow(net.UDPAddrFromAddrPort(client))
	if err != nil && g.now.Sub(g.warned) >= warnInterval {
		g.warned = g.now
		g.server.log.Warn("turn: a stranger was refused", "client", client, "error", err)
	}
	return err == nil
}

// stillAllowed asks about a client again, now and then: when one has gone without
// giving back its allocation, its port can be somebody else's.
func (g *guard) stillAllowed(a *allocation) bool {
	if g.server.Allow == nil || g.now.Sub(a.allowed) < allowInterval {
		return true
	}
	a.allowed = g.now
	if !g.allowed(a.client.port) {
		a.end()
		return false
	}
	return true
}

// relay queues a payload for a peer.
func (g *guard) relay(a *allocation, p *packet, payload []byte, to *endpoint) {
	if to == nil {
		g.server.count.unexpected.Add(1)
		return
	}
	p.out, p.payload, p.to = payload, len(payload), to
	if len(a.pending) == 0 {
		g.sending = append(g.sending, a)
	}
	a.pending = append(a.pending, p)
}

// flush sends what is queued, for each allocation with one call.
func (g *guard) flush() {
	count := &g.server.count
	for i, a := range g.sending {
		if sock := a.relaySocket(); sock == nil {
			count.unexpected.Add(uint64(len(a.pending)))
		} else {
			g.batch.sends = append(g.batch.sends[:0], a.pending...)
			send(sock, g.batch, count, &count.sentPackets, &count.sentBytes)
		}
		clear(a.pending)
		a.pending, g.sending[i] = a.pending[:0], nil
	}
	g.sending = g.sending[:0]
}

// indication takes a Send indication; a Binding indication only keeps something alive
// that needs no keeping here.
func (g *guard) indication(a *allocation, p *packet) {
	m, count := &g.msg, &g.server.count
	switch {
	case m.method == stun.MethodBinding:
	case m.method != stun.MethodSend || a == nil:
		count.unexpected.Add(1)
	case m.invalid || len(m.unknown) > 0 || m.has&(hasData|hasDontFragment) != hasData || len(m.peers) != 1:
		count.malformed.Add(1)
	case len(m.data) > MaxPayload:
		count.tooLarge.Add(1)
	default:
		g.relay(a, p, m.data, a.permitted(m.peers[0], g.now))
	}
}

// ask decides about a request: it is answered here, or pion gets to see it (TURN-6).
func (g *guard) ask(a *allocation, from netip.AddrPort, b []byte) int {
	m := &g.msg
	g.request = request{method: m.method, id: m.id, client: from, alloc: a}
	switch m.method {
	case stun.MethodBinding:
		switch {
		case len(m.unknown) > 0:
			return g.refuse(stun.CodeUnknownAttribute)
		case m.invalid:
			return g.refuse(stun.CodeBadRequest)
		}
		return g.hand(b, stun.MethodBinding, false)
	case stun.MethodAllocate, stun.MethodRefresh, stun.MethodCreatePermission, stun.MethodChannelBind:
	default:
		g.server.count.unexpected.Add(1)
		return 0
	}

	c := g.server.Credentials
	switch {
	case m.integrity == 0:
		return g.challenge(b)
	case m.username == nil || m.realm == nil || m.nonce == nil:
		return g.refuse(stun.CodeBadRequest)
	case string(m.username) != c.Username || string(m.realm) != c.Realm || !m.intact(g.key):
		return g.challenge(b)
	case len(m.unknown) > 0:
		return g.refuse(stun.CodeUnknownAttribute)
	case m.invalid:
		return g.refuse(stun.CodeBadRequest)
	}

	r := &g.request
	if m.method == stun.MethodAllocate {
		switch {
		case a != nil && a.id == m.id:
			a.answer() // once more; if it is still opening, there is none yet
			return 0
		case a != nil:
			return g.hand(b, m.method, true) // 437
		case m.has&hasTransport == 0:
			return g.refuse(stun.CodeBadRequest)
		case m.transport != 17: // UDP
			return g.refuse(stun.CodeUnsupportedTransProto)
		case m.has&hasDontFragment != 0:
			m.unknown = append(m.unknown, stun.AttrDontFragment)
			return g.refuse(stun.CodeUnknownAttribute)
		case m.has&hasEvenPort != 0 && m.has&hasReservation != 0:
			return g.refuse(stun.CodeBadRequest)
		case m.has&hasReservation != 0 || m.reserve: // there is no reserving ports of a transport
			return g.refuse(stun.CodeInsufficientCapacity)
		case m.has&hasFamily != 0 && m.family != 1: // one allocation is for peers of both families
			return g.refuse(stun.CodeAddrFamilyNotSupported)
		}
		if r.reserved = g.server.reserve(); !r.reserved {
			return g.refuse(stun.CodeAllocQuotaReached)
		}
		r.lifetime, r.even = g.lifetime(), m.has&hasEvenPort != 0
		return g.hand(b, m.method, true, uint32Attribute(stun.AttrLifetime, uint32(r.lifetime/time.Second)),
			attribute(stun.AttrRequestedTransport, 17, 0, 0, 0))
	}
	if a == nil {
		return g.refuse(stun.CodeAllocMismatch)
	}
	r.peers = m.peers
	switch m.method {
	case stun.MethodRefresh:
		if m.has&hasFamily != 0 && m.family != 1 {
			return g.refuse(stun.CodePeerAddrFamilyMismatch)
		}
		r.lifetime = g.lifetime()
		return g.hand(b, m.method, true, uint32Attribute(stun.AttrLifetime, uint32(r.lifetime/time.Second)))
	case stun.MethodCreatePermission:
		switch {
		case len(m.peers) == 0:
			return g.refuse(stun.CodeBadRequest)
		case !a.roomForPermissions(m.peers, g.now):
			return g.refuse(stun.CodeInsufficientCapacity)
		}
		setters := make([]stun.Setter, len(m.peers))
		for i, peer := range m.peers {
			setters[i] = addressAttribute{stun.AttrXORPeerAddress, peer}
		}
		return g.hand(b, m.method, true, setters...)
	default:
		r.channel = m.channel
		switch {
		case m.has&hasChannel == 0 || m.channel < minChannel || m.channel > maxChannel,
			len(m.peers) != 1 || m.peers[0].Port() == 0:
			return g.refuse(stun.CodeBadRequest)
		case !a.roomForPermissions(m.peers, g.now) || !a.roomForChannel(m.channel, g.now):
			return g.refuse(stun.CodeInsufficientCapacity)
		}
		return g.hand(b, m.method, true, addressAttribute{stun.AttrXORPeerAddress, m.peers[0]},
			uint32Attribute(stun.AttrChannelNumber, uint32(m.channel)<<16))
	}
}

// lifetime is what a client gets that asks for what the message says (TURN-7; RFC 5766,
// section 6.2).
func (g *guard) lifetime() time.Duration {
	m := &g.msg
	wanted := time.Duration(m.lifetime) * time.Second
	switch {
	case m.has&hasLifetime == 0:
		return defaultLifetime
	case wanted == 0 && m.method == stun.MethodRefresh:
		return 0
	default:
		return max(defaultLifetime, min(wanted, maxLifetime))
	}
}

// hand writes a request for pion.
func (g *guard) hand(b []byte, method stun.Method, signed bool, setters ...stun.Setter) int {
	all := append([]stun.Setter{transaction(g.msg.id), stun.NewType(method, stun.ClassRequest)}, setters...)
	if signed {
		c := g.server.Credentials
		all = append(all, stun.NewUsername(c.Username), stun.NewRealm(c.Realm),
			attribute(stun.AttrNonce, g.msg.nonce...), g.key)
	}
	m, err := stun.Build(all...)
	if err != nil || len(m.Raw) >= len(b) {
		g.server.count.failed.Add(1)
		return 0
	}
	return copy(b, m.Raw)
}

// challenge has pion make a nonce for a 401. It makes one for any request without
// credentials that is about an allocation.
func (g *guard) challenge(b []byte) int {
	g.request.challenge = true
	return g.hand(b, stun.MethodRefresh, false)
}

// refuse answers a request with an error.
func (g *guard) refuse(code stun.ErrorCode) int {
	setters := []stun.Setter{transaction(g.msg.id), stun.NewType(g.msg.method, stun.ClassErrorResponse), code}
	if code == stun.CodeUnknownAttribute {
		setters = append(setters, stun.UnknownAttributes(g.msg.unknown))
	}
	if code != stun.CodeBadRequest && g.msg.integrity != 0 {
		setters = append(setters, g.key)
	}
	if m, err := stun.Build(setters...); err == nil {
		g.write(m.Raw, newEndpoint(g.request.client))
	}
	return 0
}

func (g *guard) write(b []byte, to *endpoint) {
	if err := g.sock.write(b, to); err != nil {
		g.server.count.failed.Add(1)
	}
}

// WriteTo gets pion's answer to the request that it was handed last.
func (g *guard) WriteTo(b []byte, _ net.Addr) (int, error) {
	r := &g.request
	var m message
	if m.parse(b) != nil || m.id != r.id {
		return len(b), nil // pion has nothing else to say
	}
	if r.challenge {
		t := stun.NewType(r.method, stun.ClassErrorResponse).Value()
		b[0], b[1] = byte(t>>8), byte(t)
	}
	if m.class == stun.ClassSuccessResponse {
		switch r.method { //nolint:exhaustive // Binding changes nothing
		case stun.MethodAllocate:
			// CreateAllocation has made it, and it answers when it is open.
			return len(b), nil
		case stun.MethodRefresh:
			if r.lifetime == 0 {
				r.alloc.end()
			}
		case stun.MethodCreatePermission:
			r.alloc.permit(r.peers, time.Now())
		case stun.MethodChannelBind:
			r.alloc.bind(r.channel, r.peers[0], time.Now())
		}
	}
	g.write(b, newEndpoint(r.client))
	return len(b), nil
}

// AllocatePacketConn makes an allocation out of the request that pion works at.
func (g *guard) AllocatePacketConn(string, int) (net.PacketConn, net.Addr, error) {
	r := &g.request
	if r.method != stun.MethodAllocate || !r.reserved {
		return nil, nil, errors.ErrUnsupported
	}
	r.reserved = false // it is the allocation's from here on
	a := newAllocation(g, r)
	g.mu.Lock()
	g.clients[r.client] = a
	g.mu.Unlock()
	go a.run(r.lifetime, r.even)
	return relayStub{a}, noAddr, nil
}

// AllocateConn is for allocations of RFC 6062, which are refused.
func (g *guard) AllocateConn(string, int) (net.Conn, net.Addr, error) {
	return nil, nil, errors.ErrUnsupported
}

// Validate has nothing to say.
func (g *guard) Validate() error { return nil }

// Close is for pion, which does not own the socket.
func (g *guard) Close() error { return nil }

// LocalAddr tells the allocations of one socket from those of another.
func (g *guard) LocalAddr() net.Addr { return g.sock.LocalAddr() }

// SetDeadline and the others are not used by pion.
func (g *guard) SetDeadline(time.Time) error      { return errors.ErrUnsupported }
func (g *guard) SetReadDeadline(time.Time) error  { return errors.ErrUnsupported }
func (g *guard) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }
