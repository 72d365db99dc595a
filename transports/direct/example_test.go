package direct_test

import (
	"context"
	"fmt"
	"io"
	"net"

	"pthost/ptipc"
	"pthost/transports/direct"
)

// A transport in the application's own process is used like one in a child's.
func Example() {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()
	go func() {
		if conn, err := server.Accept(); err == nil {
			_, _ = io.WriteString(conn, "hello")
			conn.Close()
		}
	}()

	ctx := context.Background()
	transport, err := direct.Open(ctx, ptipc.Opaque(`{}`), ptipc.Env{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer transport.Close()
	conn, err := transport.Connections["direct"].Dial(ctx, nil, server.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	answer, err := io.ReadAll(conn)
	fmt.Println(string(answer), err)
	// Output: hello <nil>
}
