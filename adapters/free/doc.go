// Package free makes a bound transport free: a header in front of each stream
// tells the far end where it is to go.
//
// On one machine, over any bound transport (a child process, say):
//
//	transport, err := free.Client(command.Open)(ctx, config, ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	conn, err := transport.Connections["example"].Dial(ctx, nil, "www.example.org:443")
//
// On the other, over the same transport's server:
//
//	server, err := free.Server(example.Server).Proxy(ctx, ptipc.Opaque(`{
//		"egress": {"allow": ["*.example.org:443"]},
//		"carrier": {"listen": "192.0.2.1:8443"}
//	}`), ptipc.Env{})
//
// The server looks names up and dials, within the policy of package egress. A
// dial at the far end that fails is the same error at the near end: errors.Is
// answers for its [ptipc.Class].
//
// Connections of the bound transport are called carriers here. With [Client] each
// carries one stream, with [Mux] many; a server takes both. Streams that are relayed
// between sockets stay in the kernel with Client. With Mux they are copied, which takes
// half as much CPU again for bulk; but Mux opens them several times as fast, and over a
// network with one round trip instead of all those of the carrier.
//
// Carriers must keep to what [net.Conn] says of deadlines: a Read that ran into one can
// be tried again under another. The wire is specified in spec/free.md, where clauses
// such as FREE-1 are from.
package free
