package front

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
	"pthost/socks"
)

// ListenPacket opens udp://IP:PORT on the loopback. Only this user's programs are heard.
func ListenPacket(url string, log *slog.Logger) (*localnet.GuardedPacketConn, error) {
	addr, ok := strings.CutPrefix(url, "udp://")
	if !ok {
		return nil, fmt.Errorf("%q is not an address for datagrams: write udp://127.0.0.1:PORT", url)
	}
	if !localnet.Supported("udp") {
		return nil, fmt.Errorf("%s: other users of this machine could not be kept out: %w", url, localnet.ErrUnsupported)
	}
	conn, err := localnet.ListenUDP(addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	return localnet.GuardPackets(conn, log), nil
}

// ForwardPackets passes datagrams on to one address through a packet factory, with a
// session for each source (PKT-9).
func ForwardPackets(factory ptipc.PacketFactory, to netip.AddrPort, log *slog.Logger) *relay.PacketForward {
	return &relay.PacketForward{Open: factory, To: to, Log: log}
}

// SOCKS5WithPackets is [SOCKS5] with UDP ASSOCIATE: datagrams go through a packet
// factory, to addresses alone (PKT-10).
func SOCKS5WithPackets(factory ptipc.ConnectionFactory, packets ptipc.PacketFactory, settings ptipc.Opaque, log *slog.Logger) Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	server := SOCKS5(factory, settings, log).(*socks.Server)
	server.Associate = func(ctx context.Context, r *socks.Request) (socks.Association, error) {
		return associate(ctx, r, packets, log)
	}
	return server
}

// association carries the datagrams of one client of a SOCKS5 proxy.
type association struct {
	front   *localnet.GuardedPacketConn
	wire    net.PacketConn
	ip      netip.Addr                     // the client's; invalid for any of the loopback
	client  atomic.Pointer[netip.AddrPort] // nil until its first datagram has come
	log     *slog.Logger
	dropped atomic.Uint64
	both    sync.WaitGroup
	closing sync.Once
	done    chan struct{}
}

func associate(ctx context.Context, r *socks.Request, packets ptipc.PacketFactory, log *slog.Logger) (*association, error) {
	if !localnet.Supported("udp") {
		return nil, fmt.Errorf("UDP ASSOCIATE: other users of this machine could not be kept out: %w: %w", localnet.ErrUnsupported, ptipc.ErrCommand)
	}
	a := &association{log: log, done: make(chan struct{})}
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	if tcp, ok := r.Client.LocalAddr().(*net.TCPAddr); ok {
		at = netip.AddrPortFrom(tcp.AddrPort().Addr().Unmap(), 0)
	}
	if tcp, ok := r.Client.RemoteAddr().(*net.TCPAddr); ok {
		a.ip = tcp.AddrPort().Addr().Unmap()
	}
	// What a client says of its own address is often wrong, but for the port: 0 is not known.
	if said, err := netip.ParseAddrPort(r.Dest); err == nil && said.Port() != 0 && a.ip.IsValid() {
		client := netip.AddrPortFrom(a.ip, said.Port())
		a.client.Store(&client)
	}
	front, err := localnet.ListenUDP(at.String())
	if err != nil {
		return nil, err
	}
	a.front = localnet.GuardPackets(front, log)
	if a.wire, err = packets(ctx); err != nil {
		return nil, errors.Join(err, front.Close())
	}
	a.both.Go(a.out)
	a.both.Go(a.back)
	return a, nil
}

// Addr is where the client sends its datagrams.
func (a *association) Addr() netip.AddrPort { return a.front.LocalAddr().(*net.UDPAddr).AddrPort() }

// Done is closed when the association has ended, because it was closed or because the
// transport's socket has failed.
func (a *association) Done() <-chan struct{} { return a.done }

// Close ends the association.
func (a *association) Close() error {
	a.end()
	a.both.Wait()
	a.log.Debug("an association for datagrams has ended", "dropped", a.dropped.Load())
	return nil
}

func (a *association) end() {
	a.closing.Do(func() {
		_, _ = a.front.Close(), a.wire.Close() // datagrams have no end to be told
		close(a.done)
	})
}

// mine reports whether a datagram is the client's own. The first one decides about the
// port, unless the client has told it.
func (a *association) mine(from netip.AddrPort) bool {
	if client := a.client.Load(); client != nil {
		return *client == from
	}
	if a.ip.IsValid() && from.Addr() != a.ip {
		return false
	}
	a.client.Store(&from)
	return true
}

// out passes the client's datagrams on.
func (a *association) out() {
	defer a.end()
	buf := make([]byte, maxHeader+relay.MaxDatagram+1)
	for {
		n, from, err := a.front.ReadFrom(buf)
		if err != nil {
			return
		}
		udp := from.(*net.UDPAddr).AddrPort() // a guarded socket has no others
		to, payload, err := parsePacket(buf[:n])
		if err != nil || len(payload) > relay.MaxDatagram || !a.mine(netip.AddrPortFrom(udp.Addr().Unmap(), udp.Port())) {
			a.dropped.Add(1)
			continue
		}
		if _, err := a.wire.WriteTo(payload, net.UDPAddrFromAddrPort(to)); err != nil {
			a.dropped.Add(1) // as any datagram that the network loses
		}
	}
}

// back brings the answers to the client.
func (a *association) back() {
	defer a.end()
	buf, space := make([]byte, maxHeader+relay.MaxDatagram+1), [maxHeader]byte{}
	for {
		n, from, err := a.wire.ReadFrom(buf[maxHeader:])
		if err != nil {
			return
		}
		udp, ok := from.(*net.UDPAddr)
		client := a.client.Load()
		if !ok || n > relay.MaxDatagram || client == nil {
			a.dropped.Add(1)
			continue
		}
		header := appendHeader(space[:0], udp.AddrPort())
		packet := buf[maxHeader-len(header) : maxHeader+n]
		copy(packet, header)
		if _, err := a.front.WriteTo(packet, net.UDPAddrFromAddrPort(*client)); err != nil {
			a.dropped.Add(1)
		}
	}
}

// The header of a datagram to and from a SOCKS5 proxy (RFC 1928, section 7): two bytes 0, the
// number of a fragment, and an address.
const (
	addressIPv4 = 1
	addressIPv6 = 4
	maxHeader   = 4 + net.IPv6len + 2
)

var errPacket = errors.New("is no datagram for a SOCKS5 proxy, or a fragment, or goes to a name")

// parsePacket takes the header away. Fragments and names are refused (PKT-10).
func parsePacket(b []byte) (to netip.AddrPort, payload []byte, err error) {
	size := 4
	if len(b) < size || b[0] != 0 || b[1] != 0 || b[2] != 0 {
		return to, nil, errPacket
	}
	switch b[3] {
	case addressIPv4:
		size += net.IPv4len
	case addressIPv6:
		size += net.IPv6len
	default:
		return to, nil, errPacket
	}
	if len(b) < size+2 {
		return to, nil, errPacket
	}
	addr, _ := netip.AddrFromSlice(b[4:size]) // of one of the two lengths
	addr = addr.Unmap()
	port := binary.BigEndian.Uint16(b[size:])
	if port == 0 || addr.IsUnspecified() {
		return to, nil, errPacket
	}
	return netip.AddrPortFrom(addr, port), b[size+2:], nil
}

func appendHeader(b []byte, from netip.AddrPort) []byte {
	addr := from.Addr().Unmap()
	kind := byte(addressIPv4)
	if addr.Is6() {
		kind = addressIPv6
	}
	b = append(append(b, 0, 0, 0, kind), addr.AsSlice()...)
	return binary.BigEndian.AppendUint16(b, from.Port())
}
