package socks_test

import (
	"context"
	"errors"
	"fmt"
	"net"

	"pthost/ptipc"
	"pthost/socks"
)

func Example() {
	server := &socks.Server{
		Dial: func(_ context.Context, r *socks.Request) (net.Conn, error) {
			fmt.Printf("settings %s, destination %s\n", r.Settings, r.Dest)
			return nil, ptipc.ErrHostUnreachable
		},
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	served := make(chan error)
	go func() { served <- server.Serve(listener) }()

	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	err = socks.Connect(ctx, conn, ptipc.Opaque(`{"padding":true}`), "example.com:443")
	fmt.Println(errors.Is(err, ptipc.ErrHostUnreachable), err)
	conn.Close()

	fmt.Println(server.Shutdown(ctx), <-served)
	// Output:
	// settings {"padding":true}, destination example.com:443
	// true socks: the server refused: host unreachable
	// <nil> <nil>
}
