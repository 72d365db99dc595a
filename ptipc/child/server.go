package child

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
	"pthost/ptipc/stdio"
	"pthost/socks"
)

// deliverTimeout bounds how long the host may take to accept a connection.
const deliverTimeout = 10 * time.Second

// server is a child in the role server.
type server struct {
	*link
	factory *ptipc.ServerFactory
	manager ptipc.ServerManager
	wire    ptipc.Listener // nil for a server that proxies
	dir     *localnet.Dir  // of a unix socket to deliver to
	deliver localnet.Addr

	serving   sync.WaitGroup // the accept loop
	delivered sync.WaitGroup // connections
	hosts     relay.Meter    // the ends of them that lead to the host
	cut       context.CancelFunc
	handing   context.Context // ends when connections are cut
}

func (s *server) open(ctx context.Context, config ptipc.Opaque, env ptipc.Env) error {
	fail := func(err error) error {
		return errors.Join(err, s.out.Send(stdio.NewSMethodError(s.name(), err)))
	}
	args := stdio.Args{{Key: stdio.ArgStats, Value: "1"}}
	if s.factory.Listen != nil {
		if err := s.openDelivery(); err != nil { // before the wire is opened for clients
			return fail(err)
		}
		wire, err := s.factory.Listen(ctx, config, env)
		if err != nil {
			return fail(err)
		}
		s.wire, s.manager = wire, wire
		s.handing, s.cut = context.WithCancel(context.Background())
		if s.ends != nil && s.deliver.Unix() {
			args = append(args, stdio.KV{Key: stdio.ArgEnds, Value: "1"})
		}
		s.serving.Go(s.accept)
	} else {
		manager, err := s.factory.Proxy(ctx, config, env)
		if err != nil {
			return fail(err)
		}
		s.manager = manager
		args = append(args, stdio.KV{Key: stdio.ArgProxy, Value: "1"})
	}
	return errors.Join(
		s.out.Send(stdio.SMethod{Name: s.name(), Addr: s.manager.Addr().String(), Args: args}),
		s.out.Send(stdio.SMethodsDone{})) // SRV-1: it listens by now
}

// name is what the server is announced as.
func (s *server) name() string {
	if s.factory.Name == "" {
		return stdio.WholeTransport
	}
	return s.factory.Name
}

// openDelivery finds out where connections go (SRV-3).
func (s *server) openDelivery() error {
	if s.host.Deliver == "" {
		return fmt.Errorf("the server hands its connections over, and HOST says nowhere to deliver them: %w", ptipc.ExitUsage)
	}
	addr, err := localnet.ParseAddr(s.host.Deliver)
	if err != nil {
		return fmt.Errorf("HOST: deliver: %w: %w", err, ptipc.ExitUsage)
	}
	s.deliver = addr
	if addr.Unix() {
		s.dir, err = localnet.OpenDir(s.link.dir)
	}
	return err
}

// accept hands over what comes in on the wire.
func (s *server) accept() {
	slots := make(chan struct{}, socks.DefaultMaxConns)
	for {
		select {
		case slots <- struct{}{}: // above the bound, the wire's backlog waits
		case <-s.handing.Done():
			return
		}
		conn, err := s.wire.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				s.logger().Error("the wire does not accept any more", "err", err)
			}
			return
		}
		s.delivered.Go(func() {
			defer func() { <-slots }()
			s.handOver(conn)
		})
	}
}

// handOver connects one client with the host. Nothing of it goes on before the
// host has agreed (SRV-3).
func (s *server) handOver(conn net.Conn) {
	to, err := s.dialHost(conn.RemoteAddr())
	if err != nil {
		s.logger().Warn("a connection was not accepted by the host", "err", err)
		_ = relay.Abort(conn) // the client learns that this is no clean end, where the wire can say so
		return
	}
	if err := relay.Join(s.handing, conn, to); err != nil {
		s.logger().Debug("a connection broke", "err", err)
	}
}

func (s *server) dialHost(remote net.Addr) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.handing, deliverTimeout)
	defer cancel()
	settings, err := json.Marshal(socks.Delivery{Transport: s.name(), Remote: remote.String()})
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	var end *localnet.End
	if s.deliver.Unix() {
		conn, end, err = s.dir.DialEnd(ctx, s.deliver.Name(), s.ends)
	} else {
		conn, err = localnet.DialTCP(ctx, s.deliver)
	}
	if err != nil {
		return nil, err
	}
	if err := socks.Connect(ctx, conn, settings, ""); err != nil {
		_ = conn.Close() // nothing was sent through it
		end.Release()
		return nil, err
	}
	if end == nil {
		return conn, nil
	}
	return s.hosts.Conn(conn, relay.Options{End: end, TakeOver: true, OnClose: end.Release}), nil
}

func (s *server) wait() error { return s.manager.Wait() }

func (s *server) drain(ctx context.Context) {
	if s.wire == nil {
		return // the Close of a server that proxies drains
	}
	if err := s.wire.Close(); err != nil {
		s.logger().Debug("the wire did not close", "err", err)
	}
	done := make(chan struct{})
	go func() {
		s.serving.Wait()
		s.delivered.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.logger().Info("connections are cut")
		s.cut()
		<-done
	}
}

func (s *server) close() {
	if s.cut != nil {
		s.cut()
	}
	if s.manager != nil {
		if err := s.manager.Close(); err != nil {
			s.logger().Debug("the server did not close", "err", err)
		}
	}
	s.serving.Wait()
	s.delivered.Wait()
	if s.dir != nil {
		_ = s.dir.Close() // nothing was written through it
	}
}

// stats are the totals: a host knows no client of a server by its socket.
func (s *server) stats(name string) any {
	if name != "" {
		return nil
	}
	return s.manager.Stats()
}

// generate writes a configuration for each side (SRV-6). Nothing else may stand on
// standard output, so what there is to tell goes nowhere.
func (l *link) generate(ctx context.Context, factory *ptipc.ServerFactory, options ptipc.Opaque, stdout io.Writer) error {
	client, server, err := factory.GenerateConfig(ctx, options, ptipc.Env{Local: l.dir})
	if err != nil {
		return err
	}
	line, err := stdio.Generated{Client: client, Server: server}.Append(nil)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ptipc.ExitSoftware)
	}
	_, err = stdout.Write(line)
	return err
}
