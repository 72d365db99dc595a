package relay_test

import (
	"context"
	"fmt"
	"io"
	"net"

	"pthost/ptipc/relay"
)

// A client asks through a relay, ends its direction, and gets the whole answer.
func Example() {
	server := listen(func(c net.Conn) {
		question, _ := io.ReadAll(c)
		fmt.Fprintf(c, "%s? 42.", question)
	})
	defer server.Close()

	var meter relay.Meter
	done := make(chan error)
	front := listen(func(client net.Conn) {
		wire, err := net.Dial("tcp", server.Addr().String())
		if err != nil {
			meter.Failed()
			return
		}
		done <- relay.Join(context.Background(), client, meter.Conn(wire, relay.Options{}))
	})
	defer front.Close()

	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	fmt.Fprint(c, "The answer")
	_ = c.(*net.TCPConn).CloseWrite()
	answer, _ := io.ReadAll(c)
	fmt.Printf("%s\n", answer)

	fmt.Println("ended:", <-done)
	s := meter.Stats()
	fmt.Println(s.Opened, "opened,", s.Sent, "bytes sent,", s.Received, "received")
	// Output:
	// The answer? 42.
	// ended: <nil>
	// 1 opened, 10 bytes sent, 15 received
}

// listen serves one connection.
func listen(serve func(net.Conn)) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		serve(c)
	}()
	return l
}
