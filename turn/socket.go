package turn

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
)

const (
	headroom    = 64   // in front of what is received, for the header of an indication
	maxDatagram = 2052 // a payload of MaxPayload in an indication, and room to see what is longer
	batchSize   = 64
)

// An endpoint is where datagrams go, in all the forms in which that has to be said.
type endpoint struct {
	port netip.AddrPort
	addr *net.UDPAddr
	raw  rawAddr
}

func newEndpoint(a netip.AddrPort) *endpoint {
	e := &endpoint{port: a, addr: net.UDPAddrFromAddrPort(a)}
	e.raw.set(a)
	return e
}

// A packet is a datagram that was received, and what is sent on in its place.
type packet struct {
	storage *[headroom + maxDatagram]byte
	data    []byte         // what was received, at headroom
	from    netip.AddrPort // invalid: the address was not one of UDP
	cut     bool           // it was longer than maxDatagram

	out     []byte    // what is sent
	payload int       // how much of it is payload
	to      *endpoint // nil: the socket is connected
}

// A batch is what is received with one call and sent on with another.
type batch struct {
	packets []packet  // received
	sends   []*packet // to be sent, in this order
	size    int
	system  batchSystem
}

func newBatch(size int) *batch {
	b := &batch{packets: make([]packet, size), sends: make([]*packet, 0, size), size: size}
	storage := make([][headroom + maxDatagram]byte, size)
	for i := range b.packets {
		b.packets[i].storage = &storage[i]
	}
	b.system.init(b)
	return b
}

// Batches wait for use here and not with a socket, so that an idle socket has none.
var (
	batches = sync.Pool{New: func() any { return newBatch(batchSize) }}
	singles = sync.Pool{New: func() any { return newBatch(1) }}
	wides   = sync.Pool{New: func() any { return newBatch(0) }} // what they receive is for reading only
)

func (b *batch) release() {
	b.packets = b.packets[:b.size]
	b.sends = b.sends[:0]
	switch b.size {
	case 0:
		wides.Put(b)
	case 1:
		singles.Put(b)
	default:
		batches.Put(b)
	}
}

// queue puts a packet among those that are sent next.
func (b *batch) queue(p *packet, out []byte, payload int, to *endpoint) {
	p.out, p.payload, p.to = out, payload, to
	b.sends = append(b.sends, p)
}

// A socket moves batches of datagrams. receive is for one goroutine, send for any number.
type socket interface {
	// receive blocks until there is something. The batch is the caller's until its release.
	receive() (*batch, error)
	// send sends what is queued in the batch, empties the queue and says how many of
	// them failed, with how much payload, and the last reason.
	send(b *batch) (failed, lost int, err error)
	// write sends one datagram; to is nil for a connected socket.
	write(b []byte, to *endpoint) error
	Close() error
	LocalAddr() net.Addr
}

// newSocket takes the fastest way that there is for a packet connection. Only what is
// exactly a *net.UDPConn is read by its descriptor: a type of somebody's own around it
// has methods that must not be passed by.
func newSocket(c net.PacketConn, connected bool) socket {
	if udp, ok := c.(*net.UDPConn); ok {
		if s := newUDPSocket(udp, connected); s != nil {
			return s
		}
	}
	return &plainSocket{PacketConn: c, connected: connected}
}

// growBuffers asks for room for bursts; the system gives what it allows.
func growBuffers(c net.PacketConn) {
	if udp, ok := c.(*net.UDPConn); ok {
		_ = udp.SetReadBuffer(1 << 20)
		_ = udp.SetWriteBuffer(1 << 20)
	}
}

// errTooLong is what Windows calls a datagram that does not fit (WSAEMSGSIZE). Other
// systems cut it and say nothing.
const errTooLong = syscall.Errno(10040)

// A plainSocket is any net.PacketConn, one datagram at a time.
type plainSocket struct {
	net.PacketConn
	connected bool
}

func (s *plainSocket) receive() (*batch, error) {
	b := singles.Get().(*batch)
	p := &b.packets[0]
	n, from, err := 0, netip.AddrPort{}, error(nil)
	if udp, ok := s.PacketConn.(*net.UDPConn); ok {
		n, from, err = udp.ReadFromUDPAddrPort(p.storage[headroom:])
	} else {
		var addr net.Addr
		n, addr, err = s.ReadFrom(p.storage[headroom:])
		if a, ok := addr.(*net.UDPAddr); ok && a != nil {
			from = a.AddrPort()
		}
	}
	if errors.Is(err, errTooLong) {
		n, err = maxDatagram, nil
	}
	if err != nil {
		b.release()
		return nil, err
	}
	p.data, p.from, p.cut = p.storage[headroom:headroom+n], plainAddr(from), n == maxDatagram
	return b, nil
}

func (s *plainSocket) send(b *batch) (failed, lost int, err error) {
	for _, p := range b.sends {
		if e := s.write(p.out, p.to); e != nil {
			failed, lost, err = failed+1, lost+p.payload, e
		}
	}
	b.sends = b.sends[:0]
	return failed, lost, err
}

func (s *plainSocket) write(b []byte, to *endpoint) (err error) {
	var n int
	udp, isUDP := s.PacketConn.(*net.UDPConn)
	switch {
	case isUDP && to == nil:
		n, err = udp.Write(b)
	case isUDP:
		n, err = udp.WriteToUDPAddrPort(b, to.port)
	case to == nil:
		n, err = s.WriteTo(b, nil)
	default:
		n, err = s.WriteTo(b, to.addr)
	}
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return err
}

// closed says whether a read failed because the socket is closed, and for good.
func closed(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe)
}

// newRelaySocket is for a transport's packet connection. One that is slow to write must
// not keep the others waiting (TURN-5): packets for it are queued.
func newRelaySocket(c net.PacketConn, count *counters) socket {
	s := newSocket(c, false)
	plain, ok := s.(*plainSocket)
	if !ok {
		return s
	}
	q := &queuedSocket{plainSocket: plain, count: count, queue: make(chan outbound, relayQueue), closed: make(chan struct{})}
	go q.run()
	return q
}

// relayQueue is how many packets wait for a transport that is slow.
const relayQueue = 256

type outbound struct {
	buffer *buffer
	n      int
	to     *endpoint
}

// A queuedSocket sends in a goroutine of its own.
type queuedSocket struct {
	*plainSocket
	count  *counters
	queue  chan outbound
	once   sync.Once
	closed chan struct{}
}

func (s *queuedSocket) send(b *batch) (failed, lost int, err error) {
	for _, p := range b.sends {
		o := outbound{buffer: buffers.Get().(*buffer), n: len(p.out), to: p.to}
		copy(o.buffer[:], p.out)
		select {
		case s.queue <- o:
		default:
			buffers.Put(o.buffer)
			failed, lost, err = failed+1, lost+p.payload, errFull
		}
	}
	b.sends = b.sends[:0]
	return failed, lost, err
}

func (s *queuedSocket) run() {
	for {
		select {
		case o := <-s.queue:
			if s.write(o.buffer[:o.n], o.to) != nil {
				s.count.failed.Add(1)
			}
			buffers.Put(o.buffer)
		case <-s.closed:
			return
		}
	}
}

func (s *queuedSocket) Close() error {
	s.once.Do(func() { close(s.closed) })
	return s.plainSocket.Close()
}

var errFull = errors.New("turn: no room in the queue")
