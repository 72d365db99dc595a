package turn

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/stun"

	"pthost/ptipc"
)

// An allocation is one client's packet connection (TURN-5).
type allocation struct {
	guard  *guard
	client *endpoint
	id     [stun.TransactionIDSize]byte // of the request that made it
	ended  chan struct{}
	ending atomic.Bool

	// Of the goroutine that reads the server's socket.
	pending []*packet // for peers
	allowed time.Time // when Server.Allow was asked last

	mu          sync.RWMutex
	relay       socket // nil until it is open
	response    []byte // to the request that made it; nil until it is open
	permissions map[netip.Addr]time.Time
	numbers     map[uint16]*channel
	peers       map[netip.AddrPort]*channel
}

// A channel is bound to a peer for some time.
type channel struct {
	number  uint16
	peer    *endpoint
	expires time.Time
}

// errAllocationEnded ends an allocation for pion.
var errAllocationEnded = fmt.Errorf("turn: the allocation has ended: %w", net.ErrClosed)

// noAddr is the relayed address that pion is told. Clients are told the real one.
var noAddr = &net.UDPAddr{IP: net.IPv4zero}

func newAllocation(g *guard, r *request) *allocation {
	return &allocation{
		guard:       g,
		client:      newEndpoint(r.client),
		id:          r.id,
		ended:       make(chan struct{}),
		allowed:     time.Now(),
		permissions: map[netip.Addr]time.Time{},
		numbers:     map[uint16]*channel{},
		peers:       map[netip.AddrPort]*channel{},
	}
}

// end ends the allocation, whoever finds out first that it has: pion, its packet
// connection, its client or the server.
func (a *allocation) end() {
	if a.ending.Swap(true) {
		return
	}
	g := a.guard
	g.mu.Lock()
	if g.clients[a.client.port] == a {
		delete(g.clients, a.client.port)
	}
	g.mu.Unlock()
	close(a.ended)
	if relay := a.relaySocket(); relay != nil {
		_ = relay.Close()
	}
}

func (a *allocation) relaySocket() socket {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.relay
}

// run opens the packet connection, answers the client (TURN-10), and relays what peers send.
func (a *allocation) run(lifetime time.Duration, even bool) {
	defer a.guard.server.unreserve()
	s := a.guard.server
	relay, err := a.open(even)
	if err == nil {
		var response *stun.Message
		response, err = stun.Build(transaction(a.id), stun.NewType(stun.MethodAllocate, stun.ClassSuccessResponse),
			addressAttribute{stun.AttrXORRelayedAddress, relayedAddr(relay.LocalAddr())},
			uint32Attribute(stun.AttrLifetime, uint32(lifetime/time.Second)),
			addressAttribute{stun.AttrXORMappedAddress, a.client.port}, a.guard.key)
		if err == nil {
			a.mu.Lock()
			a.relay, a.response = relay, response.Raw
			a.mu.Unlock()
		}
	}
	if err != nil {
		if !a.ending.Load() {
			s.log.Warn("turn: the transport opened no packet connection", "client", a.client.port, "error", err)
			code := stun.CodeInsufficientCapacity
			if errors.Is(err, ptipc.ErrNotAllowed) {
				code = stun.CodeForbidden
			}
			refusal, err := stun.Build(transaction(a.id), stun.NewType(stun.MethodAllocate, stun.ClassErrorResponse), code, a.guard.key)
			if err == nil {
				a.guard.write(refusal.Raw, a.client)
			}
		}
		if relay != nil {
			_ = relay.Close()
		}
		a.end()
		return
	}
	s.count.allocated.Add(1)
	s.log.Debug("turn: allocated", "client", a.client.port, "relayed", relay.LocalAddr())
	if a.ending.Load() {
		_ = relay.Close() // end may have come before there was anything to close
	}
	a.answer()
	if err := a.receive(relay); !a.ending.Load() {
		s.log.Warn("turn: a packet connection of the transport ended", "client", a.client.port, "error", err)
	}
	_ = relay.Close()
	a.end()
}

// evenTries is how many packet connections are opened to find one with an even port.
const evenTries = 16

func (a *allocation) open(even bool) (socket, error) {
	ctx, cancel := context.WithTimeout(a.guard.server.packets, openTimeout)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-a.ended:
			cancel()
		case <-stop:
		}
	}()
	for range evenTries {
		conn, err := a.guard.server.Packets(ctx)
		switch {
		case err != nil:
			return nil, err
		case conn == nil:
			return nil, errors.New("turn: Packets returned neither a packet connection nor an error")
		case even && relayedAddr(conn.LocalAddr()).Port()%2 != 0:
			defer conn.Close() // later, so that the next one has another port
		default:
			return newRelaySocket(conn, &a.guard.server.count), nil
		}
	}
	return nil, fmt.Errorf("turn: none of %d packet connections has an even port, as the client wants", evenTries)
}

// relayedAddr is what a client is told (TURN-11). A transport need not have an address.
func relayedAddr(addr net.Addr) netip.AddrPort {
	if udp, ok := addr.(*net.UDPAddr); ok && udp != nil {
		if a := plainAddr(udp.AddrPort()); a.IsValid() {
			if a.Addr().IsUnspecified() { // of both families, as an allocation is
				return netip.AddrPortFrom(netip.IPv4Unspecified(), a.Port())
			}
			return netip.AddrPortFrom(a.Addr().WithZone(""), a.Port())
		}
	}
	return netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
}

// answer tells the client that it has an allocation.
func (a *allocation) answer() {
	a.mu.RLock()
	response := a.response
	a.mu.RUnlock()
	if response != nil {
		a.guard.write(response, a.client)
	}
}

// receive relays what peers send until the packet connection ends.
func (a *allocation) receive(relay socket) error {
	count := &a.guard.server.count
	for failures := 0; ; {
		b, err := relay.receive()
		if err != nil {
			if closed(err) || a.ending.Load() || failures == maxFailures {
				return err
			}
			failures++
			count.failed.Add(1)
			continue
		}
		failures = 0
		now := time.Now()
		a.mu.RLock()
		for i := range b.packets {
			a.fromPeer(b, &b.packets[i], now)
		}
		a.mu.RUnlock()
		send(a.guard.sock, b, count, &count.receivedPackets, &count.receivedBytes)
		b.release()
	}
}

// fromPeer queues one datagram of a peer for the client, with what belongs in front of it.
func (a *allocation) fromPeer(b *batch, p *packet, now time.Time) {
	count := &a.guard.server.count
	switch {
	case p.cut || len(p.data) > MaxPayload:
		count.tooLarge.Add(1)
	case !p.from.IsValid():
		count.malformed.Add(1)
	default:
		if c := a.peers[p.from]; c != nil && now.Before(c.expires) {
			out := p.storage[headroom-channelHeader : headroom+len(p.data)]
			binary.BigEndian.PutUint16(out, c.number)
			binary.BigEndian.PutUint16(out[2:], uint16(len(p.data)))
			b.queue(p, out, len(p.data), a.client)
			return
		}
		if expires, ok := a.permissions[p.from.Addr()]; !ok || !now.Before(expires) {
			count.unexpected.Add(1)
			return
		}
		var id [stun.TransactionIDSize]byte
		_, _ = rand.Read(id[:]) // it never fails
		header := indicationHeader(p.from)
		out := putIndication(p.storage[headroom-header:headroom+len(p.data)], stun.MethodData, p.from, len(p.data), id)
		b.queue(p, out, len(p.data), a.client)
	}
}

// peerOfChannel is the peer of a channel that is bound, or nil.
func (a *allocation) peerOfChannel(number uint16, now time.Time) *endpoint {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if c := a.numbers[number]; c != nil && now.Before(c.expires) {
		return c.peer
	}
	return nil
}

// permitted is the peer, if the client has permission for its address.
func (a *allocation) permitted(peer netip.AddrPort, now time.Time) *endpoint {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if expires, ok := a.permissions[peer.Addr()]; ok && now.Before(expires) {
		return newEndpoint(peer)
	}
	return nil
}

func (a *allocation) permit(peers []netip.AddrPort, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, peer := range peers {
		a.permissions[peer.Addr()] = now.Add(permissionLifetime)
	}
}

// bind binds a channel or keeps it bound. pion has made sure that neither the channel
// nor the peer is bound otherwise.
func (a *allocation) bind(number uint16, peer netip.AddrPort, now time.Time) {
	a.permit([]netip.AddrPort{peer}, now)
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.numbers[number]; c != nil {
		delete(a.peers, c.peer.port) // of before, if it has expired
	}
	if c := a.peers[peer]; c != nil {
		delete(a.numbers, c.number)
	}
	c := &channel{number: number, peer: newEndpoint(peer), expires: now.Add(channelLifetime)}
	a.numbers[number], a.peers[peer] = c, c
}

// roomForPermissions makes sure that a client does not fill the memory.
func (a *allocation) roomForPermissions(peers []netip.AddrPort, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.permissions)+len(peers) <= maxPermissions {
		return true
	}
	for addr, expires := range a.permissions {
		if !now.Before(expires) {
			delete(a.permissions, addr)
		}
	}
	more := 0
	for _, peer := range peers {
		if _, ok := a.permissions[peer.Addr()]; !ok {
			more++
		}
	}
	return len(a.permissions)+more <= maxPermissions
}

func (a *allocation) roomForChannel(number uint16, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.numbers) < maxChannels || a.numbers[number] != nil {
		return true
	}
	for number, c := range a.numbers {
		if !now.Before(c.expires) {
			delete(a.numbers, number)
			delete(a.peers, c.peer.port)
		}
	}
	return len(a.numbers) < maxChannels
}

// send sends a batch and counts it.
func send(sock socket, b *batch, count *counters, packets, bytes *atomic.Uint64) {
	n, size := len(b.sends), 0
	if n == 0 {
		return
	}
	for _, p := range b.sends {
		size += p.payload
	}
	failed, lost, err := sock.send(b)
	switch {
	case errors.Is(err, errFull):
		count.full.Add(uint64(failed))
	case failed > 0:
		count.failed.Add(uint64(failed))
	}
	packets.Add(uint64(n - failed))
	bytes.Add(uint64(size - lost))
}

// A relayStub is what pion takes for the packet connection of an allocation. No payload
// comes out of it or goes into it; it ends when the allocation ends, and the reverse.
type relayStub struct{ *allocation }

func (r relayStub) ReadFrom([]byte) (int, net.Addr, error) {
	<-r.ended
	return 0, nil, errAllocationEnded
}
func (r relayStub) WriteTo([]byte, net.Addr) (int, error) { return 0, errors.ErrUnsupported }
func (r relayStub) Close() error                          { r.end(); return nil }
func (r relayStub) LocalAddr() net.Addr                   { return noAddr }
func (r relayStub) SetDeadline(time.Time) error           { return errors.ErrUnsupported }
func (r relayStub) SetReadDeadline(time.Time) error       { return errors.ErrUnsupported }
func (r relayStub) SetWriteDeadline(time.Time) error      { return errors.ErrUnsupported }
