package ptipc

import (
	"context"
	"net"
)

// A ServerFactory makes the server side of a transport: it listens on the wire,
// and either hands connections over (Listen) or makes them itself (Proxy). A
// transport offers one of the two and leaves the other nil.
type ServerFactory struct {
	// Name is the transport's, as a child announces it (SRV-1).
	Name string

	// GenerateConfig makes a configuration for the server and the one that its
	// clients need, from options that only the transport knows. Neither holds a port 0.
	GenerateConfig func(ctx context.Context, options Opaque, env Env) (client, server Opaque, err error)

	// Listen serves the wire and hands each connection to its caller.
	Listen func(ctx context.Context, config Opaque, env Env) (Listener, error)

	// Proxy serves the wire and connects each client to where it wants to go.
	Proxy func(ctx context.Context, config Opaque, env Env) (ServerManager, error)
}

// A ServerManager is a server that runs.
type ServerManager interface {
	// Addr is where the wire listens.
	Addr() net.Addr
	// Stats returns the totals since the start (STAT-2). Failed counts connections
	// that did not get past the wire's handshake.
	Stats() TransportStats
	// Wait blocks until the server has ended, and says why: nil after Close.
	Wait() error
	// Close stops listening. Connections that were handed over live on; those that
	// the server itself connects may finish for a few seconds and are then cut.
	Close() error
}

// A Listener is a server whose connections are its caller's. What Accept returns
// is a [Conn], and its RemoteAddr is the client's as the wire saw it.
type Listener interface {
	net.Listener
	ServerManager
}
