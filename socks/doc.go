// Package socks is the modified SOCKS5 between an application's host and a
// transport: RFC 1928 with settings for each connection, both ends of it.
//
// A [Server] takes connections, reads settings and destination, dials by the
// function that it was given and relays. [Connect] is the client:
//
//	server := &socks.Server{
//		Dial: func(ctx context.Context, r *socks.Request) (net.Conn, error) {
//			var d net.Dialer
//			return d.DialContext(ctx, "tcp", r.Dest)
//		},
//	}
//	listener, err := net.Listen("tcp", "127.0.0.1:0")
//	if err != nil {
//		return err
//	}
//	go server.Serve(listener)
//	defer server.Shutdown(ctx)
//
//	conn, err := net.Dial("tcp", listener.Addr().String())
//	if err != nil {
//		return err
//	}
//	err = socks.Connect(ctx, conn, ptipc.Opaque(`{"padding":true}`), "example.com:443")
//
// Settings travel under method 0x80, as raw JSON or with a length, and under
// 0x09 with a length (SOCKS-1 to SOCKS-4). A server with Plain set is an ordinary
// SOCKS5 proxy without authentication, for programs that know nothing of
// settings, and one with Login takes settings as username and password;
// [ConnectUpstream] is the client of an ordinary SOCKS5 proxy.
package socks
