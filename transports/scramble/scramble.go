// Package scramble is a transport for datagrams that look like nothing: each is sealed
// under a key that both sides share, with random padding, and has no byte and no
// length that is always the same (spec/scramble.md).
//
//	client, server, err := scramble.Server.GenerateConfig(ctx, ptipc.Opaque(`{"listen":"192.0.2.1:4444","to":"127.0.0.1:53"}`), ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	transport, err := scramble.Open(ctx, client, ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	conn, err := transport.Packets["scramble"](ctx)
//	if err != nil {
//		return err
//	}
//	_, err = conn.WriteTo(query, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:4444")))
//
// What is sent goes to an address where somebody with the same key and the other side
// listens: a server, which passes it on to one service, or another client.
package scramble

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"pthost/ptipc"
	"pthost/ptipc/relay"
	"pthost/transports/endpoint"
)

// Name is what the packet factory and the server are called.
const Name = "scramble"

// A Key is what both sides share, 32 bytes that nobody else knows. In JSON it is base64.
type Key [32]byte

// UnmarshalText reads base64. The error does not repeat what was found.
func (k *Key) UnmarshalText(text []byte) error {
	raw, err := base64.StdEncoding.Strict().DecodeString(string(text))
	if err != nil || len(raw) != len(k) {
		return errors.New("is not a key: give 32 random bytes in base64, as generate makes them")
	}
	copy(k[:], raw)
	return nil
}

// MarshalText writes base64.
func (k Key) MarshalText() ([]byte, error) {
	return base64.StdEncoding.AppendEncode(nil, k[:]), nil
}

// A Side is which of the two keys that come of the shared one a peer seals with, and
// which it opens with (SCRAM-3).
type Side string

// The sides.
const (
	ClientSide Side = "client"
	ServerSide Side = "server"
)

// UnmarshalText takes one of the two.
func (s *Side) UnmarshalText(text []byte) error {
	*s = Side(text)
	if *s != ClientSide && *s != ServerSide {
		return errors.New(`is not a side: write "client" or "server"; the two that talk to each other have one each`)
	}
	return nil
}

// config is that of a client, and of a peer that talks to one.
type config struct {
	Key    Key              `json:"key"`
	Side   Side             `json:"side,omitempty"`
	Listen endpoint.Address `json:"listen,omitempty"`
}

// Open is a [ptipc.TransportFactory] with one packet factory, "scramble". The
// configuration is {"key":KEY}; "side" is client unless it is given, and "listen" is
// the address of its socket, of which there can be one at a time then.
func Open(_ context.Context, opaque ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	c := config{Side: ClientSide}
	if err := opaque.Decode(&c); err != nil {
		return nil, err
	}
	if err := env.CheckPackets(); err != nil { // PROXY-4
		return nil, fmt.Errorf("scramble: %w", err)
	}
	keys, err := newKeys(c.Key, c.Side)
	if err != nil {
		return nil, err
	}
	var meter relay.Meter
	transport := meter.Transport(nil, nil)
	transport.Packets = map[string]ptipc.PacketFactory{
		Name: meter.Packets(func(ctx context.Context) (net.PacketConn, error) {
			return listen(ctx, env, string(c.Listen), keys)
		}),
	}
	return transport, nil
}

func listen(ctx context.Context, env ptipc.Env, local string, keys *keys) (net.PacketConn, error) {
	raw, err := env.ListenPacket(ctx, local)
	if err != nil {
		return nil, fmt.Errorf("scramble: %w", err)
	}
	return newConn(raw, keys, env.Logger()), nil
}

// Server passes the datagrams of its clients on to one service, and the answers back.
var Server = &ptipc.ServerFactory{Name: Name, GenerateConfig: generate, Proxy: serve}

// address is an IP address with a port.
type address string

// Validate implements [ptipc.Validator].
func (a address) Validate() error {
	if to, err := netip.ParseAddrPort(string(a)); err != nil || to.Port() == 0 || to.Addr().IsUnspecified() {
		return errors.New("is not an address to send to: write IP:PORT")
	}
	return nil
}

func (a address) addrPort() netip.AddrPort { return netip.MustParseAddrPort(string(a)) }

// serverConfig is that of SCRAM-8.
type serverConfig struct {
	Key    Key              `json:"key"`
	Listen endpoint.Address `json:"listen"`
	To     address          `json:"to"`
}

// manager is a server that runs.
type manager struct {
	conn    net.PacketConn
	forward *relay.PacketForward
	once    sync.Once
	closed  chan struct{}
	ended   chan error
	err     error
}

func serve(ctx context.Context, opaque ptipc.Opaque, env ptipc.Env) (ptipc.ServerManager, error) {
	var c serverConfig
	if err := opaque.Decode(&c); err != nil {
		return nil, err
	}
	keys, err := newKeys(c.Key, ServerSide)
	if err != nil {
		return nil, err
	}
	conn, err := listen(ctx, env, string(c.Listen), keys)
	if err != nil {
		return nil, ptipc.Classify(err)
	}
	m := &manager{
		conn: conn, closed: make(chan struct{}), ended: make(chan error, 1),
		forward: &relay.PacketForward{
			Open: func(ctx context.Context) (net.PacketConn, error) { return env.ListenPacket(ctx, "") },
			To:   c.To.addrPort(), Log: env.Logger(),
		},
	}
	go func() { m.ended <- m.forward.Serve(conn) }()
	return m, nil
}

// Addr is where the wire listens.
func (m *manager) Addr() net.Addr { return m.conn.LocalAddr() }

// Stats counts the sessions: one is what a client sends from one address.
func (m *manager) Stats() ptipc.TransportStats {
	s := m.forward.Stats()
	return ptipc.TransportStats{Active: uint64(s.Active), Opened: s.Opened, Failed: s.Failed, Received: s.Sent, Sent: s.Received}
}

// Wait returns when the server has ended.
func (m *manager) Wait() error {
	select {
	case err := <-m.ended:
		if err != nil {
			m.end(err)
		}
	case <-m.closed:
	}
	<-m.closed
	return m.err
}

// Close ends the server at once: datagrams have no end to wait for.
func (m *manager) Close() error {
	m.end(nil)
	return nil
}

func (m *manager) end(err error) {
	m.once.Do(func() {
		_ = m.forward.Shutdown(context.Background()) // it reports nothing
		m.err = err
		close(m.closed)
	})
}

type options struct {
	Listen endpoint.Address `json:"listen,omitempty"`
	To     address          `json:"to"`
}

// generate makes a key for both sides.
func generate(ctx context.Context, opaque ptipc.Opaque, env ptipc.Env) (client, server ptipc.Opaque, err error) {
	o := options{Listen: ":4444"}
	if err := opaque.Decode(&o); err != nil {
		return nil, nil, err
	}
	if o.Listen.Port() == 0 { // SRV-6
		conn, err := env.ListenPacket(ctx, string(o.Listen))
		if err != nil {
			return nil, nil, ptipc.Classify(err)
		}
		free := conn.LocalAddr().(*net.UDPAddr).AddrPort()
		_ = conn.Close() // nothing was sent
		host := ""
		if o.Listen.IP().IsValid() {
			host = o.Listen.IP().String()
		}
		o.Listen = endpoint.Address(net.JoinHostPort(host, fmt.Sprint(free.Port())))
	}
	var key Key
	_, _ = rand.Read(key[:]) // never fails
	client, err = json.Marshal(map[string]any{"key": key})
	if err != nil {
		return nil, nil, err
	}
	server, err = json.Marshal(serverConfig{Key: key, Listen: o.Listen, To: o.To})
	return client, server, err
}
