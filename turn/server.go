package turn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	pion "github.com/pion/turn/v2"
)

// A Server relays between clients and packet connections of a transport (TURN-5).
// Any TURN client of RFC 5766 over UDP can use it. Credentials and Packets are needed;
// no field may change after Serve was called.
type Server struct {
	// Credentials are asked of every client.
	Credentials Credentials

	// Packets opens the packet connection of one allocation. ctx bounds the opening.
	// Its reads and writes name peers by *net.UDPAddr. A read that fails with
	// net.ErrClosed or io.EOF ends the allocation, as do many failures in a row.
	Packets func(ctx context.Context) (net.PacketConn, error)

	// Allow is asked about a client's address, a *net.UDPAddr, whenever a request comes
	// from one that has no allocation, and about once a second while one that has sends
	// something, since its port can have become another process's (TURN-3). An error means
	// that it gets no answer, and ends its allocation. nil allows everybody. It is called
	// from the goroutine that relays, so it should be quick.
	Allow func(client net.Addr) error

	// MaxAllocations is how many allocations there can be at once; further ones are
	// refused with 486. 0 is DefaultMaxAllocations.
	MaxAllocations int

	// Log receives what an operator should know. nil discards.
	Log *slog.Logger

	count   counters
	log     *slog.Logger
	packets context.Context // ends with the server
	mu      sync.Mutex
	serving bool
	closed  bool
	stop    context.CancelFunc
	guards  []*guard
	open    int // allocations
	running sync.WaitGroup
}

// Serve answers on the sockets, which are loopback UDP sockets, until Close is called,
// and then returns nil. It owns the sockets, and closes them. An error of one of
// them ends all. A Server serves once.
func (s *Server) Serve(conns ...net.PacketConn) (err error) {
	config, done, err := s.start(conns)
	if err != nil {
		for _, c := range conns {
			_ = c.Close()
		}
		return err
	}
	server, err := pion.NewServer(config)
	if err != nil {
		_ = s.Close()
		for _, c := range conns {
			_ = c.Close()
		}
		return fmt.Errorf("turn: %w", err)
	}
	for range conns {
		if e := <-done; e != nil {
			err = e
		}
		_ = s.Close() // the other sockets
	}
	_ = server.Close()
	s.running.Wait()
	if err != nil {
		return fmt.Errorf("turn: serve: %w", err)
	}
	return nil
}

func (s *Server) start(conns []net.PacketConn) (pion.ServerConfig, chan error, error) {
	fail := func(err error) (pion.ServerConfig, chan error, error) { return pion.ServerConfig{}, nil, err }
	if s.Packets == nil {
		return fail(errors.New("turn: a Server needs Packets"))
	}
	if len(conns) == 0 {
		return fail(errors.New("turn: Serve needs a socket"))
	}
	if err := s.Credentials.check(); err != nil {
		return fail(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return fail(net.ErrClosed)
	case s.serving:
		return fail(errors.New("turn: a Server serves once"))
	}
	s.serving = true
	s.log = orDiscard(s.Log)
	s.packets, s.stop = context.WithCancel(context.Background())
	key := s.Credentials.key()
	config := pion.ServerConfig{
		LoggerFactory: pionLog{s.log},
		Realm:         s.Credentials.Realm,
		InboundMTU:    2 * maxDatagram,
		// The guard has checked already (TURN-6).
		AuthHandler: func(string, string, net.Addr) ([]byte, bool) { return key, true },
	}
	done := make(chan error, len(conns))
	for _, c := range conns {
		growBuffers(c)
		g := newGuard(s, newSocket(c, false), key, done)
		s.guards = append(s.guards, g)
		config.PacketConnConfigs = append(config.PacketConnConfigs, pion.PacketConnConfig{PacketConn: g, RelayAddressGenerator: g})
	}
	return config, done, nil
}

// Close ends the server, its sockets and its allocations, and the packet connections
// of those. Serve returns when all is done.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.stop != nil {
		s.stop()
	}
	var err error
	for _, g := range s.guards {
		err = errors.Join(err, g.sock.Close())
	}
	return err
}

// Stats returns what the server has done since it was started.
func (s *Server) Stats() Stats {
	stats := s.count.stats()
	s.mu.Lock()
	stats.Allocations = s.open
	s.mu.Unlock()
	return stats
}

// reserve counts an allocation, if there is room for one more.
func (s *Server) reserve() bool {
	limit := s.MaxAllocations
	if limit == 0 {
		limit = DefaultMaxAllocations
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.open >= limit {
		return false
	}
	s.open++
	s.running.Add(1)
	return true
}

func (s *Server) unreserve() {
	s.mu.Lock()
	s.open--
	s.mu.Unlock()
	s.running.Done()
}
