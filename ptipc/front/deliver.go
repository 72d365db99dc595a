package front

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"

	proxyproto "github.com/pires/go-proxyproto"

	"pthost/ptipc"
)

// Deliver passes the connections of a server's wire on to a service that knows
// nothing of transports (SRV-5): tcp://HOST:PORT or unix:///PATH. With header, a
// PROXY protocol header, version 2, tells the service where the client is. The
// server to serve is a [ptipc.Listener].
func Deliver(to string, header bool, log *slog.Logger) (Server, error) {
	network, addr, ok := strings.Cut(to, "://")
	if !ok || network != "tcp" && network != "unix" || addr == "" {
		return nil, fmt.Errorf("%q is not a service to deliver to: write tcp://HOST:PORT or unix:///PATH: %w", to, ptipc.ExitConfig)
	}
	return newForward(log, func(ctx context.Context, client net.Conn) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, network, addr)
		if err != nil || !header {
			return conn, err
		}
		if _, err := proxyHeader(client.RemoteAddr(), conn).WriteTo(conn); err != nil {
			_ = conn.Close()
			return nil, err
		}
		return conn, nil
	}), nil
}

// proxyHeader tells the client's address. What is not an ip:port is not known to the
// service, and a made-up address would be a lie: LOCAL says nothing.
func proxyHeader(client net.Addr, service net.Conn) *proxyproto.Header {
	local := &proxyproto.Header{Version: 2, Command: proxyproto.LOCAL, TransportProtocol: proxyproto.UNSPEC}
	source, ok := client.(*net.TCPAddr)
	if !ok {
		return local
	}
	// The wire's own address is nobody's business behind it; the unspecified address
	// of the client's family stands for it.
	destination := &net.TCPAddr{IP: net.IPv6unspecified}
	family := proxyproto.TCPv6
	if source.IP.To4() != nil {
		destination.IP, family = net.IPv4zero, proxyproto.TCPv4
	}
	if to, ok := service.RemoteAddr().(*net.TCPAddr); ok && (to.IP.To4() != nil) == (source.IP.To4() != nil) {
		destination = to
	}
	return &proxyproto.Header{
		Version: 2, Command: proxyproto.PROXY, TransportProtocol: family, SourceAddr: source, DestinationAddr: destination,
	}
}
