// Package sip003 speaks SIP003, the plugin interface of Shadowsocks, from both ends:
// it makes a transport a Shadowsocks plugin, and a Shadowsocks plugin a transport.
// The clauses SIP-n are those of spec/sip003.md.
//
// A process that Shadowsocks has started serves a transport to it:
//
//	environment, err := sip003.ReadEnvironment(os.Getenv)
//	if err != nil {
//		return err
//	}
//	ctx, stop := sip003.WithParent(ctx, log) // it ends with Shadowsocks
//	defer stop()
//	return sip003.Client(ctx, environment, transport.Connections["example"], log)
//
// An application uses a plugin as any other transport; it is bound, and its connection
// factory is named plugin:
//
//	plugin := &host.Command{Path: "ss-v2ray-plugin", Dialect: sip003.Dialect{}}
//	transport, err := plugin.Open(ctx, ptipc.Opaque(`{"remote":"192.0.2.1:443","options":{"path":"/p"}}`), ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	defer transport.Close()
//	conn, err := transport.Connections["plugin"].Dial(ctx, nil, "")
package sip003
