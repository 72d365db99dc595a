package child

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
	"pthost/ptipc/stdio"
	"pthost/socks"
	"pthost/turn"
)

// client is a child in the role client.
type client struct {
	*link
	factory   ptipc.TransportFactory
	transport *ptipc.Transport
	servers   []*socks.Server
	packets   []*packetServer
	dirs      []*localnet.Dir
	serving   sync.WaitGroup

	relayed relay.Meter // what is open now
	clients relay.Meter // the host's ends of it
	mu      sync.Mutex
	conns   map[string]ptipc.Conn // by the client's name, for STATS (STAT-3)
}

func (c *client) open(ctx context.Context, config ptipc.Opaque, env ptipc.Env) error {
	// CFG-1: the host learns the place in the configuration, the operator the text.
	transport, err := c.factory(ctx, config, env)
	if err != nil {
		return errors.Join(err, c.out.Send(stdio.NewCMethodError(stdio.WholeTransport, err)))
	}
	c.transport = transport
	if len(transport.Connections)+len(transport.Packets) == 0 {
		err = errors.New("the transport offers no connection factory")
		return errors.Join(err, c.out.Send(stdio.NewCMethodError(stdio.WholeTransport, err)))
	}
	for i, name := range slices.Sorted(maps.Keys(transport.Connections)) {
		if err := c.announce(i, name, transport.Connections[name]); err != nil {
			return errors.Join(err, c.out.Send(stdio.NewCMethodError(stdio.WholeTransport, err)))
		}
	}
	credentials := turn.NewCredentials() // PKT-4
	for _, name := range slices.Sorted(maps.Keys(transport.Packets)) {
		if err := c.announcePackets(name, transport.Packets[name], credentials); err != nil {
			return errors.Join(err, c.out.Send(stdio.NewCMethodError(stdio.WholeTransport, err)))
		}
	}
	return c.out.Send(stdio.CMethodsDone{}) // LINE-7: every announced socket listens by now
}

// listen opens the i-th socket for the host: in the state directory, or on the
// loopback (LINE-5, LIFE-11), for nobody but this user and the host's (SOCKS-17).
func (c *client) listen(i int) (net.Listener, string, error) {
	if c.host.Listen == stdio.ListenUnix {
		// The host has checked and locked the directory; here its owner is what counts.
		dir, err := localnet.OpenDir(c.dir)
		if err != nil {
			return nil, "", err
		}
		c.dirs = append(c.dirs, dir)
		listener, err := dir.Listen(strconv.Itoa(i) + ".sock")
		if err != nil {
			return nil, "", err
		}
		return guard(listener, "unix", c.logger(), c.uids()), listener.Addr().String(), nil
	}
	listener, err := localnet.ListenTCP("127.0.0.1:0")
	if err != nil {
		return nil, "", err
	}
	return guard(listener, "tcp", c.logger(), c.uids()), listener.Addr().String(), nil
}

// announce serves one connection factory and writes its CMETHOD line (LINE-4).
func (c *client) announce(i int, name string, factory ptipc.ConnectionFactory) error {
	listener, addr, err := c.listen(i)
	if err != nil {
		return err
	}
	server := &socks.Server{
		Bound: factory.Bound,
		Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
			conn, err := factory.Dial(ctx, r.Settings, r.Dest)
			if err != nil {
				return nil, err
			}
			return c.track(localnet.ClientName(r.Client.RemoteAddr()), conn), nil
		},
		Granted: c.granted,
		Log:     c.logger(),
	}
	c.servers = append(c.servers, server)
	c.serving.Go(func() {
		if err := server.Serve(listener); err != nil {
			c.logger().Error("a listener has failed", "factory", name, "err", err)
		}
	})
	args := stdio.Args{{Key: stdio.ArgStats, Value: "1"}}
	if c.ends != nil && c.host.Listen == stdio.ListenUnix {
		args = append(args, stdio.KV{Key: stdio.ArgEnds, Value: "1"})
	}
	if factory.Bound {
		args = append(args, stdio.KV{Key: stdio.ArgBound, Value: "1"})
	}
	return c.out.Send(stdio.CMethod{Name: name, Protocol: stdio.ProtocolSOCKS5, Addr: addr, Args: args})
}

// packetServer is the TURN server of one packet factory.
type packetServer struct {
	turn.Server
	counts atomic.Bool // its sockets are not counted by the transport any more
}

func (s *packetServer) open(ctx context.Context, factory ptipc.PacketFactory) (net.PacketConn, error) {
	conn, err := factory(ctx)
	if err != nil {
		return nil, err
	}
	if metered, ok := conn.(*relay.PacketConn); ok {
		if udp, ok := metered.Detach(); ok {
			s.counts.Store(true)
			return udp, nil
		}
	}
	return conn, nil
}

// add adds what the server counts in place of the transport.
func (s *packetServer) add(totals *ptipc.TransportStats) {
	if s.counts.Load() {
		stats := s.Stats()
		totals.Active += uint64(stats.Allocations)
		totals.Received += stats.ReceivedBytes
		totals.Sent += stats.SentBytes
	}
}

// announcePackets serves one packet factory over TURN and writes its CMETHOD line
// (PKT-3). An allocation is a socket of the factory, and gives it back (PKT-7).
func (c *client) announcePackets(name string, factory ptipc.PacketFactory, credentials turn.Credentials) error {
	conn, err := localnet.ListenUDP("127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &packetServer{}
	server.Server = turn.Server{Credentials: credentials, Log: c.logger(), Packets: func(ctx context.Context) (net.PacketConn, error) {
		return server.open(ctx, factory)
	}}
	local, uids := conn.LocalAddr().(*net.UDPAddr).AddrPort(), c.uids()
	if localnet.Supported("udp") {
		server.Allow = func(client net.Addr) error { // PKT-5
			cred, err := localnet.UDPPeer(local, client.(*net.UDPAddr).AddrPort())
			if err == nil && !slices.Contains(uids, cred.UID) {
				err = fmt.Errorf("uid %d is not let in", cred.UID)
			}
			return err
		}
	}
	c.packets = append(c.packets, server)
	c.serving.Go(func() {
		if err := server.Serve(conn); err != nil && !errors.Is(err, net.ErrClosed) {
			c.logger().Error("a packet factory has failed", "factory", name, "err", err)
		}
	})
	return c.out.Send(stdio.CMethod{
		Name: name, Protocol: stdio.ProtocolTURN, Addr: local.String(), Args: stdio.Args{
			{Key: stdio.ArgUsername, Value: credentials.Username},
			{Key: stdio.ArgPassword, Value: credentials.Password},
			{Key: stdio.ArgRealm, Value: credentials.Realm},
		},
	})
}

// granted is what the host's connection is relayed as: one that knows a break from an
// end (SOCKS-20).
func (c *client) granted(conn net.Conn) net.Conn {
	end := c.ends.Accepted(conn.RemoteAddr())
	if end == nil {
		return conn
	}
	return c.clients.Conn(conn, relay.Options{End: end, TakeOver: true})
}

// track keeps a connection under its client's name until it is closed.
func (c *client) track(client string, conn ptipc.Conn) net.Conn {
	if client == "" {
		return conn // nobody can ask for it
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns[client] = conn
	return c.relayed.Conn(conn, relay.Options{OnClose: func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.conns[client] == conn {
			delete(c.conns, client)
		}
	}})
}

func (c *client) wait() error { return c.transport.Wait() }

func (c *client) drain(ctx context.Context) {
	var shut sync.WaitGroup
	for _, server := range c.servers {
		shut.Go(func() {
			if err := server.Shutdown(ctx); err != nil {
				c.logger().Info("connections were cut", "err", err)
			}
		})
	}
	shut.Wait()
	// Datagrams have no end that could be waited for: they go on for as long as streams do.
	c.closePackets()
}

func (c *client) closePackets() {
	for _, server := range c.packets {
		if err := server.Close(); err != nil {
			c.logger().Error("a packet factory did not close", "err", err)
		}
	}
}

func (c *client) close() {
	cut, cancel := context.WithCancel(context.Background())
	cancel()
	for _, server := range c.servers {
		_ = server.Shutdown(cut) // what is left is to be cut
	}
	c.closePackets()
	c.serving.Wait()
	if c.transport != nil {
		if err := c.transport.Close(); err != nil {
			c.logger().Error("the transport did not close", "err", err)
		}
	}
	for _, dir := range c.dirs {
		_ = dir.Close() // nothing was written through it
	}
}

// stats answers STATS: of one connection, or the totals (STAT-1 to STAT-3).
func (c *client) stats(name string) any {
	if name == "" {
		totals, err := c.transport.Stats(context.Background())
		if err != nil {
			return nil
		}
		for _, server := range c.packets {
			server.add(&totals)
		}
		return totals
	}
	c.mu.Lock()
	conn, ok := c.conns[name]
	c.mu.Unlock()
	if !ok {
		return nil
	}
	return conn.Stats()
}
