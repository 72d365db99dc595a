// Package wire reads and writes what Tor's managed transports (PT 1.0) say besides
// control lines: the environment, the arguments of connections, and the Extended
// ORPort. It has both ends of each, and knows bytes only, no processes.
//
// A host that starts a transport, and takes connections from its server:
//
//	cookie, err := wire.WriteCookie(path, -1, -1)
//	if err != nil {
//		return err
//	}
//	environ, err := (&wire.Environment{
//		State: state, ExitOnStdinClose: true,
//		Servers:      []wire.Server{{Name: "obfs4", Bind: netip.MustParseAddrPort("0.0.0.0:443")}},
//		ExtendedPort: listener.Addr().String(), CookieFile: path,
//	}).Environ()
//	…
//	client, err := wire.AcceptExtended(conn, cookie, func(wire.Client) error { return nil })
//
// A transport that was started by tor:
//
//	environment, err := wire.ParseEnvironment(os.LookupEnv)
//	var refusal *wire.EnvironmentError
//	if errors.As(err, &refusal) {
//		return out.Send(refusal.Line())
//	}
//	…
//	err = wire.ConnectExtended(conn, cookie, wire.Client{Addr: "192.0.2.7:41000", Transport: "websocket"})
//
// Control lines are those of pthost/ptipc/stdio, whose form comes from PT 1.0. The
// clauses are those of spec/pt1.md.
package wire
