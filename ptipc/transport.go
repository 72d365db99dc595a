package ptipc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
)

// A TransportFactory makes a transport from its configuration. It returns before
// a slow bootstrap ends and reports the bootstrap through [Env.Report]. Bad
// configuration is a [*ConfigError]. ctx bounds the call, not the transport's life.
type TransportFactory func(ctx context.Context, config Opaque, env Env) (*Transport, error)

// A Transport is one configured, running transport.
type Transport struct {
	// Connections holds the ways to open a stream, by connection factory type
	// name (LINE-4). It does not change once the factory has returned.
	Connections map[string]ConnectionFactory

	// Packets holds the ways to send datagrams, by name, as Connections does for
	// streams. The two have nothing to do with each other: a name may stand in both.
	Packets map[string]PacketFactory

	// Stats returns the totals of the transport since it was opened. It is never nil.
	Stats func(ctx context.Context) (TransportStats, error)

	// Wait blocks until the transport has ended, and says why: nil after Close.
	Wait func() error

	// Close ends the transport and everything that it started. Connections that
	// are still open are given the transport's grace period, then cut.
	Close func() error
}

// A ConnectionFactory opens streams of one kind.
type ConnectionFactory struct {
	// Bound says that the far end is fixed by the configuration or the settings:
	// Dial takes no destination (SOCKS-11). A transport that is not bound is free.
	Bound bool

	// Dial opens one stream. settings may be nil. dest is "host:port" for a free
	// transport, where host is a name or an address and is never resolved on the
	// way (SOCKS-13), and "" for a bound one. ctx bounds the dial only. Errors
	// answer errors.Is for the [Class] constants.
	Dial func(ctx context.Context, settings Opaque, dest string) (Conn, error)
}

// A PacketFactory opens a socket for datagrams. ctx bounds the opening only.
// Addresses are [*net.UDPAddr] and nothing else: a name is refused with
// [ErrAddressType] and never looked up. Datagrams come in only from addresses (the
// port does not matter) to which the conn has sent before. Both hold wherever the
// transport runs (PKT-1, PKT-2). A datagram may be lost, come twice, or late; it
// comes whole or not at all.
type PacketFactory func(ctx context.Context) (net.PacketConn, error)

// A Conn is an open stream. A Read that returns io.EOF leaves the write side
// open, and CloseWrite leaves the read side open.
type Conn interface {
	net.Conn
	// CloseWrite ends the outgoing direction; the peer reads io.EOF.
	CloseWrite() error
	// Stats returns the counts of this connection.
	Stats() Stats
}

// Env is what a transport is given by whoever opens it. The zero value works.
type Env struct {
	// Local is a directory for long-term storage that belongs to this transport
	// alone (LIFE-8). In a child it is the working directory. "" means none.
	Local string

	// Signals carries messages to and from the other side, out of band and unreliably.
	// nil carries nothing.
	Signals Signals

	// DialOut is the way out to the network: direct, an upstream proxy, or another
	// transport. nil is a plain [net.Dialer]. Transports reach the network through
	// [Env.Dial] and never on their own.
	DialOut func(ctx context.Context, network, addr string) (net.Conn, error)

	// PacketsOut is the way out for datagrams: it opens a socket at a local address,
	// "" for any. nil is a plain UDP socket, but only as long as DialOut is nil too:
	// what has a way out for streams alone sends no datagrams around it (PROXY-4).
	// Transports use [Env.ListenPacket].
	PacketsOut func(ctx context.Context, local string) (net.PacketConn, error)

	// Status receives bootstrap progress, for people and programs (LINE-10).
	Status func(ctx context.Context, attrs ...slog.Attr)

	// Log receives what the transport has to tell its operator. nil discards.
	Log *slog.Logger
}

// Dial opens a connection to the network by the way that the environment provides.
func (e Env) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if e.DialOut != nil {
		return e.DialOut(ctx, network, addr)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, addr)
}

// CheckPackets is nil if the environment has a way out for datagrams. A transport of
// datagrams asks it before it starts, and refuses to start with its error (PROXY-4).
func (e Env) CheckPackets() error {
	if e.PacketsOut == nil && e.DialOut != nil {
		return fmt.Errorf("the way out of this transport carries streams and no datagrams; remove the proxy, or use a transport of streams: %w",
			errors.Join(ErrNotAllowed, ExitUnavailable))
	}
	return nil
}

// ListenPacket opens a UDP socket by the way that the environment provides. local is
// "ip:port", or "" for any address and port.
func (e Env) ListenPacket(ctx context.Context, local string) (net.PacketConn, error) {
	if err := e.CheckPackets(); err != nil {
		return nil, err
	}
	if e.PacketsOut != nil {
		return e.PacketsOut(ctx, local)
	}
	if local == "" {
		local = ":0"
	}
	var config net.ListenConfig
	conn, err := config.ListenPacket(ctx, "udp", local)
	if udp, ok := conn.(*net.UDPConn); ok {
		// Room for bursts: what comes while this process has to wait for its turn would
		// be lost. The system gives what it allows.
		_ = udp.SetReadBuffer(1 << 20)
	}
	return conn, err
}

// Report passes bootstrap progress to Status, if there is one.
func (e Env) Report(ctx context.Context, attrs ...slog.Attr) {
	if e.Status != nil {
		e.Status(ctx, attrs...)
	}
}

// Logger returns Log, or a logger that discards.
func (e Env) Logger() *slog.Logger {
	if e.Log != nil {
		return e.Log
	}
	return slog.New(slog.DiscardHandler)
}
