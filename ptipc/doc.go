// Package ptipc is the contract between applications and pluggable transports:
// the factories, connections, errors and exit codes that both sides of the pipe
// speak, wherever the transport runs.
//
// An application opens a transport and dials through it. The same value comes
// from a transport in this process, from a child process (package host) or from
// an adapter:
//
//	command := &host.Command{Path: "/usr/lib/pt/pt-example"}
//	transport, err := command.Open(ctx, ptipc.Opaque(`{"server":"192.0.2.1:443"}`), ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	defer transport.Close()
//	conn, err := transport.Connections["example"].Dial(ctx, nil, "example.com:443")
//
// A transport's author writes a [TransportFactory] and hands it to package child,
// which turns it into an executable. The wire between the two is specified in
// spec/ptipc.md; names such as SOCKS-4 in comments are clauses of that document.
//
// The package depends on the standard library only.
package ptipc
