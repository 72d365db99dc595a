// Package bound fixes the destination of a free transport, which makes it bound.
//
//	open := bound.Client(direct.Open, "192.0.2.1:443")
//	transport, err := open(ctx, nil, ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	conn, err := transport.Connections["direct"].Dial(ctx, nil, "")
//
// What comes out can be a carrier for package free, or be used by programs that
// have only one place to go.
package bound

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"strconv"

	"pthost/ptipc"
)

// Client makes a free transport bound: its connection factories keep their names
// and always go to dest, "host:port". Configuration, settings and statistics are
// those of open. A destination that is not one, and a transport with a factory
// that is bound already, are refused.
func Client(open ptipc.TransportFactory, dest string) ptipc.TransportFactory {
	return func(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
		if err := check(dest); err != nil {
			return nil, err
		}
		inner, err := open(ctx, config, env)
		if err != nil {
			return nil, err
		}
		outer := *inner
		outer.Connections = maps.Clone(inner.Connections)
		for name, factory := range inner.Connections {
			if factory.Bound {
				err := fmt.Errorf("bound: connection factory %q is bound already: leave the adapter out: %w", name, ptipc.ExitConfig)
				return nil, errors.Join(err, inner.Close())
			}
			outer.Connections[name] = ptipc.ConnectionFactory{
				Bound: true,
				Dial: func(ctx context.Context, settings ptipc.Opaque, none string) (ptipc.Conn, error) {
					if none != "" { // SOCKS-11
						return nil, fmt.Errorf("bound: the destination is %s already, and cannot be %q: %w", dest, none, ptipc.ErrNotAllowed)
					}
					return factory.Dial(ctx, settings, dest)
				},
			}
		}
		return &outer, nil
	}
}

// check refuses what a free factory would refuse at every dial (SOCKS-12).
func check(dest string) error {
	host, port, err := net.SplitHostPort(dest)
	if err != nil {
		return fmt.Errorf("bound: the destination must be host:port: %w: %w", err, ptipc.ExitConfig)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" {
		return fmt.Errorf("bound: the destination %q needs a name or an address, and a port from 1 to 65535: %w", dest, ptipc.ExitConfig)
	}
	return nil
}
