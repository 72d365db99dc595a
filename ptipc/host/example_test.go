package host_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/host"
)

// The transport of this example is the test binary, which plays the transport
// direct when it is asked to. Usually Path is all that a Command needs.
func Example() {
	// A server to talk to: it says hello and goes.
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()
	go func() {
		if conn, err := server.Accept(); err == nil {
			_, _ = io.WriteString(conn, "hello through a child process")
			conn.Close()
		}
	}()

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	command := &host.Command{Path: os.Args[0], Args: []string{"@child", "direct"}}
	transport, err := command.Open(ctx, ptipc.Opaque(`{}`), ptipc.Env{})
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
	// Output: hello through a child process <nil>
}
