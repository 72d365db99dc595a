package turn_test

import (
	"context"
	"fmt"
	"log"
	"net"

	"pthost/turn"
)

// A transport's packet connections, here plain UDP sockets, are used from another process
// as if they were in this one.
func Example() {
	server := &turn.Server{
		Credentials: turn.NewCredentials(),
		Packets: func(context.Context) (net.PacketConn, error) {
			return net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		},
	}
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- server.Serve(socket) }()

	peer, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		log.Fatal(err)
	}
	defer peer.Close()

	conn, err := turn.Dial(context.Background(), socket.LocalAddr().(*net.UDPAddr).AddrPort(), server.Credentials)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := conn.WriteTo([]byte("hello"), peer.LocalAddr()); err != nil {
		log.Fatal(err)
	}
	buf := make([]byte, turn.MaxPayload)
	n, from, err := peer.ReadFrom(buf)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(buf[:n]), from.String() == conn.LocalAddr().String())

	_ = conn.Close()
	_ = server.Close()
	fmt.Println(<-served)
	// Output:
	// hello true
	// <nil>
}
