package host

import (
	"context"
	"fmt"
	"net"

	"pthost/ptipc"
	"pthost/ptipc/localnet"
	"pthost/ptipc/relay"
	"pthost/socks"
)

// An Attachment is a child that runs already, started by somebody else. Its Open
// method is a [ptipc.TransportFactory]; it takes no configuration.
type Attachment struct {
	// Addrs are the announced addresses by connection factory name: ip:port on the
	// loopback, or unix:NAME in the directory Env.Local.
	Addrs map[string]string
	// Bound names the factories that are bound.
	Bound map[string]bool
}

// Open connects to nothing yet: it checks the addresses.
func (a *Attachment) Open(_ context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	if !config.Empty() {
		return nil, &ptipc.ConfigError{Problem: "cannot be handed to a child that runs already", Remedy: "leave the configuration out"}
	}
	if env.DialOut != nil || env.PacketsOut != nil {
		return nil, fmt.Errorf("a child that runs already cannot be given a way out: %w", ptipc.ExitUsage)
	}
	if len(a.Addrs) == 0 {
		return nil, fmt.Errorf("attach: no address was given: %w", ptipc.ExitUsage)
	}
	addrs := map[string]localnet.Addr{}
	needsDir := false
	for name, text := range a.Addrs {
		addr, err := localnet.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", name, err)
		}
		addrs[name] = addr
		needsDir = needsDir || addr.Unix()
	}
	var dir *localnet.Dir
	if needsDir {
		if env.Local == "" {
			return nil, fmt.Errorf("attach: a unix socket needs the child's directory in Env.Local: %w", ptipc.ExitUsage)
		}
		var err error
		if dir, err = localnet.OpenDir(env.Local); err != nil {
			return nil, fmt.Errorf("attach: %w", err)
		}
	}
	return attach(addrs, a.Bound, dir), nil
}

func attach(addrs map[string]localnet.Addr, bound map[string]bool, dir *localnet.Dir) *ptipc.Transport {
	meter := new(relay.Meter)
	connections := map[string]ptipc.ConnectionFactory{}
	for name, addr := range addrs {
		connections[name] = meter.Factory(bound[name], func(ctx context.Context, settings ptipc.Opaque, dest string) (net.Conn, error) {
			if err := checkDest(bound[name], dest); err != nil {
				return nil, err
			}
			conn, err := connect(ctx, dir, addr)
			if err != nil {
				return nil, fmt.Errorf("transport at %s: %w", addr, unreached(ctx, err))
			}
			if err := socks.Connect(ctx, conn, settings, dest); err != nil {
				_ = conn.Close()
				return nil, fmt.Errorf("transport at %s: %w", addr, err)
			}
			return conn, nil
		})
	}
	return meter.Transport(connections, func() error {
		if dir == nil {
			return nil
		}
		return dir.Close()
	})
}

// connect connects to an announced address (LINE-5).
func connect(ctx context.Context, dir *localnet.Dir, addr localnet.Addr) (net.Conn, error) {
	if addr.Unix() {
		return dir.Dial(ctx, addr.Name())
	}
	return localnet.DialTCP(ctx, addr)
}
