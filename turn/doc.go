// Package turn carries datagrams between an application and a transport's process by
// TURN (RFC 5766) on the loopback: a [Server] on the transport's side, whose allocations are
// packet connections of the transport, and [Dial] on the application's.
//
//	server := &turn.Server{
//		Credentials: turn.NewCredentials(),
//		Packets:     transport.Packets["example"], // func(context.Context) (net.PacketConn, error)
//	}
//	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
//	if err != nil {
//		return err
//	}
//	go server.Serve(socket)
//	defer server.Close()
//
//	conn, err := turn.Dial(ctx, socket.LocalAddr().(*net.UDPAddr).AddrPort(), server.Credentials)
//	if err != nil {
//		return err
//	}
//	defer conn.Close()
//	_, err = conn.WriteTo([]byte("hello"), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 53})
//
// Each end works with any other TURN implementation over UDP. What they add to RFC 5766, and
// where they are stricter, stands in spec/turn.md; names such as TURN-2 in comments are
// clauses of that document.
package turn
