// Package direct is the free transport that changes nothing: it connects to the
// destination by the way out that its environment provides, and its datagrams are
// those of a plain UDP socket. It is what other transports are measured against.
//
//	transport, err := direct.Open(ctx, nil, ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	conn, err := transport.Connections["direct"].Dial(ctx, nil, "example.com:443")
//	packets, err := transport.Packets["direct"](ctx)
package direct

import (
	"context"
	"net"

	"pthost/ptipc"
	"pthost/ptipc/relay"
	"pthost/transports/endpoint"
)

// config is the configuration of the transport.
type config struct {
	// Listen is the address of sockets for datagrams, mostly with port 0. Without it
	// they have every address of the machine, and no peer can be told which.
	Listen endpoint.Address `json:"listen,omitempty"`
}

// Open is a [ptipc.TransportFactory]. The configuration is empty, or {"listen":"IP:0"}
// for datagrams that come from one address of the machine; settings have no keys.
func Open(_ context.Context, opaque ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	var c config
	if err := opaque.Decode(&c); err != nil {
		return nil, err
	}
	var meter relay.Meter
	transport := meter.Transport(map[string]ptipc.ConnectionFactory{
		"direct": meter.Factory(false, func(ctx context.Context, settings ptipc.Opaque, dest string) (net.Conn, error) {
			if err := settings.Decode(&struct{}{}); err != nil {
				return nil, err
			}
			return env.Dial(ctx, "tcp", dest)
		}),
	}, nil)
	// PROXY-4: streams still have their way where datagrams have none.
	if env.CheckPackets() == nil {
		transport.Packets = map[string]ptipc.PacketFactory{
			"direct": meter.Packets(func(ctx context.Context) (net.PacketConn, error) { return env.ListenPacket(ctx, string(c.Listen)) }),
		}
	}
	return transport, nil
}
