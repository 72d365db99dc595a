package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/stdio"
	"pthost/turn"
)

// packetSuffix tells a packet factory from a connection factory of the same name
// (PKT-3). No name has a space.
const packetSuffix = " " + stdio.ProtocolTURN

func packetKey(name string) string { return name + packetSuffix }

func packetName(key string) string { return strings.TrimSuffix(key, packetSuffix) }

// packetsOf checks the announcement of a packet factory.
func packetsOf(m stdio.CMethod) (method, error) {
	addr, err := localnet.ParseAddr(m.Addr)
	if err != nil {
		return method{}, fmt.Errorf("names an address that it must not: %w (LINE-5)", err)
	}
	if addr.Unix() {
		return method{}, errors.New("names a unix socket, and TURN is spoken over UDP (PKT-3)")
	}
	username, password, realm, ok := m.Args.TURN()
	if !ok {
		return method{}, errors.New("has no username, password and realm (PKT-3)")
	}
	return method{addr: addr, turn: &turn.Credentials{Username: username, Password: password, Realm: realm}}, nil
}

// checkPackets makes sure that an announced UDP socket is the child's own (PKT-5).
func checkPackets(m method, pids []int) error {
	if err := localnet.UDPOwnedBy(m.addr.AddrPort(), pids); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// packetSocket is an application's socket, which is told when its child is gone.
type packetSocket struct {
	*turn.Conn
	s *supervisor
}

func (s *supervisor) keep(conn *turn.Conn) *packetSocket {
	socket := &packetSocket{conn, s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sockets == nil {
		s.sockets = make(map[*packetSocket]struct{})
	}
	s.sockets[socket] = struct{}{}
	return socket
}

// Close gives the allocation back.
func (p *packetSocket) Close() error {
	p.s.mu.Lock()
	delete(p.s.sockets, p)
	p.s.mu.Unlock()
	return p.Conn.Close()
}

// openPackets opens one socket of a packet factory. It lives through restarts of the
// child: each new one is asked for a new allocation, with its own credentials (PKT-8).
func (s *supervisor) openPackets(ctx context.Context, name string) (net.PacketConn, error) {
	for again := false; ; again = true {
		c, err := s.child(ctx)
		if err != nil {
			return nil, err
		}
		m := c.methods[packetKey(name)]
		conn, err := turn.Dial(ctx, m.addr.AddrPort(), *m.turn, turn.WithLogger(s.log),
			turn.WithRedial(func(ctx context.Context) (netip.AddrPort, turn.Credentials, error) {
				c, err := s.child(ctx)
				if err != nil {
					return netip.AddrPort{}, turn.Credentials{}, err
				}
				m := c.methods[packetKey(name)]
				return m.addr.AddrPort(), *m.turn, nil
			}))
		switch {
		case err == nil:
			return s.keep(conn), nil
		case errors.Is(err, turn.ErrLost) && !again && ctx.Err() == nil && c.gone(ctx):
			continue // a child that had died but was not yet missed
		case errors.Is(err, turn.ErrLost):
			return nil, fmt.Errorf("the child does not answer: %w", unreached(ctx, err))
		}
		return nil, ptipc.Classify(err)
	}
}
