// Package managed is a managed proxy (PT 1.0, pt-spec) with transports of ours behind
// it: an application that knows nothing but managed transports, such as tor, uses
// them.
//
//	proxy := managed.Proxy{
//		Clients: map[string]ptipc.TransportFactory{"websocket": websocket.Open},
//		Servers: map[string]*ptipc.ServerFactory{"websocket": websocket.Server},
//	}
//	err := proxy.Run(ctx, os.LookupEnv, os.Stdin, os.Stdout)
//
// As a client it gives tor a SOCKS5 server for each transport: the arguments of a
// bridge line become connection settings, and its address the destination, or the
// settings host and port of a bound transport (PT1-22, PT1-23). As a server it brings
// what comes on the wire to tor's Extended ORPort, with the client's address, or to
// its ORPort (PT1-28). A server without a configuration makes itself one and keeps it
// (PT1-25), and what its clients need is told to tor, which writes it on the bridge
// line (PT1-27).
package managed
