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
)

// Open is a [ptipc.TransportFactory]. Neither configuration nor settings have keys.
func Open(_ context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	if err := config.Decode(&struct{}{}); err != nil {
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
			"direct": meter.Packets(func(ctx context.Context) (net.PacketConn, error) { return env.ListenPacket(ctx, "") }),
		}
	}
	return transport, nil
}
