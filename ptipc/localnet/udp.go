package localnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ListenUDP opens a socket at a loopback ip:port, where port 0 lets the system choose;
// any other address is an error that wraps [ErrAddr] (LIFE-11).
func ListenUDP(addr string) (*net.UDPConn, error) {
	udp, err := parseLoopback(addr)
	if err != nil {
		return nil, err
	}
	var config net.ListenConfig
	conn, err := config.ListenPacket(context.Background(), "udp", udp.String())
	if err != nil {
		return nil, fmt.Errorf("localnet: %w; choose an address that is free, or port 0", err)
	}
	udpConn := conn.(*net.UDPConn)
	_ = udpConn.SetReadBuffer(readBuffer) // the system gives what it allows
	return udpConn, nil
}

// readBuffer is room for bursts: what comes while this process has to wait for its
// turn would be lost.
const readBuffer = 1 << 20

// UDPPeer says which user's socket sends datagrams from the loopback address from to
// the socket at local: the one that an answer would reach (PKT-5). When there is none
// any more, the error is [ErrPeerGone], never a guess, and where a system cannot tell,
// [ErrUnsupported].
func UDPPeer(local, from netip.AddrPort) (Cred, error) {
	local, from = unmap(local), unmap(from)
	if !local.Addr().IsLoopback() || !from.Addr().IsLoopback() {
		return Cred{}, fmt.Errorf("localnet: peer: %w: a datagram from %s to %s is not on the loopback", ErrAddr, from, local)
	}
	cred, err := udpPeer(local, from)
	if err != nil {
		return Cred{}, fmt.Errorf("localnet: peer of datagrams from %s: %w", from, err)
	}
	return cred, nil
}

// UDPOwnedBy says whether the socket at a loopback address belongs to one of the
// processes pids: nil if so, else [ErrForeignListener], [ErrWildcard], or
// [ErrUnsupported] where the system cannot tell (PKT-5).
func UDPOwnedBy(addr netip.AddrPort, pids []int) error {
	if err := udpOwnedBy(unmap(addr), pids); err != nil {
		return fmt.Errorf("localnet: owner of the UDP socket at %s: %w", addr, err)
	}
	return nil
}

const (
	// peerKept is how long the user behind an address is remembered. A port that was
	// given up may be another user's afterwards.
	peerKept = time.Second
	// maxKept bounds the addresses that are remembered.
	maxKept = 4096
)

// A GuardedPacketConn hears only some users of this machine; [GuardPackets] makes it.
type GuardedPacketConn struct {
	net.PacketConn
	udp     *net.UDPConn
	log     *slog.Logger
	uids    []uint32
	local   netip.AddrPort
	refused atomic.Uint64

	mu     sync.Mutex
	known  map[netip.AddrPort]verdict
	logged time.Time
}

type verdict struct {
	ok    bool
	until time.Time
}

// GuardPackets makes of a loopback socket one that hears only the users uids, by
// default the effective user, and drops what others send, and what nobody can tell the
// sender of (PKT-5). Whose an address is, is asked once a second. log gets at most
// one line a second about what was dropped; nil discards.
func GuardPackets(conn *net.UDPConn, log *slog.Logger, uids ...uint32) *GuardedPacketConn {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if len(uids) == 0 {
		uids = []uint32{uint32(os.Geteuid())}
	}
	return &GuardedPacketConn{
		PacketConn: conn, udp: conn, log: log, uids: slices.Clone(uids), local: conn.LocalAddr().(*net.UDPAddr).AddrPort(),
		known: make(map[netip.AddrPort]verdict),
	}
}

// Refused is the number of datagrams that were dropped because of their user.
func (g *GuardedPacketConn) Refused() uint64 { return g.refused.Load() }

// ReadFrom returns the next datagram of a user who is heard.
func (g *GuardedPacketConn) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		n, from, err := g.udp.ReadFromUDPAddrPort(p)
		if err != nil {
			return n, nil, err
		}
		if g.hears(from) {
			return n, net.UDPAddrFromAddrPort(from), nil
		}
		g.refused.Add(1)
	}
}

func (g *GuardedPacketConn) hears(from netip.AddrPort) bool {
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	if v, ok := g.known[from]; ok && now.Before(v.until) {
		return v.ok
	}
	cred, err := UDPPeer(g.local, from)
	if err == nil && !slices.Contains(g.uids, cred.UID) {
		err = fmt.Errorf("uid %d is not let in", cred.UID)
	}
	if len(g.known) >= maxKept {
		clear(g.known)
	}
	g.known[from] = verdict{err == nil, now.Add(peerKept)}
	if err != nil && !errors.Is(err, ErrPeerGone) && now.Sub(g.logged) >= refusalLogInterval {
		g.logged = now
		g.log.Warn("dropped datagrams", "socket", g.local, "from", from, "err", err, "in all", g.refused.Load()+1)
	}
	return err == nil
}
