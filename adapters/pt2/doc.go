// Package pt2 runs transports of PT 2.0 to 3.0 (the Dispatcher IPC interface), such as
// shapeshifter-dispatcher, as transports like any other.
//
//	command := &host.Command{Path: "shapeshifter-dispatcher", Dialect: pt2.Dialect{}}
//	transport, err := command.Open(ctx, ptipc.Opaque(`{"transports": {
//		"shadow": {"host": "192.0.2.1", "port": 443, "password": "…", "cipherName": "DarkStar"}
//	}}`), ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	defer transport.Close()
//	conn, err := transport.Connections["shadow"].Dial(ctx, nil, "")
//
// # Configuration
//
// It is that of PT 1.0 (see pthost/adapters/pt1) with these differences. The settings
// of a connection go to the transport as JSON, as they stand and without host and
// port, which are where it connects to. options, one object for all transports, is
// what the executable is given once, in a file of the state directory. pass says how
// it is told what to do: "flags", which is the default, or "environment", which
// 2.0 and 2.1 know too. version is "2", or "3.0", which is the default: they
// differ in how a server is told where its connections go.
//
// Protocols for datagrams are not used.
package pt2
