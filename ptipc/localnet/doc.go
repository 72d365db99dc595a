// Package localnet makes sockets that stay on this machine, and tells who is at
// the other end of them.
//
// A host and its child meet on a unix socket in the child's private directory,
// or on loopback TCP. Either way, other users of the machine must not get in:
//
//	dir, err := localnet.OpenDir("/var/lib/pt-example")
//	if err != nil {
//		return err
//	}
//	defer dir.Close()
//	if err := dir.Lock(); err != nil {
//		return err
//	}
//	listener, err := dir.Listen("socks")
//	if err != nil {
//		return err
//	}
//	guarded := localnet.Guard(listener, logger)
//	defer guarded.Close()
//	fmt.Println("CMETHOD example socks5", guarded.Addr()) // unix:socks
//	for {
//		conn, err := guarded.Accept() // of this user alone
//		if err != nil {
//			return err
//		}
//		go serve(conn, localnet.ClientName(conn.RemoteAddr()))
//	}
//
// The other side parses the announced address with [ParseAddr], connects with
// [Dir.Dial] or [DialTCP], and may ask [ListenerOwnedBy] whether the socket is its child's.
//
// # What a system can tell
//
// Linux knows the user behind a unix socket and behind a loopback TCP
// connection; darwin knows the first only; other systems know neither. Where a
// system cannot tell, [Peer] returns [ErrUnsupported] and [Guard] lets nobody
// in, so ask [Supported] first. Inside a Linux user namespace every user that
// the namespace does not map reads as the overflow uid, 65534: do not run there
// as that user.
//
// The package has been run on Linux only. It compiles for darwin and windows,
// where it was never run.
package localnet
