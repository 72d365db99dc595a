package free_test

import (
	"context"
	"errors"
	"fmt"
	"net"

	"pthost/adapters/free"
	"pthost/ptipc"
	"pthost/ptipc/relay"
)

// wire is a bound transport of one line: TCP to the server of its configuration.
func wire(_ context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	var c struct {
		Server string `json:"server"`
	}
	if err := config.Decode(&c); err != nil {
		return nil, err
	}
	meter := new(relay.Meter)
	return meter.Transport(map[string]ptipc.ConnectionFactory{
		"wire": meter.Factory(true, func(ctx context.Context, _ ptipc.Opaque, _ string) (net.Conn, error) {
			return env.Dial(ctx, "tcp", c.Server)
		}),
	}, nil), nil
}

// wireListener is the other end.
type wireListener struct{ net.Listener }

func (wireListener) Stats() ptipc.TransportStats { return ptipc.TransportStats{} }
func (wireListener) Wait() error                 { return nil }

var wireServer = ptipc.ServerFactory{
	Listen: func(context.Context, ptipc.Opaque, ptipc.Env) (ptipc.Listener, error) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		return wireListener{l}, err
	},
}

func Example() {
	ctx := context.Background()
	server, err := free.Server(wireServer).Proxy(ctx, ptipc.Opaque(`{"egress": {"allow": ["*.example.org:443"]}}`), ptipc.Env{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()

	config := fmt.Sprintf(`{"server": %q}`, server.Addr())
	transport, err := free.Client(wire)(ctx, ptipc.Opaque(config), ptipc.Env{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer transport.Close()
	_, err = transport.Connections["wire"].Dial(ctx, nil, "127.0.0.1:22")
	fmt.Println(err)
	fmt.Println(errors.Is(err, ptipc.ErrNotAllowed))
	// Output:
	// free: the far end refused: destination not allowed
	// true
}
