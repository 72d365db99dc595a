// Package pt1 runs Tor's managed transports (PT 1.0, pt-spec): an executable that was
// made for tor becomes a transport like any other.
//
//	command := &host.Command{Path: "obfs4proxy", Dialect: pt1.Dialect{}}
//	transport, err := command.Open(ctx, ptipc.Opaque(`{"transports": {
//		"obfs4": {"host": "192.0.2.1", "port": 443, "cert": "ssH+9r…", "iat-mode": "0"}
//	}}`), ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	defer transport.Close()
//	conn, err := transport.Connections["obfs4"].Dial(ctx, nil, "")
//
// and its server a listener, whose connections have their clients' real addresses:
//
//	server := &host.Command{Path: "obfs4proxy", Dialect: pt1.Dialect{}}
//	listener, err := server.Server().Listen(ctx, ptipc.Opaque(`{"transports": {
//		"obfs4": {"listen": "0.0.0.0:443"}
//	}}`), ptipc.Env{Local: "/var/lib/obfs4"})
//
// # Configuration
//
// Of a client: transports has the settings of each transport by its name, which the
// settings of a connection add to, and replace key by key. host and port are the
// server; they are left out where a transport needs none. All others are the
// transport's own, strings, numbers, booleans or lists of these, and go to it as the
// arguments of the connection (PT1-4). bind_v4 and bind_v6 are the addresses that it
// is to go out from.
//
// Of a server: transports has, by name, where to listen (ip:port), and options.
//
// What a server announces for its clients (SMETHOD ARGS) is told to [ptipc.Env].Status,
// and becomes the clients' configuration with GenerateConfig, whose options are
// transport, listen, host (of the server as its clients see it) and options. Its keys
// are in the state directory, Env.Local, which must then be given to the server.
//
// # What the protocol cannot do
//
// The sockets between host and transport are loopback TCP. Nobody else can use the one
// to which a server brings its connections; but a transport takes anybody who
// connects to the one that it announces, and other users of the machine can.
package pt1
