package bound_test

import (
	"context"
	"fmt"
	"net"

	"pthost/adapters/bound"
	"pthost/ptipc"
	"pthost/transports/direct"
)

func ExampleClient() {
	ctx := context.Background()
	env := ptipc.Env{DialOut: func(_ context.Context, _, addr string) (net.Conn, error) {
		return nil, fmt.Errorf("no way to %s: %w", addr, ptipc.ErrNetworkUnreachable)
	}}
	transport, err := bound.Client(direct.Open, "192.0.2.1:443")(ctx, nil, env)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer transport.Close()
	_, err = transport.Connections["direct"].Dial(ctx, nil, "")
	fmt.Println(err)
	// Output:
	// no way to 192.0.2.1:443: network unreachable
}
